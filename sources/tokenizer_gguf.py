"""Rebuilds a tokenizer from the `tokenizer.*` keys of a GGUF file, as llama.cpp does (src/llama-vocab.cpp)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers

from ..archs.pretokenizers import PRE_TOKENIZERS, PreTokenizer, find_pre_tokenizer
from ..errors import BadInput
from .control_tokens import END_OF_GENERATION_TEXTS, looks_like_control
from .tokenizer import Tokenizer

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
"""The values of `tokenizer.ggml.token_type`."""

CHAT_TEMPLATE = "tokenizer.chat_template"


def read_tokenizer_metadata(metadata: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer that llama.cpp builds from these keys (the contract of Tokenizer.from_gguf)."""
    row = _pre_tokenizer_of(metadata)
    split = [pre_tokenizers.Split(Regex(expression), "isolated") for expression in row.splits]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend = build_backend(metadata, pre_tokenizers.Sequence([*split, byte_level]), row.ignore_merges)
    size = len(metadata["tokenizer.ggml.tokens"])
    ids = {name: _token_id(metadata, name, size) for name in ("bos", "eos", "eot", "eom", "unknown", "padding")}
    add_bos = bool(metadata.get("tokenizer.ggml.add_bos_token", row.add_bos))
    if add_bos and ids["bos"] is None:
        raise BadInput("tokenizer.ggml.bos_token_id is missing, yet texts begin with BOS; convert the model again")
    ends = frozenset(id for name in ("eos", "eot", "eom") if (id := ids[name]) is not None)
    return Tokenizer(
        backend=backend,
        vocabulary_size=size,
        bos=ids["bos"],
        eos=ids["eos"],
        unknown=ids["unknown"],
        padding=ids["padding"],
        add_bos=add_bos,
        end_of_generation=ends | _ends_by_text(backend),
        chat_templates=_chat_templates(metadata),
    )


def build_backend(
    metadata: Mapping[str, Any], pre_tokenizer: pre_tokenizers.PreTokenizer, ignore_merges: bool
) -> tokenizers.Tokenizer:
    """A `tokenizers` object with the vocabulary and merges of GGUF metadata and the given splitter."""
    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    types: list[int] = metadata.get("tokenizer.ggml.token_type", [NORMAL] * len(tokens))
    if len(types) != len(tokens):
        raise BadInput(f"tokenizer.ggml.token_type has {len(types)} entries, expected {len(tokens)} as in tokens")
    if repeated := [text for text, count in Counter(tokens).items() if count > 1]:
        raise BadInput(f"tokenizer.ggml.tokens holds {repeated[0]!r} more than once; each token needs its own text")
    # Unused ids and empty texts never come out of a text and decode to nothing: they stay out.
    used = [
        (id, text, kind) for id, (text, kind) in enumerate(zip(tokens, types, strict=True)) if text and kind != UNUSED
    ]
    merges = [_split_merge(merge) for merge in metadata["tokenizer.ggml.merges"]]
    try:
        model = models.BPE({text: id for id, text, _ in used}, merges, ignore_merges=ignore_merges)
    except Exception as error:  # the library raises bare Exception
        raise BadInput(f"tokenizer.ggml.merges does not fit tokenizer.ggml.tokens: {error}") from error
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizer
    backend.decoder = decoders.ByteLevel()
    backend.add_tokens(
        [
            AddedToken(text, normalized=False, special=kind != USER_DEFINED or looks_like_control(text))
            for _, text, kind in used
            if kind in (UNKNOWN, CONTROL, USER_DEFINED)
        ]
    )
    return backend


def _split_merge(merge: str) -> tuple[str, str]:
    # As llama.cpp does: the first piece has at least one character, so a leading space belongs to it.
    left, _, right = merge[1:].partition(" ")
    return merge[:1] + left, right


def _pre_tokenizer_of(metadata: Mapping[str, Any]) -> PreTokenizer:
    kind = metadata.get("tokenizer.ggml.model")
    if kind != "gpt2":
        raise BadInput(f"tokenizer.ggml.model is {kind!r}; moecast reads byte-level BPE ('gpt2') only")
    for key in ("tokenizer.ggml.tokens", "tokenizer.ggml.merges"):
        if key not in metadata:
            raise BadInput(f"{key} is missing; moecast needs a GGUF file with its own vocabulary")
    name = str(metadata.get("tokenizer.ggml.pre") or "default")
    row = find_pre_tokenizer(name)
    if row is None:
        known = ", ".join(name for row in PRE_TOKENIZERS for name in row.names)
        raise BadInput(f"tokenizer.ggml.pre is {name!r}, a pre-tokenizer that moecast does not know; it knows {known}")
    return row


def _token_id(metadata: Mapping[str, Any], name: str, size: int) -> int | None:
    id = metadata.get(f"tokenizer.ggml.{name}_token_id")
    return int(id) if id is not None and int(id) < size else None


def _ends_by_text(backend: tokenizers.Tokenizer) -> frozenset[int]:
    added = backend.get_added_tokens_decoder()
    return frozenset(id for id, token in added.items() if token.content in END_OF_GENERATION_TEXTS)


def _chat_templates(metadata: Mapping[str, Any]) -> dict[str, str]:
    prefix = f"{CHAT_TEMPLATE}."
    named = {key.removeprefix(prefix): str(text) for key, text in metadata.items() if key.startswith(prefix)}
    return named | ({"default": str(metadata[CHAT_TEMPLATE])} if CHAT_TEMPLATE in metadata else {})
