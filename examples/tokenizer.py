"""Trains a byte-level BPE tokenizer and writes it the way published checkpoints carry theirs."""

import json
from pathlib import Path

from architecture import Architecture
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers


def train_tokenizer(architecture: Architecture, text: str, vocabulary: int) -> Tokenizer:
    """A tokenizer of exactly `vocabulary` tokens, the architecture's added tokens at its ends."""
    tokenizer = Tokenizer(models.BPE())
    if architecture.NORMALIZER is not None:
        tokenizer.normalizer = architecture.NORMALIZER
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            *(pre_tokenizers.Split(Regex(p), behavior="isolated") for p in architecture.PRE_TOKENIZER_PATTERNS),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary - len(architecture.LAST_TOKENS),
        special_tokens=list(architecture.FIRST_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(text.splitlines(keepends=True), trainer)
    tokenizer.add_tokens([*architecture.FIRST_TOKENS, *architecture.LAST_TOKENS])
    if (size := tokenizer.get_vocab_size()) != vocabulary:
        raise ValueError(f"the text yields only {size} of {vocabulary} tokens: lower --vocabulary")
    return tokenizer


def write_tokenizer(architecture: Architecture, tokenizer: Tokenizer, context: int, folder: Path) -> None:
    """Writes tokenizer.json, tokenizer_config.json, generation_config.json and any chat_template.jinja."""
    tokenizer.save(str(folder / "tokenizer.json"))
    added = {
        str(number): {
            "content": token.content,
            "lstrip": token.lstrip,
            "normalized": token.normalized,
            "rstrip": token.rstrip,
            "single_word": token.single_word,
            "special": token.special,
        }
        for number, token in sorted(tokenizer.get_added_tokens_decoder().items())
    }
    tokenizer_config = {
        "add_prefix_space": False,
        "added_tokens_decoder": added,
        "bos_token": architecture.BEGIN_OF_TEXT,
        "clean_up_tokenization_spaces": False,
        "eos_token": architecture.END_OF_TEXT,
        "model_max_length": context,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    ends = {"bos_token_id": architecture.BEGIN_OF_TEXT, "eos_token_id": architecture.END_OF_TEXT}
    generation_config = {key: tokenizer.token_to_id(token) for key, token in ends.items() if token is not None}
    generation_config |= architecture.GENERATION_DEFAULTS
    write_json(folder / "tokenizer_config.json", tokenizer_config)
    write_json(folder / "generation_config.json", generation_config)
    if architecture.CHAT_TEMPLATE is not None:
        (folder / "chat_template.jinja").write_text(architecture.CHAT_TEMPLATE, encoding="utf-8")


def write_json(path: Path, value: object) -> None:
    """Writes `value` as indented UTF-8 JSON with a final newline."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
