"""Executes a graph in torch, layer by layer, and measures what comes out."""
