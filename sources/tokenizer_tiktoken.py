"""Reads a tiktoken file: bytes of tokens, whose ranks are their ids; byte-level letters and merges follow."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers

from ..archs.config import Config
from ..documents import read_bytes
from ..errors import BadInput
from .tokenizer import refused

Ranks = Mapping[bytes, int]

_PRINTED = (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))  # bytes that stand for themselves
_LETTERS = {byte: chr(byte) for byte in _PRINTED} | {
    byte: chr(0x100 + place) for place, byte in enumerate(sorted({*range(0x100)} - {*_PRINTED}))
}


def read_tiktoken(path: Path, splits: tuple[str, ...], settings: Config) -> tokenizers.Tokenizer:
    """The same tokenizer as byte-level BPE.

    Args:
        splits: expressions that split a text, one after another.
        settings: tokenizer_config.json, which has the tokens that come beside those of the file.
    """
    ranks = _read_ranks(path)
    added = dict(_added_tokens(settings))
    vocabulary = {_text(token): rank for token, rank in ranks.items()}
    merges = [(_text(left), _text(right)) for left, right in _merges(ranks)]
    with refused(f"{path} is not a tiktoken file"):
        model = models.BPE(vocabulary | {token.content: id for id, token in added.items()}, merges, ignore_merges=True)
    backend = tokenizers.Tokenizer(model)
    steps = [pre_tokenizers.Split(Regex(expression), "isolated") for expression in splits]
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [*steps, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    backend.decoder = decoders.ByteLevel()
    backend.add_tokens([*added.values()])
    return backend


def _read_ranks(path: Path) -> dict[bytes, int]:
    """A line each: a token in base64, and its rank."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(read_bytes(path).splitlines(), 1):
        if not line:
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error):
            raise BadInput(f"{path}: line {number} is {line[:40]!r}, expected a token in base64 and its rank") from None
    if len({*ranks.values()}) != len(ranks) or not all(bytes([byte]) in ranks for byte in range(0x100)):
        raise BadInput(f"{path} lacks single bytes, or gives two tokens one rank: fetch it again")
    return ranks


def _added_tokens(settings: Config) -> Iterator[tuple[int, AddedToken]]:
    decoder = settings.get("added_tokens_decoder") or {}
    for id, token in decoder.items() if isinstance(decoder, dict) else ():
        content = token.get("content") if isinstance(token, dict) else None
        if not str(id).isdigit() or not isinstance(content, str) or not content:
            raise BadInput(f"{settings.origin}: added_tokens_decoder holds {id!r}, expected the id and text of a token")
        yield int(id), AddedToken(content, normalized=False, special=bool(token.get("special", True)))


def _text(token: bytes) -> str:
    return "".join(_LETTERS[byte] for byte in token)


def _merges(ranks: Ranks) -> Iterator[tuple[bytes, bytes]]:
    """What merging by ranks joins last in each token, in their order; none where it never comes to that token."""
    for token, rank in sorted(ranks.items(), key=lambda entry: entry[1]):
        parts = [token[place : place + 1] for place in range(len(token))]
        while len(parts) > 2:
            joined = [ranks.get(left + right, rank) for left, right in pairwise(parts)]
            place = joined.index(min(joined))
            if joined[place] >= rank:
                break
            parts[place : place + 2] = [parts[place] + parts[place + 1]]
        if len(parts) == 2:
            yield parts[0], parts[1]
