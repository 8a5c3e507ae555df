"""Reads the data of a conversion's report again: what it measured, on what, and what it warned about."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..archs.config import Config
from ..documents import read_json
from ..errors import BadInput
from ..runner.measure.evaluate import Parity
from ..runner.measure.slices import Slice
from .report import VERSION, Provenance


@dataclass(frozen=True)
class StoredReport:
    """What a report says of a file.

    Attributes:
        bytes: of the file, all parts together.
        parity: None where nothing was compared, or a model gave figures that are no numbers. Errors layer by layer and
            the tokenizers' differences are left out.
        unseen: experts that calibration never saw, by layer.
    """

    path: Path
    bytes: int
    recipe: str
    provenance: Provenance
    parity: Parity | None
    unseen: Mapping[int, tuple[int, ...]]
    problems: tuple[str, ...]

    @property
    def basis(self) -> tuple[object, ...] | None:
        """Equal for files that were measured on the same tokens in the same way; None without a measurement."""
        if self.parity is None:
            return None
        texts = sorted(digest for use, (_, digest) in self.provenance.texts.items() if use.startswith("evaluation"))
        return (*texts, self.parity.tokens, self.parity.context, self.parity.chunks, self.parity.compute_dtype)


def read_report(path: Path) -> StoredReport:
    """Raises BadInput when it cannot be read or is no report of a conversion."""
    content = Config(read_json(path), str(path))
    if content.get("version") != VERSION or content.get("kind") != "conversion":
        raise BadInput(f"{path} is no report of a conversion that this moecast knows: convert again, it writes one")
    problems = _texts(content, "problems") + _texts(content.section("parity"), "problems")
    return StoredReport(
        path,
        int(_number(content, "bytes")),
        content.text("recipe"),
        _provenance(content.section("provenance")),
        _parity(content.section("parity")),
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


def _parity(section: Config) -> Parity | None:
    if not all(key in section for key in ("perplexity_reference", "perplexity_candidate", "mean_kld", "kld_999")):
        return None  # null stands for what is no number
    parity = Parity(
        perplexity_reference=_number(section, "perplexity_reference"),
        perplexity_candidate=_number(section, "perplexity_candidate"),
        mean_kld=_number(section, "mean_kld"),
        mean_kld_error=_number(section, "mean_kld_error"),
        kld_999=_number(section, "kld_999"),
        kld_maximum=_number(section, "kld_maximum"),
        top1_agreement=_number(section, "top1_agreement"),
        mean_delta_p=_number(section, "mean_delta_p"),
        rms_delta_p=_number(section, "rms_delta_p"),
        layer_errors=(),
        tokens=section.integer("tokens"),
        context=section.integer("context"),
        chunks=section.integer("chunks"),
        compute_dtype=section.text("compute_dtype"),
        context_length=section.integer("context_length"),
        slices={"category": tuple(_categories(section.section("slices")))},
    )
    if parity.perplexity_reference <= 0:
        raise BadInput(
            f"{section.origin}: perplexity_reference is {parity.perplexity_reference}, expected a positive number"
        )
    return parity


def _categories(slices: Config) -> Iterator[Slice]:
    values = slices.get("category")
    for value in values if isinstance(values, list) else []:
        entry = Config(value if isinstance(value, dict) else {}, f"{slices.origin}: category")
        figures = (_number(entry, key) for key in ("mean_kld", "mean_kld_error", "top1_agreement"))
        yield Slice(entry.text("name"), entry.integer("tokens"), *figures)


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
