"""One tokenizer for both kinds of model: read from a checkpoint folder, or rebuilt from the metadata of a GGUF file."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import tokenizers

from ..errors import BadInput


@contextmanager
def refused(what: str) -> Iterator[None]:
    """Turns what the tokenizers library raises into BadInput: bare Exception, and panics, which are not even that."""
    try:
        yield
    except (KeyboardInterrupt, BadInput):
        raise
    except BaseException as error:
        raise BadInput(f"{what}: {error}") from None


@dataclass(frozen=True)
class Tokenizer:
    """Text to token ids and back, with the ids that mean something to a model.

    `encode` gives the ids that llama.cpp gives: BOS in front iff `add_bos`, never EOS, and the text of a control token
    inside the user's text stays text unless `parse_special` asks otherwise.
    """

    backend: tokenizers.Tokenizer = field(repr=False, compare=False)
    vocabulary_size: int
    """Highest id + 1; the model's embedding may have more rows."""
    bos: int | None
    eos: int | None
    unknown: int | None
    padding: int | None
    add_bos: bool
    end_of_generation: frozenset[int]
    """Every id that ends generation, `eos` among them."""
    chat_templates: Mapping[str, str] = field(repr=False)
    """Jinja sources by name; `chat_template` is the one named "default"."""
    origin: str = field(default="the tokenizer", compare=False)
    """Where it was read, for messages."""
    losses: tuple[str, ...] = ()
    """What the files hold and this tokenizer does not, a line each."""

    @property
    def chat_template(self) -> str | None:
        """The Jinja source of the default chat template."""
        return self.chat_templates.get("default")

    @cached_property
    def definition(self) -> Mapping[str, Any]:
        """tokenizer.json, parsed, without its lists of tokens; what merges stands there as "left right"."""
        parsed: dict[str, Any] = json.loads(self.backend.to_str())
        del parsed["added_tokens"], parsed["model"]["vocab"]
        if "merges" in parsed["model"]:
            parsed["model"]["merges"] = [f"{left} {right}" for left, right in parsed["model"]["merges"]]
        return parsed

    def encode(self, text: str, add_special: bool = True, parse_special: bool = False) -> list[int]:
        """Token ids of `text`; BOS first when `add_special` and the model wants one."""
        self.backend.encode_special_tokens = not parse_special
        ids = self.backend.encode(text, add_special_tokens=False).ids
        return [self.bos, *ids] if add_special and self.add_bos and self.bos is not None else ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of these ids, control tokens included; bytes that are no UTF-8 become U+FFFD."""
        return self.backend.decode(ids, skip_special_tokens=False)
