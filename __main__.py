"""`python -m moecast`: the same as the command `moecast`."""

from .cli import main

if __name__ == "__main__":
    main(prog_name="moecast")
