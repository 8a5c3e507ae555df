"""Second moments of inputs (GPTQ's Hessian) and their Cholesky factor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from ..formats.quantize import LEAST_SQUARE, relative_weights_of

_STRIP: Final = 256  # columns
_LEAST_SHRINKAGE: Final = 0.01  # keeps the factorization sound in float32


class Cholesky(NamedTuple):
    """The squared error of outputs of some matrices, taken apart by blocks of columns.

    With c = e @ carried from the errors e [columns] of a row in blocks before one, that block adds
    ``sum(((e + c) @ T)²)`` to what they cost, T being its own triangle.
    """

    blocks: tuple[Tensor, ...]  # upper triangles [matrices, size, size]
    weights: tuple[Tensor | None, ...]  # of the columns of each block, as `quantize.relative_weights` gives them
    carried: Tensor  # [matrices, columns, columns], of the dtype products are computed in; what is above blocks counts


class SecondMoments:
    """Mean products of the inputs of some matrices, and from how many tokens those of each are.

    `means` are float32 [matrices, columns, columns], of which the upper triangles count. Products that carry errors
    from block to block only say what to aim at: they are computed in `dtype`, and in bfloat16 where the processor does
    that faster.
    """

    def __init__(self, means: Tensor, tokens: Sequence[float], dtype: torch.dtype = torch.float32) -> None:
        self.means = means
        self.tokens = tuple(tokens)
        self._dtype = torch.bfloat16 if _multiplies_bfloat16(means.device) else dtype
        self._padded: dict[int, SecondMoments] = {}
        self._triangle: Tensor | None = None
        self._factors: dict[int, Cholesky] = {}

    def padded(self, columns: int) -> SecondMoments:
        """The same with columns that have no inputs, so that there are so many."""
        missing = columns - self.means.shape[-1]
        if missing and columns not in self._padded:
            self._padded[columns] = self._filled_up(missing)
        return self._padded[columns] if missing else self

    def _filled_up(self, missing: int) -> SecondMoments:
        return SecondMoments(functional.pad(self.means, (0, missing, 0, missing)), self.tokens, self._dtype)

    def cholesky(self, size: int) -> Cholesky:
        """For blocks of so many columns."""
        if size not in self._factors:
            if self._triangle is None:
                self._triangle = self._factorized()
            self._factors[size] = taken_apart(self._triangle, size, self._dtype)
        return self._factors[size]

    def _factorized(self) -> Tensor:
        """Upper triangles T with T @ T.T in proportion to the moments; what is below them has no meaning.

        Means of products of inputs are noisy where tokens are few: but for squares they are divided by
        1 + columns / tokens. With half as many tokens as columns, rounding then still gains on other text.

        Errors cost ``sum((e @ T)²)`` (LDLQ of Chee et al. 2023, which is equal to GPTQ of Frantar et al. 2022, but
        needs no inverse).
        """
        squares = self.means.diagonal(dim1=-2, dim2=-1)
        sizes = [mean or 1.0 for mean in squares.mean(dim=-1).tolist()]  # only proportions count
        shrinkages = (max(squares.shape[-1] / max(tokens, 1), _LEAST_SHRINKAGE) for tokens in self.tokens)
        divisors = [size * (1 + shrinkage) for size, shrinkage in zip(sizes, shrinkages, strict=True)]
        moments = self.means / _of_each(divisors, self.means)
        moments.diagonal(dim1=-2, dim2=-1).copy_((squares / _of_each(sizes, squares)).clamp(min=LEAST_SQUARE))
        return factorize(moments)


def _of_each(numbers: Sequence[float], values: Tensor) -> Tensor:
    """A number for each matrix, to meet `values` [matrices, ...]."""
    return torch.tensor(numbers, device=values.device, dtype=values.dtype).view(-1, *[1] * (values.dim() - 1))


def _multiplies_bfloat16(device: torch.device) -> bool:
    """Whether products of bfloat16 are faster than of float32 there."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return device.type == "cpu" and bool(torch.cpu._is_avx512_bf16_supported())


def factorize(moments: Tensor) -> Tensor:
    """Puts upper triangles T with T @ T.T = moments [matrices, columns, columns] in the place of their upper triangles;
    the last columns first."""
    failed = []
    for stop in range(moments.shape[-1], 0, -_STRIP):
        start = max(stop - _STRIP, 0)
        block, above = moments[:, start:stop, start:stop], moments[:, :start, start:stop]
        lower, info = torch.linalg.cholesky_ex(block.flip(-2, -1))
        block.copy_(lower.flip(-2, -1))
        failed.append(info.any())
        above.copy_(above @ _inverse(block).mT)
        for first in range(0, start, _STRIP):
            rows = slice(first, min(first + _STRIP, start))
            moments[:, rows, first:start].baddbmm_(above[:, rows], above[:, first:].mT, alpha=-1)
    if torch.stack(failed).any():  # at the end, because asking stops a GPU
        raise torch.linalg.LinAlgError("second moments are not positive definite")
    return moments


def _inverse(triangles: Tensor) -> Tensor:
    """Of upper triangles [..., size, size]."""
    identity = torch.eye(triangles.shape[-1], device=triangles.device).expand_as(triangles)
    inverse: Tensor = torch.linalg.solve_triangular(triangles, identity, upper=True)
    return inverse


def taken_apart(triangles: Tensor, size: int, dtype: torch.dtype) -> Cholesky:
    """Triangles [matrices, columns, columns] by blocks of `size` columns."""
    carried, blocks = torch.empty_like(triangles, dtype=dtype), []
    for start in range(0, triangles.shape[-1], size):
        here = slice(start, start + size)
        blocks.append(triangles[:, here, here].triu())
        carried[:, :start, here] = triangles[:, :start, here] @ _inverse(blocks[-1])
    return Cholesky(tuple(blocks), relative_weights_of([_squares(block) for block in blocks]), carried)


def _squares(triangles: Tensor) -> Tensor:
    """Of the diagonals of triangles [matrices, size, size]."""
    return triangles.diagonal(dim1=-2, dim2=-1).square()


def divided(triangles: Tensor, size: int) -> Tensor:
    """Each `size` columns of upper triangles divided by their block of the diagonal, from the right."""
    if size == 1:
        return triangles / triangles.diagonal(dim1=-2, dim2=-1)[..., None, :]
    blocks = triangles.unflatten(-2, (-1, size)).unflatten(-1, (-1, size)).diagonal(dim1=-4, dim2=-2).movedim(-1, 0)
    quotients = torch.zeros_like(triangles)
    for number, inverse in enumerate(_inverse(blocks)):
        stop = (number + 1) * size  # zeros below the diagonal stay zeros
        quotients[..., :stop, stop - size : stop] = triangles[..., :stop, stop - size : stop] @ inverse
    return quotients


def products_of(states: Tensor) -> Tensor:
    """Sums over tokens of products of two columns: [columns, columns], the upper triangle and some of the rest."""
    columns = states.shape[1]
    products = torch.zeros(columns, columns, device=states.device)
    for start in range(0, columns, _STRIP):
        torch.mm(states[:, start : start + _STRIP].T, states[:, start:], out=products[start : start + _STRIP, start:])
    return products
