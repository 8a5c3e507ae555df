"""The unified graph and one adapter file per architecture. Nothing here holds or touches tensor data."""
