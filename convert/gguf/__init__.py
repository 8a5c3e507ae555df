"""Writing GGUF files: tensors, metadata, tokenizers, importance matrices."""
