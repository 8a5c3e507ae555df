"""The model card of a checkpoint: what the front matter of its README.md says about license, languages and origins.

A card tells people about a model and decides nothing. So whatever is wrong with one is noted, and never stops anybody.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ..documents import is_file, read_text
from ..errors import BadInput

CARD = "README.md"
LARGEST_CARD = 1 << 24  # bytes
_LARGEST_FRONT_MATTER = 1 << 16  # characters, which take a second
_FENCE = "---"
_NOTHING: tuple[object, ...] = ("", "null", "~", [])

_LISTS = ("language", "languages", "license", "tags", "pipeline_tag")
_ORIGINS = ("base_model", "base_models", "base_model_sources", "datasets", "dataset", "dataset_sources")
_TEXTS = (
    "author", "basename", "description", "doi", "finetune", "license_link", "license_name", "model_author",
    "model_basename", "model_creator", "model_description", "model_doi", "model_finetune", "model_organization",
    "model_repo_url", "model_size_label", "model_type", "model_url", "model_uuid", "model_version", "organization",
    "repo_url", "size_label", "url", "uuid", "version",
)  # fmt: skip
"""The keys that gguf-py makes something of: a text or a list of texts, of origins also their fields, and a text."""


@dataclass(frozen=True)
class ModelCard:
    """What a card says under the keys that converters know, and what is wrong with it, a line each."""

    values: Mapping[str, Any]
    notes: tuple[str, ...] = ()


def read_model_card(folder: Path) -> ModelCard:
    """The card of a folder; an empty one where it has none."""
    path = folder / CARD
    try:
        found = _parsed(_front_matter(read_text(path))) if is_file(path) else {}
    except (BadInput, yaml.YAMLError, RecursionError) as error:
        return ModelCard({}, (f"{CARD} says nothing of the model, its front matter cannot be read: {_reason(error)}",))
    known = {key: found[key] for key in (*_LISTS, *_ORIGINS, *_TEXTS) if found.get(key, "") not in _NOTHING}
    kept = {key: _kept(key, value) for key, value in known.items()}
    notes = [f"{CARD}: what is no text under {key} is left out" for key in known if kept[key] != known[key]]
    return ModelCard({key: value for key, value in kept.items() if value}, tuple(notes))


def _reason(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    if isinstance(error, yaml.MarkedYAMLError) and error.problem and error.problem_mark:
        return f"{error.problem} in line {error.problem_mark.line + 2}"
    return " ".join(str(error).split())


def _front_matter(text: str) -> str:
    """The lines between two fences at the beginning; none where there are no such fences."""
    first, *lines = text.split("\n")
    if first.rstrip() != _FENCE:
        return ""
    ends = [number for number, line in enumerate(lines) if line.rstrip() == _FENCE]
    matter = "\n".join(lines[: ends[0]]) if ends else ""
    if len(matter) > _LARGEST_FRONT_MATTER:
        raise BadInput(f"it has more than {_LARGEST_FRONT_MATTER} characters")
    return matter.replace("\t", "  ")  # as gguf-py does: some cards are indented with tabs


def _parsed(front_matter: str) -> Mapping[str, Any]:
    """Texts, lists and mappings alone: "no" stays a language, 1.0 a version, and nothing stands for anything else."""
    if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(front_matter, yaml.BaseLoader)):
        raise BadInput("it has references, which multiply what they stand for")
    found = yaml.load(front_matter, yaml.BaseLoader)
    if found is None or found == "":
        return {}
    if not isinstance(found, dict):
        raise BadInput("it is no list of keys")
    return found


def _kept(key: str, value: Any) -> Any:
    """What of a value is as it should be."""
    if isinstance(value, str):
        return value
    if key in _TEXTS or not isinstance(value, list):
        return None
    return [part for part in value if _is_text(part) or (key in _ORIGINS and _is_record(part))]


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and value != ""


def _is_record(value: Any) -> bool:
    return isinstance(value, dict) and all(map(_is_text, (*value.keys(), *value.values())))
