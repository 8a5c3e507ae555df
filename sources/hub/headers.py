"""The header of a safetensors file that is still on the Hub: what it says is checked against the size of the file."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeGuard

from ...archs.expressions import TensorInfo
from ...documents import parse_json
from ...errors import BadInput, Interrupted
from ..checkpoint import tensor_bytes

_FIRST = 1 << 17  # bytes asked for at once, which hold most headers whole
_LONGEST = 100_000_000  # what the safetensors library accepts


def read_remote_header(read: Callable[[int, int], bytes], file: str, size: int, origin: str) -> list[TensorInfo]:
    """Every tensor of a file of `size` bytes, of which `read` gives a part. Raises Interrupted for a damaged header."""
    start = read(0, min(size, _FIRST)) if size else b""
    length = int.from_bytes(start[:8], "little")
    if len(start) < 8 or not 2 <= length <= min(size - 8, _LONGEST):
        raise _damaged(file, origin, f"it begins with a header of {length} bytes and has {size} in all")
    text = start[8 : 8 + length]
    text += read(8 + len(text), 8 + length) if len(text) < length else b""
    try:
        header = parse_json(text, file)
    except BadInput as error:
        raise _damaged(file, origin, str(error)) from None
    try:
        header.pop("__metadata__", None)
        tensors = [_tensor(name, entry, file, 8 + length) for name, entry in header.items()]
    except BadInput:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _damaged(file, origin, f"{type(error).__name__}: {str(error)[:100]}") from None
    tensors.sort(key=lambda tensor: (tensor.offset, tensor.length))
    end = 8 + length
    for tensor in tensors:
        if tensor.offset != end:
            raise _damaged(file, origin, f"{tensor.name} does not begin where the tensor before it ends")
        end += tensor.length
    if end != size:
        raise _damaged(file, origin, f"its tensors end at byte {end} of {size}")
    return tensors


def _tensor(name: str, entry: dict[str, object], file: str, data: int) -> TensorInfo:
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or not _are_sizes(shape) or not _are_sizes(offsets):
        raise ValueError(f"{name} has no dtype, shape and place")
    begin, end = offsets
    tensor = TensorInfo(name, dtype, tuple(shape), file, data + begin, end - begin)
    if tensor_bytes(dtype, tensor.shape, name, file) != tensor.length:
        raise ValueError(f"{name} has {tensor.length} bytes, which are not those of its shape")
    return tensor


def _are_sizes(value: object) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(size) is int and size >= 0 for size in value)


def _damaged(file: str, origin: str, what: str) -> Interrupted:
    return Interrupted(
        f"the header of {file} of {origin} arrived damaged: {what}; a proxy or mirror may be at fault, try again later "
        "or without it"
    )
