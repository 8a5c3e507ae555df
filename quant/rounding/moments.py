"""Second moments of inputs (GPTQ's Hessian) and their Cholesky factor."""

from __future__ import annotations

from typing import Final, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from ..formats.quantize import LEAST_SQUARE

_STRIP: Final = 256  # columns
_LEAST_SHRINKAGE: Final = 0.01  # keeps the factorization sound in float32


class Cholesky(NamedTuple):
    """The squared error of outputs, taken apart by blocks of columns.

    With c = e @ carried from the errors e [columns] of a row in blocks before one, that block adds
    ``sum(((e + c) @ T)²)`` to what they cost, T being its own triangle.
    """

    blocks: tuple[Tensor, ...]  # upper triangles [size, size]
    carried: Tensor  # [columns, columns], of the dtype that products are computed in; what is above the blocks counts


class SecondMoments:
    """Mean products of the inputs of a matrix, and from how many tokens they are.

    `means` are float32 [columns, columns], of which the upper triangle counts. Products that carry errors from block to
    block only say what to aim at: they are computed in `dtype`, and in bfloat16 where the processor does that faster.
    """

    def __init__(self, means: Tensor, tokens: float, dtype: torch.dtype = torch.float32) -> None:
        self.means = means
        self.tokens = tokens
        self._dtype = torch.bfloat16 if _multiplies_bfloat16(means.device) else dtype
        self._padded: dict[int, SecondMoments] = {}
        self._triangle: Tensor | None = None
        self._factors: dict[int, Cholesky] = {}

    def padded(self, columns: int) -> SecondMoments:
        """The same with columns that have no inputs, so that there are so many."""
        missing = columns - len(self.means)
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
        """An upper triangle T with T @ T.T in proportion to the moments; what is below it has no meaning.

        Means of products of inputs are noisy where tokens are few: but for squares they are divided by
        1 + columns / tokens. With half as many tokens as columns, rounding then still gains on other text.

        Errors cost ``sum((e @ T)²)`` (LDLQ of Chee et al. 2023, which is equal to GPTQ of Frantar et al. 2022, but
        needs no inverse).
        """
        squares = self.means.diagonal()
        mean = float(squares.mean()) or 1.0  # only proportions count
        shrinkage = max(len(squares) / max(self.tokens, 1), _LEAST_SHRINKAGE)
        moments = self.means / (mean * (1 + shrinkage))
        moments.diagonal().copy_((squares / mean).clamp(min=LEAST_SQUARE))
        return factorize(moments)


def _multiplies_bfloat16(device: torch.device) -> bool:
    """Whether products of bfloat16 are faster than of float32 there."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return device.type == "cpu" and bool(torch.cpu._is_avx512_bf16_supported())


def factorize(moments: Tensor) -> Tensor:
    """Puts an upper triangle T with T @ T.T = moments in the place of their upper triangle; the last columns first."""
    for stop in range(len(moments), 0, -_STRIP):
        start = max(stop - _STRIP, 0)
        block, above = moments[start:stop, start:stop], moments[:start, start:stop]
        block.copy_(torch.linalg.cholesky(block.flip(0, 1)).flip(0, 1))
        above.copy_(above @ _inverse(block).T)
        for first in range(0, start, _STRIP):
            rows = slice(first, min(first + _STRIP, start))
            moments[rows, first:start].addmm_(above[rows], above[first:].T, alpha=-1)
    return moments


def _inverse(triangles: Tensor) -> Tensor:
    """Of upper triangles [..., size, size]."""
    identity = torch.eye(triangles.shape[-1], device=triangles.device).expand_as(triangles)
    inverse: Tensor = torch.linalg.solve_triangular(triangles, identity, upper=True)
    return inverse


def taken_apart(triangle: Tensor, size: int, dtype: torch.dtype) -> Cholesky:
    """A triangle by blocks of `size` columns."""
    carried, blocks = torch.empty_like(triangle, dtype=dtype), []
    for start in range(0, len(triangle), size):
        here = slice(start, start + size)
        blocks.append(triangle[here, here].triu())
        carried[:start, here] = triangle[:start, here] @ _inverse(blocks[-1])
    return Cholesky(tuple(blocks), carried)


def divided(triangle: Tensor, size: int) -> Tensor:
    """Each `size` columns of an upper triangle divided by their block of the diagonal, from the right."""
    if size == 1:
        return triangle / triangle.diagonal()
    blocks = triangle.unflatten(0, (-1, size)).unflatten(2, (-1, size)).diagonal(dim1=0, dim2=2).movedim(-1, 0)
    quotients = torch.zeros_like(triangle)
    for number, inverse in enumerate(_inverse(blocks)):
        stop = (number + 1) * size  # zeros below the diagonal stay zeros
        quotients[:stop, stop - size : stop] = triangle[:stop, stop - size : stop] @ inverse
    return quotients


def products_of(states: Tensor) -> Tensor:
    """Sums over tokens of products of two columns: [columns, columns], the upper triangle and some of the rest."""
    columns = states.shape[1]
    products = torch.zeros(columns, columns, device=states.device)
    for start in range(0, columns, _STRIP):
        torch.mm(states[:, start : start + _STRIP].T, states[:, start:], out=products[start : start + _STRIP, start:])
    return products
