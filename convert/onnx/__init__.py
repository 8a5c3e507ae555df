"""Graphs as ONNX models for ONNX Runtime: what is computed, where the weights lie, and the files around them."""
