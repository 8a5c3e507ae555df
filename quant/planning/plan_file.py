"""Plans as files: types and shapes of all tensors by name, to be read by people, edited, shared and used again.

    {"version": 1, "moecast": "0.1.0", "name": "3.42bpw", "bytes": 96000000000, "bits_per_weight": 3.42,
     "bytes_per_token": 4.1e9, "expected_kld": 0.021, "problems": [], "tensors": [{"name": "token_embd.weight",
     "type": "Q6_K", "shape": [200064, 3072], "bytes": 504161280}, ...]}

Reading needs version, name and, of each tensor, name, type and shape; the rest is what the plan amounts to. Shapes are
slowest dimension first; those of a padded plan are larger than the model's.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ... import __version__
from ...archs.config import Config
from ...archs.graph import Graph
from ...archs.weights import Role
from ...documents import read_json
from ...errors import BadInput
from ...files import write_whole
from ...paths import is_plain_name
from ..formats.table import FORMATS, Format, format_named
from .allocation import allowed_types, bytes_per_token, plan_with
from .padding import padded_forms
from .plan import Plan

VERSION = 1


@dataclass(frozen=True)
class StoredTypes:
    """What a plan file, or a GGUF file, says of every tensor: name -> type and shape."""

    origin: str
    name: str
    tensors: Mapping[str, tuple[str, tuple[int, ...]]]


def plan_as_json(plan: Plan) -> dict[str, Any]:
    """A plan as the numbers and strings of a plan file."""
    return {
        "version": VERSION,
        "moecast": __version__,
        "name": plan.recipe.name,
        "bytes": plan.bytes,
        "bits_per_weight": plan.bits_per_weight,
        "bytes_per_token": bytes_per_token(plan),
        "expected_kld": plan.expected_kld,
        "problems": list(plan.problems),
        "tensors": [
            {"name": t.weight.name, "type": t.type.name, "shape": list(t.weight.shape), "bytes": plan.bytes_of(t)}
            for t in plan.tensors
        ],
    }


def write_plan_file(plan: Plan, path: Path) -> None:
    """Raises BadInput when the file cannot be written; then there is none."""
    if not path.name:
        raise BadInput(f"--output is {str(path)!r}, expected the name of a file")
    try:
        write_whole(path, json.dumps(plan_as_json(plan), indent=1) + "\n")
    except OSError as error:
        raise BadInput(f"{path} cannot be written: {error.strerror}") from None


def read_plan_file(path: Path) -> StoredTypes:
    """Raises BadInput when the file cannot be read, is no plan, or of a version that is not known."""
    content = Config(read_json(path), str(path))
    version = content.get("version")
    if version != VERSION:
        raise BadInput(f"{path}: version is {version!r}, expected {VERSION}: is it a plan of `moecast plan -o`?")
    name = content.text("name")
    if not is_plain_name(name) or "/" in name:  # a part of the output's name
        raise BadInput(f"{path}: name is {name!r}, expected plain words")
    return StoredTypes(path.as_posix(), name, dict(_entries(content, path)))


def _entries(content: Config, path: Path) -> Iterator[tuple[str, tuple[str, tuple[int, ...]]]]:
    """Name, type and shape of every tensor."""
    entries, seen = content.get("tensors"), set()
    if not isinstance(entries, list) or not entries:
        raise BadInput(f"{path}: tensors is {entries!r}, expected a list of tensors")
    for number, values in enumerate(entries):
        entry = Config(values if isinstance(values, Mapping) else {}, f"{path}: tensors[{number}]")
        name, shape = entry.text("name"), entry.get("shape")
        if not isinstance(shape, list) or not all(type(size) is int and size > 0 for size in shape):
            raise BadInput(f"{entry.origin}: shape is {shape!r}, expected whole numbers, slowest dimension first")
        if name in seen:
            raise BadInput(f"{path}: {name} is there twice: remove one of them")
        seen.add(name)
        yield name, (entry.text("type"), tuple(shape))


def plan_like(graph: Graph, stored: StoredTypes) -> Plan:
    """The plan for a model with the types of a file, padded and with drafting blocks if the file is.

    Raises BadInput where the file lacks a tensor, has another shape or a type that cannot be.
    """
    if not any(w.name in stored.tensors for w in replace(graph, layers=()).weights() if w.layer is not None):
        graph = replace(graph, predictions=())
    notes, own = graph.notes, graph
    graph = next((form for form in _forms(own) if _has_shapes_of(form, stored)), own)
    if graph is not own:
        notes = (*notes, f"padded rows with zeros, as {stored.origin} has them, which changes no result")
    types = {weight.name: _type_of(weight.name, weight.shape, stored) for weight in graph.weights()}
    for weight in graph.weights():
        allowed = allowed_types(weight)
        if len(allowed) == 1 and (weight.role.keep_f32 or len(weight.shape) == 1 or weight.role is Role.HASH_TABLE):
            types[weight.name] = allowed[0]
        types[weight.name].row_bytes(weight.columns)
    return replace(plan_with(graph, types, stored.name), notes=notes)


def _forms(graph: Graph) -> Iterator[Graph]:
    """The graph as it is and with rows padded, to whatever blocks."""
    for size in sorted({format.block_size for format in FORMATS.values()}):
        yield from padded_forms(graph, size)


def _has_shapes_of(graph: Graph, stored: StoredTypes) -> bool:
    """Whether no tensor has another shape; one that is missing has none."""
    return all(stored.tensors.get(w.name, ("", w.shape))[1] == w.shape for w in graph.weights())


def _type_of(name: str, shape: tuple[int, ...], stored: StoredTypes) -> Format:
    if name not in stored.tensors:
        raise BadInput(f"{stored.origin} says nothing of {name}: it was made for another model")
    type, planned = stored.tensors[name]
    if planned != shape:
        raise BadInput(f"{stored.origin}: {name} has shape {list(planned)}, expected {list(shape)}: another model's?")
    try:
        return format_named(type)
    except BadInput as error:
        raise BadInput(f"{stored.origin}: {name}: {error}") from None
