"""Measuring models: perplexity, parity, probes of single weights, candidate plans side by side."""
