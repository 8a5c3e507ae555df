"""A device that is not there, for tensors with numbers, which the CPU computes; what lies there is counted."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pretended
import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only

DEVICE = torch.device(pretended.DEVICE.type, 0)
_MOVES = {"aten::_to_copy", "aten::copy_"}  # what may read one device and write another


class OnDevice(Tensor):
    """A tensor that says to lie on DEVICE; its numbers are those of `numbers`, on the CPU."""

    numbers: Tensor

    @staticmethod
    def __new__(cls, numbers: Tensor) -> OnDevice:
        made: OnDevice = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, numbers.shape, numbers.stride(), numbers.storage_offset(), dtype=numbers.dtype, device=DEVICE
        )
        made.numbers = numbers
        return made

    def tolist(self) -> Any:
        return self.numbers.tolist()

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        raise AssertionError("outside of its mode")


class _Literals(TorchFunctionMode):
    """`torch.tensor`, which is no operation that could be dispatched."""

    def __torch_function__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        options = dict(options or {})
        if function is torch.tensor and "device" in options:
            return torch.tensor(*arguments, **options | {"device": "cpu"}).to(options["device"])
        return function(*arguments, **options)


class NumberedDevice(TorchDispatchMode):
    """While it is entered, tensors can be made on DEVICE and moved there; those of another device refuse to meet them.

    `peak` is the most bytes that lay there at once, by storages.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak = self._bytes = 0
        self._users: Counter[int] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        options = dict(options or {})
        given = [value for value in tree_flatten((arguments, options))[0] if isinstance(value, Tensor)]
        there = any(isinstance(tensor, OnDevice) for tensor in given)
        here = any(not isinstance(tensor, OnDevice) and tensor.dim() for tensor in given)
        name = function._schema.name
        if there and here and name not in _MOVES:
            raise RuntimeError(f"{name} is given tensors of two devices")
        if options.get("device") is not None:
            there = torch.device(options["device"]).type == DEVICE.type
            options["device"] = "cpu"
        if options.get("pin_memory"):  # for which torch wants a GPU
            options["pin_memory"] = False
        plain = tree_map_only(OnDevice, lambda tensor: tensor.numbers, (arguments, options))
        result = function(*plain[0], **plain[1])
        written = [argument for argument in function._schema.arguments if argument.is_write]
        if written:  # in place, or to what was given for the result
            places = dict(zip((argument.name for argument in function._schema.arguments), arguments, strict=False))
            found = [(places | options)[argument.name] for argument in written]
            return found[0] if len(found) == 1 else tuple(found)
        return tree_map_only(Tensor, self._placed, result) if there else result

    def _placed(self, numbers: Tensor) -> OnDevice:
        made, storage = OnDevice(numbers), numbers.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if not self._users[key]:
            self._bytes += size
            self.peak = max(self.peak, self._bytes)
        self._users[key] += 1
        weakref.finalize(made, self._dropped, key, size)
        return made

    def _dropped(self, key: int, size: int) -> None:
        self._users[key] -= 1
        if not self._users[key]:
            self._bytes -= size


@contextmanager
def numbered_device() -> Iterator[NumberedDevice]:
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        pretended.known_to_torch(patch)
        with NumberedDevice() as mode, _Literals():
            yield mode
