"""The tensors of a model, each of which must be claimed exactly once.

An adapter takes tensors out of a `Catalogue`; whatever is missing, claimed twice or left over is an error that
names the tensor. How a matrix is encoded is decided from the tensors present, not from what the config says.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace
from math import prod
from typing import Any

from ..errors import BadInput
from .config import Config
from .encodings import BlockScaled, Int4, Mxfp4, Nvfp4, Packing, Scaled
from .expressions import PLAIN_DTYPES, Expression, Read, Rows, Stack, TensorInfo, first_tensor
from .foreign import foreign_form, what_else
from .weights import scale_name

_SCALES = ("weight_scale", "weight_scale_inv", "scale")  # multipliers, whatever the name says
_GLOBAL_SCALES = ("weight_scale_2", "weight_global_scale")
# Codes, scales, zeros and groups of columns of whole numbers.
_COMPRESSED_NAMES = ("weight_packed", "weight_scale", "weight_zero_point", "weight_g_idx")
_GPTQ_NAMES = ("qweight", "scales", "qzeros", "g_idx")
# They serve the arithmetic of the engine that the checkpoint was made for, no weight depends on them.
_ACTIVATION_SCALES = ("input_scale", "input_global_scale", "k_scale", "v_scale")
# What tools leave behind: buffers that are computed anew, scales of activations and of the KV cache.
_LEFTOVERS = re.compile(
    r"(^|\.)(rotary_emb\.(inv_freq|cos_cached|sin_cached)|inv_freq|((k|v|q|kv|kv_cache|input|output|prob)_|prob_output_)"
    r"(global_)?scale|(k|v|kv|q)_zero_point)$"
)


class Catalogue:
    """All tensors of one model.

    Args:
        tensors: every tensor of the checkpoint.
        origin: what to call the checkpoint in error messages.
        block: rows and columns that share one scale in block-scaled FP8 matrices.
        packing: which tool packed what is called `qweight`; None where that is not known.
        uniform: whether its zeros are all 8, and its columns in order.
    """

    def __init__(
        self,
        tensors: Iterable[TensorInfo],
        origin: str,
        block: tuple[int, int] = (128, 128),
        packing: Packing | None = None,
        uniform: bool = False,
    ) -> None:
        self.origin = origin
        self.block = block
        self.packing = packing
        self.uniform = uniform
        self._tensors: dict[str, TensorInfo] = {}
        self._claimed: set[str] = set()
        self._fused: dict[str, Expression] = {}
        self._left_out: list[str] = []
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
            instead = what_else(name, self._tensors) or "the checkpoint is incomplete"
            raise BadInput(f"{self.origin}: tensor {name} is missing: {instead}")
        self._claimed.add(name)
        return self._tensors[name]

    def plain(self, name: str) -> Read:
        """Claim a tensor that is stored as ordinary floating point numbers."""
        return Read(self._typed(name, *PLAIN_DTYPES))

    def integers(self, name: str) -> Read:
        """Claim a table of whole numbers."""
        return Read(self._typed(name, "I64", "I32"))

    def matrix(self, module: str) -> Expression:
        """Claim `module.weight` together with the scales that belong to its encoding."""
        for suffix in _ACTIVATION_SCALES:
            if f"{module}.{suffix}" in self:
                self.take(f"{module}.{suffix}")
        tensor = self._tensors.get(f"{module}.weight")
        if tensor is not None and tensor.dtype in PLAIN_DTYPES:
            self._drop_scales(module)
            return self.plain(tensor.name)
        if int4 := self._int4(module):
            return int4
        if foreign := foreign_form(module, self._tensors):
            raise BadInput(f"{self.origin}: {module} is not in a form that can be read: {foreign}")
        if f"{module}.weight_packed" in self:  # compressed-tensors
            return self._nvfp4(module, "weight_packed", "weight_global_scale", reciprocal=True)
        if tensor is None:
            return self.plain(f"{module}.weight")
        if tensor.dtype == "U8":  # ModelOpt
            return self._nvfp4(module, "weight", "weight_scale_2", reciprocal=False)
        scale = next((name for suffix in _SCALES if (name := f"{module}.{suffix}") in self), None)
        if scale and tensor.dtype == "F8_E4M3" and len(tensor.shape) == 2:
            return self._float8(tensor.name, scale)
        if scale and tensor.dtype == "I8" and self._tensors[scale].dtype == "F8_E8M0" and len(tensor.shape) == 2:
            return Mxfp4(self.take(tensor.name), self._typed(scale, "F8_E8M0", dimensions=2))
        raise BadInput(
            f"{tensor.name} in {tensor.file} has dtype {tensor.dtype} and shape {list(tensor.shape)}, expected "
            f"{', '.join(PLAIN_DTYPES)}, or U8, I8 or F8_E4M3 in two dimensions with a weight_scale, weight_scale_inv "
            "or scale"
        )

    def _int4(self, module: str) -> Int4 | None:
        """Whole numbers of 4 bits, if the matrix is stored as those."""
        packed, packing = self._tensors.get(f"{module}.weight_packed"), self.packing
        if packed and packed.dtype == "I32":
            self._typed(f"{module}.weight_shape", "I64", "I32")  # which the others say too
            packing, names = Packing.COMPRESSED_TENSORS, _COMPRESSED_NAMES
        elif f"{module}.qweight" in self and packing:
            names = _GPTQ_NAMES
        else:
            return None
        codes, scale, zero, groups = (f"{module}.{name}" for name in names)
        return Int4(
            packing,
            codes=self._typed(codes, "I32", dimensions=2),
            scale=self._typed(scale, *PLAIN_DTYPES, dimensions=2),
            zero=self._typed(zero, "I32", dimensions=2) if zero in self or names is _GPTQ_NAMES else None,
            groups=self._typed(groups, "I32", dimensions=1) if groups in self else None,
            uniform=self.uniform and packing is self.packing,
        )

    def _float8(self, name: str, scale: str) -> Expression:
        """Scaled as a whole, by rows or in blocks: the shape of the scales says it, not their name."""
        rows, columns = self._tensors[name].shape
        shape, grid = self._tensors[scale].shape, (-(-rows // self.block[0]), -(-columns // self.block[1]))
        simple = shape in ((), (1,), (1, 1), (rows,), (rows, 1))
        if simple and (shape != grid or scale.endswith(".weight_scale")):
            return Scaled(self.take(name), self._typed(scale, *PLAIN_DTYPES))
        return BlockScaled(self.take(name), self._typed(scale, *PLAIN_DTYPES, "F8_E8M0"), self.block)

    def _drop_scales(self, module: str) -> None:
        """Of a matrix that was decoded by a tool which left its scales in place."""
        for suffix in (*_SCALES, *_GLOBAL_SCALES):
            if (name := f"{module}.{suffix}") in self and name not in self._claimed:
                self.take(name)
                self._left_out.append(name)

    def holds(self, name: str) -> bool:
        """Whether a tensor is there, be it packed."""
        module = name.removesuffix(".weight")
        return name in self or (module != name and (f"{name}_packed" in self or f"{module}.qweight" in self))

    def holds_below(self, pattern: str) -> bool:
        """Whether there are tensors whose names begin as `pattern` does, up to its `{}`."""
        return any(name.startswith(pattern.partition("{}")[0]) for name in self._tensors)

    def experts(self, separate: str, fused: str, shape: tuple[int, ...], half: int | None = None) -> Expression:
        """Claim a stack of matrices [experts, rows, columns].

        Args:
            separate: module of each expert's matrix, `{}` standing for the expert.
            fused: tensor that holds all of them where transformers' names in memory are used.
            half: which half of the rows of `fused` it is, where gate (0) and up projection (1) share that tensor.
        """
        if fused not in self:
            return Stack(tuple(self.matrix(separate.format(expert)) for expert in range(shape[0])))
        if half is None:
            return self.plain(fused)
        both = self.fused(fused)
        if both.shape[-2:-1] != (2 * shape[1],):
            file = first_tensor(both).file
            raise BadInput(
                f"{fused} in {file} has shape {list(both.shape)}, expected {2 * shape[1]} rows for each "
                "expert: those of its gate, then those of its up projection"
            )
        return Rows(both, half * shape[1], (half + 1) * shape[1])

    def fused(self, name: str) -> Expression:
        """Claim a tensor that holds parts of several weights; asked for again it is the same one.

        Bytes are the codes of microscaled floats, [experts, rows, groups, 16], with a tensor of scales beside them.
        """
        if name not in self._fused:
            tensor = self._tensors.get(name)
            self._fused[name] = self._mxfp4(name) if tensor and tensor.dtype == "U8" else self.plain(name)
        return self._fused[name]

    def _mxfp4(self, blocks: str) -> Mxfp4:
        codes = self._typed(blocks, "U8", dimensions=4)
        *leading, groups, size = codes.shape
        scale = self._typed(f"{blocks.removesuffix('_blocks')}_scales", "U8", dimensions=3)
        return Mxfp4(replace(codes, shape=(*leading, groups * size)), scale)

    def stored(self, name: str) -> Expression:
        """Claim a tensor of a GGUF file together with the `.scale` that llama.cpp multiplies it by."""
        input_scale = f"{name.removesuffix('.weight')}.input_scale"
        if input_scale in self:
            self.take(input_scale)
        if scale_name(name) not in self:
            return Read(self.take(name))
        return Scaled(self.take(name), self._typed(scale_name(name), "F32"))

    def ignore(self, prefix: str) -> int:
        """Claim every tensor whose name starts with `prefix`, to leave it out; returns how many there are."""
        names = {name for name in self._tensors if name.startswith(prefix)} - self._claimed
        self._claimed |= names
        return len(names)

    def finish(self) -> tuple[str, ...]:
        """Notes on what was left out. Raises BadInput when a tensor was not claimed."""
        left = self._tensors.keys() - self._claimed
        leftovers = {name for name in left if _LEFTOVERS.search(name)}
        unknown = sorted(left - leftovers)
        if unknown:
            others = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
            raise BadInput(
                f"{unknown[0]} in {self._tensors[unknown[0]].file}{others}: unknown tensor, expected only tensors "
                "that the architecture describes"
            )
        names = sorted({*leftovers, *self._left_out})
        others = f" and {len(names) - 1} more" if len(names) > 1 else ""
        return (f"{names[0]}{others} are not used: no weight depends on them",) if names else ()

    def _nvfp4(self, module: str, codes: str, global_scale: str, reciprocal: bool) -> Nvfp4:
        return Nvfp4(
            codes=self._typed(f"{module}.{codes}", "U8", dimensions=2),
            scale=self._typed(f"{module}.weight_scale", "F8_E4M3", dimensions=2),
            global_scale=self._typed(f"{module}.{global_scale}", "F32"),
            reciprocal=reciprocal,
        )

    def _typed(self, name: str, *dtypes: str, dimensions: int | None = None) -> TensorInfo:
        tensor = self.take(name)
        if tensor.dtype not in dtypes or dimensions not in (None, len(tensor.shape)) or not prod(tensor.shape):
            wanted = f" in {dimensions} dimensions" if dimensions else ""
            raise BadInput(
                f"{name} in {tensor.file} has dtype {tensor.dtype} and shape {list(tensor.shape)}, expected "
                f"{' or '.join(dtypes)}{wanted}"
            )
        return tensor


def scale_block(config: Config) -> tuple[int, int]:
    """Rows and columns that share a scale in a checkpoint's FP8 matrices."""
    quantization = config.section("quantization_config")
    block = quantization.get("weight_block_size") or _block_structure(quantization) or [128, 128]
    if not (isinstance(block, list) and len(block) == 2 and all(type(size) is int and size > 0 for size in block)):
        raise BadInput(f"{quantization.origin}: weight_block_size is {block!r}, expected two positive whole numbers")
    return block[0], block[1]


def _block_structure(quantization: Config) -> Any:
    """The same as compressed-tensors says it: of the first group of layers that has blocks."""
    groups = quantization.get("config_groups")
    listed = groups.values() if isinstance(groups, dict) else ()
    schemes = [group.get("weights") for group in listed if isinstance(group, dict)]
    blocks = (scheme.get("block_structure") for scheme in schemes if isinstance(scheme, dict))
    return next(filter(None, blocks), None)
