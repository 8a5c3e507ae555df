"""Reads the data of a conversion's report again: what it measured, on what, and what it warned about."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..archs.config import Config
from ..documents import read_json
from ..errors import BadInput
from .report import VERSION, Provenance

_FIGURES = (
    "perplexity_reference", "perplexity_candidate", "mean_kld", "mean_kld_error", "kld_999", "top1_agreement",
)  # fmt: skip


@dataclass(frozen=True)
class Measurement:
    """How far a file is from its source; `basis` is equal for files that were measured on the same tokens."""

    mean_kld: float
    mean_kld_error: float
    kld_999: float
    top1_agreement: float
    perplexity_ratio: float
    tokens: int
    context: int
    chunks: int
    basis: tuple[object, ...]


@dataclass(frozen=True)
class StoredReport:
    """What a report says of a file.

    Attributes:
        bytes: of the file, all parts together.
        measurement: None where nothing was compared, or a model gave figures that are no numbers.
        unseen: experts that calibration never saw, by layer.
    """

    path: Path
    bytes: int
    recipe: str
    provenance: Provenance
    measurement: Measurement | None
    unseen: Mapping[int, tuple[int, ...]]
    problems: tuple[str, ...]


def read_report(path: Path) -> StoredReport:
    """Raises BadInput when it cannot be read or is no report of a conversion."""
    content = Config(read_json(path), str(path))
    if content.get("version") != VERSION or content.get("kind") != "conversion":
        raise BadInput(f"{path} is no report of a conversion that this moecast knows: convert again, it writes one")
    provenance = _provenance(content.section("provenance"))
    problems = _texts(content, "problems") + _texts(content.section("parity"), "problems")
    return StoredReport(
        path,
        int(_number(content, "bytes")),
        content.text("recipe"),
        provenance,
        _measurement(content.section("parity"), provenance),
        _unseen(content),
        tuple(dict.fromkeys(problems)),
    )


def _provenance(section: Config) -> Provenance:
    texts = {
        str(use): (str(entry[0]), str(entry[1]))
        for use, entry in _entries(section, "texts").items()
        if isinstance(entry, list) and len(entry) == 2
    }
    return Provenance(
        section.text("source"),
        section.text("revision", default="") or None,
        texts,
        {str(name): str(version) for name, version in _entries(section, "versions").items()},
        section.text("created", default=""),
        section.text("command", default="") or None,
    )


def _measurement(parity: Config, provenance: Provenance) -> Measurement | None:
    if not all(key in parity for key in _FIGURES):  # null stands for what is no number
        return None
    reference, candidate, mean, error, quantile, agreement = (_number(parity, key) for key in _FIGURES)
    if reference <= 0:
        raise BadInput(f"{parity.origin}: perplexity_reference is {reference}, expected a positive number")
    tokens, context, chunks = (parity.integer(key) for key in ("tokens", "context", "chunks"))
    texts = sorted((use, sha256) for use, (_, sha256) in provenance.texts.items() if use.startswith("evaluation"))
    basis = (*texts, tokens, context, chunks, parity.text("compute_dtype"))
    return Measurement(mean, error, quantile, agreement, candidate / reference, tokens, context, chunks, basis)


def _unseen(content: Config) -> dict[int, tuple[int, ...]]:
    layers = content.get("experts")
    found: dict[int, tuple[int, ...]] = {}
    for layer in layers if isinstance(layers, list) else []:
        entry = Config(layer if isinstance(layer, dict) else {}, f"{content.origin}: experts")
        unseen = entry.get("unseen")
        if not isinstance(unseen, list) or not all(type(expert) is int for expert in unseen):
            raise BadInput(f"{entry.origin}: unseen is {unseen!r}, expected a list of experts")
        if unseen:
            found[entry.integer("layer", default=0)] = tuple(unseen)
    return found


def _number(section: Config, key: str) -> float:
    value = section.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise BadInput(f"{section.origin}: {key} is {str(value)[:60]!r}, expected a finite number")
    return float(value)


def _texts(section: Config, key: str) -> list[str]:
    values = section.get(key)
    return [value for value in values if isinstance(value, str)] if isinstance(values, list) else []


def _entries(section: Config, key: str) -> Mapping[str, Any]:
    values = section.get(key)
    return values if isinstance(values, dict) else {}
