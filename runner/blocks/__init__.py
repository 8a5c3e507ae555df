"""The mathematics of each operation in torch, one file each."""
