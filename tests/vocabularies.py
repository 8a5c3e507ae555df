"""Small byte-level BPE vocabularies: trained ones, and one whose ids show every place where a text was split."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from random import Random
from typing import Any

import gguf
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
LINES = [
    "The fox isn't tired: it's 1234 days, he'll count 56 stars and 789 more.\n",
    "    for index in range(10):\n        total += values[index]  # naïve\n\n",
    "HTTPServer.getValue('key') != \"McDonald\" ... we've THEY'RE café\r\n",
    "今天我们在北京买了苹果。カタカナとひらがな 한국어 문장\n",
    "Привет мир, нещо на български; ελληνικά γράμματα!\n",
]


def splitter(expressions: Iterable[str]) -> pre_tokenizers.PreTokenizer:
    """Split by regular expressions, then to byte-level letters: the form that published tokenizers have."""
    splits = [pre_tokenizers.Split(Regex(expression), "isolated") for expression in expressions]
    return pre_tokenizers.Sequence([*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def train(
    expressions: Iterable[str],
    *,
    lines: Sequence[str] = LINES,
    size: int = 500,
    ignore_merges: bool = False,
    added: Sequence[AddedToken | str] = (),
) -> Tokenizer:
    """A tokenizer with at most `size` trained tokens and the added ones behind them."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    tokenizer.pre_tokenizer = splitter(expressions)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=BYTES, show_progress=False)
    tokenizer.train_from_iterator(list(lines) * 3, trainer)
    tokenizer.add_tokens(list(added))
    return tokenizer


def save(tokenizer: Tokenizer, folder: Path, **files: Any) -> Path:
    """A checkpoint folder's tokenizer files; `files` maps names without .json to their content."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


def every_pair(pre: str, letters: Iterable[str] = BYTES) -> dict[str, Any]:
    """GGUF metadata in which any two of the byte-level `letters` merge, by random rank: a moved split shows in the ids.

    Two whole words are tokens that no merge makes: they come out only where `ignore_merges` holds.
    """
    if pre == "gemma4":
        return _every_pair_of_characters()
    pairs = [(left, right) for left in sorted(letters) for right in sorted(letters)]
    tokens = [*BYTES, *(left + right for left, right in pairs), "Ġwhole", "words"]
    Random(0).shuffle(pairs)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [1] * len(tokens),
        "tokenizer.ggml.merges": [f"{left} {right}" for left, right in pairs],
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
    }


def _every_pair_of_characters() -> dict[str, Any]:
    """The same with a space as U+2581 and bytes for what is no token."""
    letters = ["\n", "\u2581", *map(chr, range(33, 127)), *"éあ中1ा"]
    letters = [*dict.fromkeys(letters)]
    pairs = [(left, right) for left in letters for right in letters]
    parts = {3: ["<s>", "</s>"], 6: [f"<0x{byte:02X}>" for byte in range(256)]}
    parts[1] = [*letters, *(left + right for left, right in pairs)]
    Random(0).shuffle(pairs)
    return {
        "tokenizer.ggml.model": "gemma4",
        "tokenizer.ggml.pre": "gemma4",
        "tokenizer.ggml.tokens": [token for tokens in parts.values() for token in tokens],
        "tokenizer.ggml.token_type": [kind for kind, tokens in parts.items() for _ in tokens],
        "tokenizer.ggml.merges": [f"{left} {right}" for left, right in pairs],
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
    }


def write_vocabulary(path: Path, metadata: Mapping[str, Any]) -> Path:
    """A GGUF file without tensors, written by gguf-py."""
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in metadata.items():
        match value:
            case bool():
                writer.add_bool(key, value)
            case int():
                writer.add_uint32(key, value)
            case str():
                writer.add_string(key, value)
            case list():
                writer.add_array(key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path
