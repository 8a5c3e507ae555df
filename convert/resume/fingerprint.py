"""Fingerprints of conversions: all that decides an output's bytes, in words and digests that can be compared."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ... import __version__
from ...quant.planning.plan import Plan
from ...sources.model import Model

_PACKAGES = ("archs", "quant", "sources", "runner", "convert")
_DIGITS = 12


def fingerprint(
    model: Model,
    plan: Plan,
    metadata: Mapping[str, Any],
    others: Mapping[str, str] | None = None,
    split_max_bytes: int | None = None,
    activations: str | None = None,
) -> dict[str, str]:
    """The fingerprint of a conversion, for a `Journal`. `others` are further facts that change bytes."""
    types = [(tensor.weight.name, tensor.type.name, tensor.weight.shape) for tensor in plan.tensors]
    return {
        "source": source_identity(model, metadata),
        "quant": plan.recipe.name,
        **(others or {}),
        "the list of tensors": digest([types, split_max_bytes, activations]),
        "the metadata": digest(metadata),
        "moecast": _program(),
    }


def measurement_fingerprint(model: Model, facts: Mapping[str, str]) -> dict[str, str]:
    """The fingerprint of what is measured of a model; `facts` are all else that changes it."""
    return {"source": source_identity(model, {}), **facts, "moecast": _program()}


def _program() -> str:
    return f"{__version__} ({code_digest()})"


def source_identity(model: Model, metadata: Mapping[str, Any]) -> str:
    """The commit of a Hub repository; otherwise names, sizes and times of change of the files."""
    repository, commit = (metadata.get(f"moecast.source.{key}") for key in ("repository", "revision"))
    if repository:
        return f"{repository} at {commit}"
    paths = {Path(tensor.file) for tensor in model.tensors}
    if model.path.is_dir():
        paths.add(model.path / "config.json")
    files = sorted((path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in paths)
    return f"{sum(size for _, size, _ in files)} bytes in {len(files)} files ({digest(files)})"


def file_identity(path: Path) -> str:
    """A file by its content."""
    return f"{path.name} ({hashlib.sha256(path.read_bytes()).hexdigest()[:_DIGITS]})"


def text_identity(text: str | Path | None, tokens: Tensor | None) -> str:
    """What is used of a text: its name, and the ids [chunks, context]."""
    if text is None or tokens is None:
        return "none"
    chunks, context = tokens.shape
    return f"{chunks} chunks of {context} of {Path(text).name} ({digest(tokens.tolist())})"


def code_digest() -> str:
    """What this program's code is, kernels included."""
    root = Path(__file__).parents[2]
    sources = (path for package in _PACKAGES for path in (root / package).rglob("*"))
    total = hashlib.sha256()
    for path in sorted(path for path in sources if path.suffix in (".py", ".so")):
        total.update(path.read_bytes())
    return total.hexdigest()[:_DIGITS]


def digest(value: object) -> str:
    """A short digest of anything that JSON can hold."""
    return hashlib.sha256(json.dumps(value, default=str).encode()).hexdigest()[:_DIGITS]
