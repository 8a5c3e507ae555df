"""A Hugging Face checkpoint folder: config.json and safetensors files, single or sharded with an index."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from ..archs.config import Config
from ..archs.expressions import TensorInfo
from ..errors import BadInput

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_POINTER = b"version https://git-lfs"  # what a repository that was cloned without Git LFS holds
OUTSIDE = re.compile(r"^/|(^|/)\.\.(/|$)|[\\:]")  # of a folder; the last two lead out of one on Windows


def read_config(folder: Path) -> Config:
    """The raw config.json: no library fills in defaults. Raises BadInput when missing or malformed."""
    path = folder / "config.json"
    if not path.is_file():
        raise BadInput(f"{folder}: config.json is missing, expected a Hugging Face checkpoint folder")
    return Config(read_json(path), str(path))


def read_tensors(folder: Path) -> tuple[TensorInfo, ...]:
    """Every tensor of the checkpoint. The index, where there is one, is the only authority for file names.

    Raises BadInput for a missing, truncated or malformed shard, and for an index that points outside the folder.
    """
    if not (folder / INDEX_FILE).is_file():
        if not (folder / SINGLE_FILE).is_file():
            raise BadInput(f"{folder}: neither {INDEX_FILE} nor {SINGLE_FILE} is there, expected safetensors weights")
        return tuple(read_header(folder / SINGLE_FILE))
    shard_of = read_index(folder / INDEX_FILE)
    tensors: dict[str, TensorInfo] = {}
    for shard in sorted(set(shard_of.values())):
        path = folder / shard
        if not path.is_file():
            raise BadInput(f"{path} is missing although {INDEX_FILE} names it: download it again")
        tensors |= {tensor.name: tensor for tensor in read_header(path) if shard_of.get(tensor.name, shard) == shard}
    for name, shard in shard_of.items():
        if name not in tensors:
            raise BadInput(f"{folder / shard}: tensor {name} is missing although {INDEX_FILE} places it there")
    return tuple(tensors.values())


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; bare Infinity is accepted, as some published configurations hold it."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise BadInput(f"{path} is not readable JSON ({error}): fetch it again") from None
    if not isinstance(value, dict):
        raise BadInput(f"{path} holds a JSON {type(value).__name__}, expected an object")
    return value


def read_index(path: Path) -> dict[str, str]:
    """Tensor name to file name, from a safetensors index. Raises BadInput when it points outside its folder."""
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise BadInput(f"{path}: weight_map is missing or empty, expected tensor names and their files")
    for name, file in weight_map.items():
        if not isinstance(file, str) or not file or OUTSIDE.search(file):
            raise BadInput(f"{path}: weight_map places {name} in {file!r}, expected a file inside the folder")
    return weight_map


def read_header(path: Path) -> Iterator[TensorInfo]:
    """Every tensor of a file. Raises BadInput for one that is truncated or malformed.

    The safetensors library validates the header; it also promises that tensors lie back to back in offset order.
    """
    try:
        with safe_open(path, framework="pt") as file:
            shapes = {name: file.get_slice(name) for name in file.offset_keys()}
            entries = [(name, part.get_dtype(), tuple(part.get_shape())) for name, part in shapes.items()]
    except (SafetensorError, OSError) as error:
        if _is_pointer(path):
            raise BadInput(f"{path} is a pointer of Git LFS, not the file itself: run `git lfs pull`") from None
        raise BadInput(f"{path} is truncated or not a safetensors file ({error}): download it again") from None
    lengths = [_length(dtype, shape, name, path) for name, dtype, shape in entries]
    offset = path.stat().st_size - sum(lengths)
    for (name, dtype, shape), length in zip(entries, lengths, strict=True):
        yield TensorInfo(name, dtype, shape, str(path), offset, length)
        offset += length


def _is_pointer(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(len(_POINTER)) == _POINTER


_DTYPE_BYTES = {
    "F64": 8, "I64": 8, "U64": 8,
    "F32": 4, "I32": 4, "U32": 4,
    "F16": 2, "BF16": 2, "I16": 2, "U16": 2,
    "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "I8": 1, "U8": 1, "BOOL": 1,
}  # fmt: skip


def _length(dtype: str, shape: tuple[int, ...], name: str, path: Path) -> int:
    if dtype not in _DTYPE_BYTES:
        raise BadInput(f"{name} in {path} has dtype {dtype}, expected one of {', '.join(_DTYPE_BYTES)}")
    length = _DTYPE_BYTES[dtype]
    for size in shape:
        length *= size
    return length
