"""A Hugging Face checkpoint folder: config.json and safetensors files, single or sharded with an index."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError, safe_open

from ..archs.config import Config
from ..archs.expressions import TensorInfo
from ..documents import is_file, read_json, refuse_pointer, unreadable
from ..errors import BadInput
from ..paths import is_plain_name

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"


def read_config(folder: Path) -> Config:
    """The raw config.json: no library fills in defaults. Raises BadInput when missing or malformed."""
    path = folder / "config.json"
    if not is_file(path):
        raise BadInput(f"{folder}: config.json is missing, expected a Hugging Face checkpoint folder")
    return Config(read_json(path), str(path))


def read_tensors(folder: Path) -> tuple[TensorInfo, ...]:
    """Every tensor of the checkpoint. The index, where there is one, is the only authority for file names.

    Raises BadInput for a missing, truncated or malformed shard, and for an index that points outside the folder.
    """
    if not is_file(folder / INDEX_FILE):
        if not is_file(folder / SINGLE_FILE):
            raise BadInput(f"{folder}: neither {INDEX_FILE} nor {SINGLE_FILE} is there, expected safetensors weights")
        return tuple(read_header(folder / SINGLE_FILE))
    shard_of = read_index(folder / INDEX_FILE)
    tensors: dict[str, TensorInfo] = {}
    for shard in sorted(set(shard_of.values())):
        path = folder / shard
        if not is_file(path):
            raise BadInput(f"{path} is missing although {INDEX_FILE} names it: download it again")
        tensors |= {tensor.name: tensor for tensor in read_header(path) if shard_of.get(tensor.name, shard) == shard}
    for name, shard in shard_of.items():
        if name not in tensors:
            raise BadInput(f"{folder / shard}: tensor {name} is missing although {INDEX_FILE} places it there")
    return tuple(tensors.values())


def read_index(path: Path) -> dict[str, str]:
    """Tensor name to file name, from a safetensors index. Raises BadInput when it points outside its folder."""
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise BadInput(f"{path}: weight_map is missing or empty, expected tensor names and their files")
    for name, file in weight_map.items():
        if not is_plain_name(file):
            raise BadInput(f"{path}: weight_map places {name} in {file!r}, expected a file inside the folder")
    return weight_map


def read_header(path: Path) -> Iterator[TensorInfo]:
    """Every tensor of a file. Raises BadInput for one that is truncated or malformed.

    The safetensors library validates the header; it also promises that tensors lie back to back in offset order.
    """
    try:
        with path.open("rb") as beginning:
            refuse_pointer(path, beginning.read(64))
        with safe_open(path, framework="np") as file:
            shapes = {name: file.get_slice(name) for name in file.offset_keys()}
            entries = [(name, part.get_dtype(), tuple(part.get_shape())) for name, part in shapes.items()]
        size = path.stat().st_size
    except OSError as error:
        raise unreadable(path, error) from None
    except SafetensorError as error:
        raise BadInput(f"{path} is truncated or not a safetensors file ({error}): download it again") from None
    lengths = [tensor_bytes(dtype, shape, name, path) for name, dtype, shape in entries]
    offset = size - sum(lengths)
    for (name, dtype, shape), length in zip(entries, lengths, strict=True):
        yield TensorInfo(name, dtype, shape, str(path), offset, length)
        offset += length


_DTYPE_BYTES = {
    "F64": 8, "I64": 8, "U64": 8,
    "F32": 4, "I32": 4, "U32": 4,
    "F16": 2, "BF16": 2, "I16": 2, "U16": 2,
    "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "I8": 1, "U8": 1, "BOOL": 1,
}  # fmt: skip


def tensor_bytes(dtype: str, shape: tuple[int, ...], name: str, path: str | Path) -> int:
    """Bytes of a tensor of a safetensors file. Raises BadInput for a dtype that is not known."""
    if dtype not in _DTYPE_BYTES:
        raise BadInput(f"{name} in {path} has dtype {dtype}, expected one of {', '.join(_DTYPE_BYTES)}")
    length = _DTYPE_BYTES[dtype]
    for size in shape:
        length *= size
    return length
