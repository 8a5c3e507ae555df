"""Fingerprints of conversions: all that decides an output's bytes, in words and digests that can be compared."""

from __future__ import annotations

import ast
import hashlib
import json
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from functools import cache
from pathlib import Path
from typing import Any

from torch import Tensor

from ...quant.formats import native
from ...quant.planning.plan import Plan
from ...sources.model import Model

# The code that decides bytes. All else may change while a conversion is interrupted: commands, reports, the Hub, and
# whatever chooses options, types and texts, because the choice itself stands in the fingerprint. A new file in these
# folders counts until it is listed as neutral.
_DECIDING = (
    "archs/*.py",  # which stored tensors a weight is made of, and what is computed with it
    "archs/graph/*.py",
    "sources/*.py",  # where stored tensors lie, and which numbers their bytes are
    "quant/formats/*.py",
    "quant/rounding/*.py",
    "quant/planning/exact.py",
    "quant/planning/padding.py",
    "quant/planning/plan.py",  # where a tensor lies in a file
    "quant/planning/onnx_*.py",
    "runner/*.py",  # what statistics and importance are computed from, and what is measured of a plan
    "runner/blocks/*.py",
    "runner/measure/*.py",
    "convert/calibrate.py",
    "convert/encode.py",
    "convert/encoders.py",
    "convert/findings.py",  # in what form they are saved
    "convert/onepass.py",
    "convert/roundings.py",
    "convert/writer.py",
    "convert/gguf/*.py",
    "convert/onnx/*.py",
    "convert/plans/allocate.py",  # what the measurements that are kept mean
    "convert/resume/states.py",
)
_NEUTRAL = (
    "archs/pretokenizers.py",  # the metadata and the tokens that come of these are in the fingerprint
    "convert/gguf/tokenizer.py",
    "sources/control_tokens.py",
    "sources/tokenizer*.py",
    "sources/locate.py",
    "runner/bandwidth.py",
    "runner/engines.py",
    "runner/generate.py",
    "runner/memory.py",
    "convert/onnx/prepack.py",
)
_DIGITS = 12
_BLOCK = 64 << 10  # bytes at either end of a file
_TIME_STEP = 2_000_000_000  # nanoseconds; some disks round times of files to two seconds
_VERSION = "moecast.version"  # a file says which version began it


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
        **source_identity(model, metadata),
        "quant": plan.recipe.name,
        **(others or {}),
        "tensor list": digest([types, split_max_bytes, activations]),
        "the metadata": digest({key: value for key, value in metadata.items() if key != _VERSION}),
        "the code that decides bytes": code_digest(),
    }


def measurement_fingerprint(model: Model, facts: Mapping[str, str]) -> dict[str, str]:
    """The fingerprint of what is measured of a model; `facts` are all else that changes it."""
    return {**source_identity(model, {}), **facts, "the code that decides bytes": code_digest()}


def source_identity(model: Model, metadata: Mapping[str, Any]) -> dict[str, str]:
    """The commit of a Hub repository; otherwise all files, each by what stays when it is moved or copied with its time,
    and by its path with what no program can set back: when the system saw it change, or on Windows begin."""
    repository, commit = (metadata.get(f"moecast.source.{key}") for key in ("repository", "revision"))
    if repository:
        return {"source": f"{repository} at {commit}"}
    paths = {Path(tensor.file) for tensor in model.tensors}
    if model.path.is_dir():
        paths.add(model.path / "config.json")
    files = {path: path.stat() for path in sorted(paths)}
    facts = {"source": f"{sum(status.st_size for status in files.values())} bytes in {len(files)} files"}
    for path, status in files.items():
        time = status.st_mtime_ns // _TIME_STEP * _TIME_STEP
        facts[path.name] = f"{status.st_size} bytes of {_moment(time)} ({_ends_of(path, status.st_size)})"
        facts[str(path.resolve())] = f"changed at {_moment(status.st_ctime_ns)}"
    return facts


def differences(found: Mapping[str, str], now: Mapping[str, str]) -> dict[str, str]:
    """What differs between two fingerprints, by name, in words; a file's path only where both have it."""
    return {
        name: f"{name} was {found.get(name)}, is now {now.get(name)}"
        for name in dict.fromkeys((*now, *found))
        if found.get(name) != now.get(name) and (not Path(name).is_absolute() or (name in found and name in now))
    }


def facts_of_file(file: str, source: Mapping[str, str]) -> set[str]:
    """The names of those facts of a source's identity that say whether one of its files is the same."""
    return {Path(file).name, str(Path(file).resolve())} & source.keys() or {"source"}


def _moment(nanoseconds: int) -> str:
    seconds, rest = divmod(nanoseconds, 1_000_000_000)
    moment = datetime(1970, 1, 1, tzinfo=UTC) + timedelta(seconds=seconds)
    return f"{moment:%Y-%m-%d %H:%M:%S}" + (f".{rest:09}" if rest else "")


def _ends_of(path: Path, size: int) -> str:
    """A short digest of the first and the last block of a file."""
    with path.open("rb") as file:
        ends = hashlib.sha256(file.read(_BLOCK))
        file.seek(max(size - _BLOCK, 0))
        ends.update(file.read(_BLOCK))
    return ends.hexdigest()[:_DIGITS]


def file_identity(path: Path) -> str:
    """A file by its content."""
    return f"{path.name} ({hashlib.sha256(path.read_bytes()).hexdigest()[:_DIGITS]})"


def text_identity(text: str | Path | None, tokens: Tensor | None) -> str:
    """What is used of a text: its name, and the ids [chunks, context]."""
    if text is None or tokens is None:
        return "none"
    chunks, context = tokens.shape
    return f"{chunks} chunks of {context} of {Path(text).name} ({digest(tokens.tolist())})"


@cache
def code_digest(root: Path = Path(__file__).parents[2]) -> str:
    """What the code that decides bytes does, kernels included: comments, docstrings and layout do not count."""
    neutral = {path for pattern in _NEUTRAL for path in root.glob(pattern)}
    total = hashlib.sha256(native.sources().encode())
    for path in sorted({path for pattern in _DECIDING for path in root.glob(pattern)} - neutral):
        code = _WithoutDocstrings().visit(ast.parse(path.read_bytes()))
        total.update(f"{path.relative_to(root).as_posix()}: {ast.dump(code)}\n".encode())
    return total.hexdigest()[:_DIGITS]


class _WithoutDocstrings(ast.NodeTransformer):
    """Removes strings that stand alone."""

    def visit_Expr(self, node: ast.Expr) -> ast.Expr | None:
        return None if isinstance(node.value, ast.Constant) and isinstance(node.value.value, str) else node


def digest(value: object) -> str:
    """A short digest of anything that JSON can hold."""
    return hashlib.sha256(json.dumps(value, default=str).encode()).hexdigest()[:_DIGITS]
