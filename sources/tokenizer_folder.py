"""Reads the tokenizer files of a checkpoint folder, and settles which file decides what.

Vocabulary and splitter come from tokenizer.json. For the special ids the tokenizer's own files come first, then
generation_config.json, and config.json only fills gaps: re-exported checkpoints carry wrong ids there.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers

from ..errors import BadInput
from .control_tokens import looks_like_control
from .tokenizer import Tokenizer

_OTHER_FORMATS = ("tokenizer.model", "tekken.json", "tiktoken.model", "vocab.json")


def read_tokenizer_folder(path: str | os.PathLike[str]) -> Tokenizer:
    """The tokenizer of a checkpoint folder. Raises BadInput when there is no usable tokenizer.json."""
    folder = Path(path)
    text = _tokenizer_json(folder)
    try:
        backend = tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # the library raises bare Exception
        raise BadInput(f"{folder / 'tokenizer.json'} is not a tokenizer file: {error}") from error
    _mark_control_tokens(backend)
    backend.no_truncation()
    backend.no_padding()
    files = _Files.read(folder)
    vocabulary_size = max(backend.get_vocab().values(), default=-1) + 1
    prefix = _template_prefix(json.loads(text), folder)
    bos = prefix[0] if prefix else files.token_id("bos", backend)
    eos = files.token_id("eos", backend)
    add_bos = bool(prefix) if prefix is not None else bool(files.tokenizer_config.get("add_bos_token", False))
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
        chat_templates=files.chat_templates,
    )


def _tokenizer_json(folder: Path) -> str:
    file = folder / "tokenizer.json"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    other = next((name for name in _OTHER_FORMATS if (folder / name).is_file()), None)
    remedy = (
        f"only {other}: open the folder with transformers.AutoTokenizer and save_pretrained() it once"
        if other
        else "copy tokenizer.json and tokenizer_config.json there from the model's repository"
    )
    raise BadInput(f"{folder} has no tokenizer.json, {remedy}")


def _mark_control_tokens(backend: tokenizers.Tokenizer) -> None:
    """Some checkpoints leave their control tokens unmarked; llama.cpp's converter and engine go by the text."""
    for token in backend.get_added_tokens_decoder().values():
        if not token.special and looks_like_control(token.content):
            token.special = True
            backend.add_special_tokens([token])


def _template_prefix(tokenizer_json: Mapping[str, Any], folder: Path) -> list[int] | None:
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
                raise BadInput(f"{folder / 'tokenizer.json'} puts {len(ids)} tokens before a text; at most 1 works")
            return ids
    return None


@dataclass(frozen=True)
class _Files:
    """The small JSON files beside tokenizer.json; an absent file is empty."""

    tokenizer_config: dict[str, Any]
    special_tokens_map: dict[str, Any]
    generation_config: dict[str, Any]
    config: dict[str, Any]
    chat_templates: dict[str, str]

    @classmethod
    def read(cls, folder: Path) -> _Files:
        tokenizer_config = _read_json(folder / "tokenizer_config.json")
        return cls(
            tokenizer_config=tokenizer_config,
            special_tokens_map=_read_json(folder / "special_tokens_map.json"),
            generation_config=_read_json(folder / "generation_config.json"),
            config=_read_json(folder / "config.json"),
            chat_templates=_chat_templates(folder, tokenizer_config),
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
    return [id for id in values if isinstance(id, int) and id >= 0 and backend.id_to_token(id) is not None]


def _chat_templates(folder: Path, tokenizer_config: Mapping[str, Any]) -> dict[str, str]:
    jinja = folder / "chat_template.jinja"
    if jinja.is_file():
        return {"default": jinja.read_text(encoding="utf-8")}
    template = _read_json(folder / "chat_template.json").get("chat_template") or tokenizer_config.get("chat_template")
    if isinstance(template, list):
        return {entry["name"]: entry["template"] for entry in template}
    return {"default": template} if isinstance(template, str) else {}


def _read_json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise BadInput(f"{file} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise BadInput(f"{file} must hold a JSON object, not {type(content).__name__}")
    return content
