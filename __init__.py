"""moecast casts open-weight mixture-of-experts checkpoints into files that run on the machine you have."""

__version__ = "0.1.0"
