"""`python -m moecast`: the same as the command `moecast`."""

from .cli import main

main(prog_name="moecast")
