"""Reading models: checkpoint folders, the Hub, GGUF files; decoding their numbers; their tokenizers.

A layer of its own below `runner`, because the runner opens models as well as the converter does.
"""
