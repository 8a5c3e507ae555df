"""Block formats of ggml: their layouts, quantizers and dequantizers, in C++ and in torch with the same bytes."""
