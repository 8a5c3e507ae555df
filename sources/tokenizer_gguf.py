"""Rebuilds a tokenizer from the `tokenizer.*` keys of a GGUF file, as llama.cpp does (src/llama-vocab.cpp)."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from ..archs.config import Config
from ..archs.pretokenizers import BYTE_FALLBACK, BYTE_LEVEL, PRE_TOKENIZERS, SPACE, PreTokenizer, find_pre_tokenizer
from ..errors import BadInput
from .control_tokens import END_OF_GENERATION_TEXTS, looks_like_control
from .tokenizer import Tokenizer, refused

T = TypeVar("T", int, str)

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
"""The values of `tokenizer.ggml.token_type`."""

BYTE_TOKEN = re.compile("<0x[0-9A-F]{2}>")
CHAT_TEMPLATE = "tokenizer.chat_template"
_KINDS = {int: "whole numbers", str: "strings"}


def read_tokenizer_metadata(metadata: Mapping[str, Any]) -> Tokenizer:
    """The BPE tokenizer that llama.cpp builds from these keys.

    Raises BadInput for another kind of tokenizer, an unknown `tokenizer.ggml.pre`, or inconsistent lists.
    """
    row = _pre_tokenizer_of(metadata)
    split: list[pre_tokenizers.PreTokenizer] = [
        pre_tokenizers.Split(Regex(expression), "isolated") for expression in row.splits
    ]
    if row.model == BYTE_LEVEL:
        split.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
    backend = build_backend(metadata, pre_tokenizers.Sequence(split), row.ignore_merges)
    values = Config(metadata, "the file's metadata")
    size = len(metadata["tokenizer.ggml.tokens"])
    ids = {name: _token_id(values, name, size) for name in ("bos", "eos", "eot", "eom", "unknown", "padding")}
    add_bos = values.flag("tokenizer.ggml.add_bos_token", default=row.add_bos)
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
        chat_templates=_chat_templates(values, metadata),
    )


def build_backend(
    metadata: Mapping[str, Any], pre_tokenizer: pre_tokenizers.PreTokenizer | None, ignore_merges: bool
) -> tokenizers.Tokenizer:
    """A `tokenizers` object with the vocabulary and merges of GGUF metadata and the given splitter.

    Either key says that a vocabulary is of characters, of which llama.cpp takes a run of newlines that is a token
    without merging.
    """
    falls_back = BYTE_FALLBACK in (metadata["tokenizer.ggml.model"], metadata.get("tokenizer.ggml.pre"))
    tokens = _list(metadata, "tokenizer.ggml.tokens", str)
    types = _list(metadata, "tokenizer.ggml.token_type", int) or [NORMAL] * len(tokens)
    if len(types) != len(tokens):
        raise BadInput(f"tokenizer.ggml.token_type has {len(types)} entries, expected {len(tokens)} as in tokens")
    if repeated := [text for text, count in Counter(tokens).items() if count > 1]:
        raise BadInput(f"tokenizer.ggml.tokens holds {repeated[0]!r} more than once; each token needs its own text")
    # Unused ids and empty texts never come out of a text and decode to nothing: they stay out.
    used = [
        (id, text, kind) for id, (text, kind) in enumerate(zip(tokens, types, strict=True)) if text and kind != UNUSED
    ]
    merges = [_split_merge(merge) for merge in _list(metadata, "tokenizer.ggml.merges", str)]
    with refused("tokenizer.ggml.merges does not fit tokenizer.ggml.tokens"):
        vocabulary = {text: id for id, text, _ in used}
        model = models.BPE(vocabulary, merges, ignore_merges=ignore_merges, byte_fallback=falls_back)
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizer
    backend.decoder = decoders.ByteLevel()
    if falls_back:
        backend.normalizer = normalizers.Replace(" ", SPACE)
        backend.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    backend.add_tokens(
        [
            AddedToken(text, normalized=False, special=kind in (UNKNOWN, CONTROL) or looks_like_control(text))
            for _, text, kind in used
            if kind in (UNKNOWN, CONTROL, USER_DEFINED) or (falls_back and not text.strip("\n"))
        ]
    )
    return backend


def _split_merge(merge: str) -> tuple[str, str]:
    # As llama.cpp does: the first piece has at least one character, so a leading space belongs to it.
    left, _, right = merge[1:].partition(" ")
    return merge[:1] + left, right


def _pre_tokenizer_of(metadata: Mapping[str, Any]) -> PreTokenizer:
    kind = metadata.get("tokenizer.ggml.model")
    if kind not in (BYTE_LEVEL, BYTE_FALLBACK):
        raise BadInput(
            f"tokenizer.ggml.model is {kind!r}; moecast reads BPE ({BYTE_LEVEL!r} or {BYTE_FALLBACK!r}) only"
        )
    for key in ("tokenizer.ggml.tokens", "tokenizer.ggml.merges"):
        if key not in metadata:
            raise BadInput(f"{key} is missing; moecast needs a GGUF file with its own vocabulary")
    name = str(metadata.get("tokenizer.ggml.pre") or "default")
    if kind == BYTE_FALLBACK:
        name = kind  # whatever a file says
    row = find_pre_tokenizer(name)
    if row is None:
        known = ", ".join(name for row in PRE_TOKENIZERS for name in row.names)
        raise BadInput(f"tokenizer.ggml.pre is {name!r}, a pre-tokenizer that moecast does not know; it knows {known}")
    return row


def _list(metadata: Mapping[str, Any], key: str, kind: type[T]) -> list[T]:
    """An array of one kind of values; empty where the key is missing."""
    values = metadata.get(key, [])
    if not isinstance(values, list) or not all(type(value) is kind for value in values):
        raise BadInput(f"{key} is no array of {_KINDS[kind]}: convert the model again")
    return values


def _token_id(values: Config, name: str, size: int) -> int | None:
    """The id that a key names; those outside the vocabulary mean, as in llama.cpp, that there is none."""
    key = f"tokenizer.ggml.{name}_token_id"
    id = values.get(key)
    if id is not None and type(id) is not int:
        raise BadInput(f"{key} is {id!r}, expected a whole number: convert the model again")
    return id if id is not None and 0 <= id < size else None


def _ends_by_text(backend: tokenizers.Tokenizer) -> frozenset[int]:
    added = backend.get_added_tokens_decoder()
    return frozenset(id for id, token in added.items() if token.content in END_OF_GENERATION_TEXTS)


def _chat_templates(values: Config, keys: Iterable[str]) -> dict[str, str]:
    prefix = f"{CHAT_TEMPLATE}."
    named = {key.removeprefix(prefix): values.text(key) for key in keys if key.startswith(prefix)}
    return named | ({"default": values.text(CHAT_TEMPLATE)} if CHAT_TEMPLATE in values else {})
