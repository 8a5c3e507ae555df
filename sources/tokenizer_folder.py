"""Reads the tokenizer files of a checkpoint folder, and settles which file decides what.

Vocabulary and splitter come from tokenizer.json, or from a tiktoken file and the module that it is read with. For the
special ids the tokenizer's own files come first, then generation_config.json, and config.json only fills gaps:
re-exported checkpoints carry wrong ids there.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers

from ..archs.config import Config
from ..archs.pretokenizers import splitter_of_code
from ..documents import is_file, parse_json, read_bytes, read_json
from ..errors import BadInput
from .chat_templates import ChatTemplates, read_chat_templates
from .control_tokens import looks_like_control
from .tokenizer import Tokenizer, refused
from .tokenizer_tiktoken import read_tiktoken

_TIKTOKEN = "tiktoken.model"
_OTHER_FORMATS = ("tokenizer.model", "tekken.json", _TIKTOKEN, "vocab.json")


def read_tokenizer_folder(path: str | os.PathLike[str]) -> Tokenizer:
    """The tokenizer of a checkpoint folder. Raises BadInput when there is no usable tokenizer.json."""
    folder = Path(path)
    files = _Files.read(folder)
    splits = _splits_of_code(files.tokenizer_config)
    if splits and is_file(folder / _TIKTOKEN) and not is_file(folder / "tokenizer.json"):
        path, prefix = folder / _TIKTOKEN, None
        backend = read_tiktoken(path, splits, files.tokenizer_config)
    else:
        path = _find_tokenizer_json(folder)
        parsed, backend = _parse(path)
        prefix = _template_prefix(parsed, path)
    _mark_control_tokens(backend)
    backend.no_truncation()
    backend.no_padding()
    vocabulary_size = max(backend.get_vocab().values(), default=-1) + 1
    bos = prefix[0] if prefix else files.token_id("bos", backend)
    eos = files.token_id("eos", backend)
    add_bos = bool(prefix) if prefix is not None else files.tokenizer_config.flag("add_bos_token", default=False)
    if add_bos and bos is None:
        raise BadInput(f"{folder / 'tokenizer_config.json'} sets add_bos_token, but its bos_token is no token")
    return Tokenizer(
        backend=backend,
        vocabulary_size=vocabulary_size,
        bos=bos,
        eos=eos,
        unknown=files.token_id("unk", backend),
        padding=files.token_id("pad", backend),
        add_bos=add_bos,
        end_of_generation=frozenset([*files.generation_ends(backend), *([] if eos is None else [eos])]),
        chat_templates=files.chat_templates.sources,
        origin=str(path),
        losses=files.chat_templates.losses,
    )


def _splits_of_code(settings: Config) -> tuple[str, ...] | None:
    """The expressions of the module that a checkpoint brings along to read its tokenizer, where that is known."""
    named = settings.section("auto_map").get("AutoTokenizer")
    name = named[0] if isinstance(named, list) and named else named
    return splitter_of_code(name.partition(".")[0]) if isinstance(name, str) else None


def _find_tokenizer_json(folder: Path) -> Path:
    file = folder / "tokenizer.json"
    if is_file(file):
        return file
    other = next((name for name in _OTHER_FORMATS if is_file(folder / name)), None)
    remedy = (
        f"only {other}: open the folder with transformers.AutoTokenizer and save_pretrained() it once"
        if other
        else "copy tokenizer.json and tokenizer_config.json there from the model's repository"
    )
    raise BadInput(f"{folder} has no tokenizer.json, {remedy}")


def _parse(path: Path) -> tuple[Mapping[str, Any], tokenizers.Tokenizer]:
    """What the file says, and the tokenizer that the library makes of it."""
    content = read_bytes(path)
    parsed = parse_json(content, str(path))
    model = parsed.get("model") if isinstance(parsed, dict) else None
    if isinstance(model, dict) and model.get("continuing_subword_prefix"):  # the library would print what it trips over
        raise BadInput(f"{path} sets continuing_subword_prefix, which no byte-level BPE has: is it this model's?")
    with refused(f"{path} is not a tokenizer file"):
        return parsed, tokenizers.Tokenizer.from_str(content.decode("utf-8-sig"))


def _mark_control_tokens(backend: tokenizers.Tokenizer) -> None:
    """Some checkpoints leave their control tokens unmarked; llama.cpp's converter and engine go by the text."""
    for token in backend.get_added_tokens_decoder().values():
        if not token.special and looks_like_control(token.content):
            token.special = True
            backend.add_special_tokens([token])


def _template_prefix(tokenizer_json: Mapping[str, Any], path: Path) -> list[int] | None:
    """The ids that tokenizer.json's template puts before a text; None when it has no template."""
    processor = tokenizer_json.get("post_processor") or {}
    for step in processor.get("processors", [processor]):
        if step.get("type") == "TemplateProcessing":
            ids: list[int] = []
            for part in step["single"]:
                if "Sequence" in part:
                    break
                ids += step["special_tokens"][part["SpecialToken"]["id"]]["ids"]
            if len(ids) > 1:
                raise BadInput(f"{path} puts {len(ids)} tokens before a text; at most 1 works")
            return ids
    return None


@dataclass(frozen=True)
class _Files:
    """The small JSON files beside tokenizer.json; an absent file is empty."""

    tokenizer_config: Config
    special_tokens_map: Config
    generation_config: Config
    config: Config
    chat_templates: ChatTemplates

    @classmethod
    def read(cls, folder: Path) -> _Files:
        def values(name: str) -> Config:
            path = folder / name
            return Config(read_json(path) if is_file(path) else {}, str(path))

        tokenizer_config = values("tokenizer_config.json")
        return cls(
            tokenizer_config=tokenizer_config,
            special_tokens_map=values("special_tokens_map.json"),
            generation_config=values("generation_config.json"),
            config=values("config.json"),
            chat_templates=read_chat_templates(folder, tokenizer_config.get("chat_template")),
        )

    def token_id(self, name: str, backend: tokenizers.Tokenizer) -> int | None:
        """The id of the bos, eos, unk or pad token: the first file that names a token of the vocabulary."""
        for names in (self.tokenizer_config, self.special_tokens_map):
            token = names.get(f"{name}_token")
            text = token.get("content") if isinstance(token, dict) else token
            if isinstance(text, str) and (id := backend.token_to_id(text)) is not None:
                return id
        for ids in (self.generation_config, self.config):
            if known := _known_ids(ids.get(f"{name}_token_id"), backend):
                return known[0]
        return None

    def generation_ends(self, backend: tokenizers.Tokenizer) -> list[int]:
        return _known_ids(self.generation_config.get("eos_token_id"), backend)


def _known_ids(value: object, backend: tokenizers.Tokenizer) -> list[int]:
    values = value if isinstance(value, list) else [value]
    return [id for id in values if type(id) is int and 0 <= id < 2**32 and backend.id_to_token(id) is not None]
