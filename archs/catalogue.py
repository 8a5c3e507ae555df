"""The tensors of a model, each of which must be claimed exactly once.

An adapter takes tensors out of a `Catalogue`; whatever is missing, claimed twice or left over is an error that
names the tensor. How a matrix is encoded is decided from the tensors present, not from what the config says.
"""

from __future__ import annotations

from collections.abc import Iterable

from .errors import BadInput
from .weights import BlockScaled, Expression, Read, TensorInfo

PLAIN_DTYPES = ("F32", "F16", "BF16")


class Catalogue:
    """All tensors of one model.

    Args:
        tensors: every tensor of the checkpoint.
        origin: what to call the checkpoint in error messages.
        block: rows and columns that share one scale in block-scaled FP8 matrices.
    """

    def __init__(self, tensors: Iterable[TensorInfo], origin: str, block: tuple[int, int] = (128, 128)) -> None:
        self.origin = origin
        self.block = block
        self._tensors: dict[str, TensorInfo] = {}
        self._claimed: set[str] = set()
        for tensor in tensors:
            if tensor.name in self._tensors:
                raise BadInput(f"{tensor.name} appears twice, in {self._tensors[tensor.name].file} and {tensor.file}")
            self._tensors[tensor.name] = tensor

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def take(self, name: str) -> TensorInfo:
        """Claim one tensor. Raises BadInput when it is missing or already claimed."""
        if name in self._claimed:
            raise BadInput(f"{self.origin}: tensor {name} is used twice, the architecture is described wrongly")
        if name not in self._tensors:
            raise BadInput(f"{self.origin}: tensor {name} is missing, the checkpoint is incomplete")
        self._claimed.add(name)
        return self._tensors[name]

    def plain(self, name: str) -> Expression:
        """Claim a tensor that is stored as ordinary floating point numbers."""
        tensor = self.take(name)
        if tensor.dtype not in PLAIN_DTYPES:
            raise BadInput(f"{name} in {tensor.file} has dtype {tensor.dtype}, expected {', '.join(PLAIN_DTYPES)}")
        return Read(tensor)

    def matrix(self, module: str) -> Expression:
        """Claim `module.weight` together with the scales that belong to its encoding."""
        name = f"{module}.weight"
        tensor = self._tensors.get(name)
        if tensor is None or tensor.dtype in PLAIN_DTYPES:
            return self.plain(name)
        scale = f"{module}.weight_scale_inv"
        if tensor.dtype != "F8_E4M3" or scale not in self or len(tensor.shape) != 2:
            raise BadInput(
                f"{name} in {tensor.file} has dtype {tensor.dtype} and shape {list(tensor.shape)}, expected "
                f"{', '.join(PLAIN_DTYPES)}, or a F8_E4M3 matrix with {scale}"
            )
        self.take(name)
        scales = self.take(scale)
        if scales.dtype not in PLAIN_DTYPES:
            raise BadInput(f"{scale} in {scales.file} has dtype {scales.dtype}, expected {', '.join(PLAIN_DTYPES)}")
        return BlockScaled(tensor, scales, self.block)

    def finish(self) -> None:
        """Raise BadInput when a tensor was not claimed."""
        unknown = sorted(self._tensors.keys() - self._claimed)
        if unknown:
            others = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
            raise BadInput(
                f"{unknown[0]} in {self._tensors[unknown[0]].file}{others}: unknown tensor, expected only tensors "
                "that the architecture describes"
            )
