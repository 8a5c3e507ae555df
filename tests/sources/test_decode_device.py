"""Every kind of expression is evaluated where its bytes lie, to the same numbers."""

from __future__ import annotations

from math import prod

import pytest
import torch
from moecast.archs.encodings import BlockScaled, GlobalScales, Int4, Mxfp4, Nvfp4, Packing, Scaled
from moecast.archs.expressions import (
    Below,
    Columns,
    Expression,
    Given,
    NegativeExponential,
    OnePlus,
    Padded,
    Read,
    Reshape,
    Rows,
    SideBySide,
    Stack,
    TensorInfo,
    Transposed,
    Zeros,
)
from moecast.archs.rearranged import ColumnRuns, RowRuns
from moecast.sources.decode import _EVALUATIONS, evaluate
from moecast.sources.storage import OnDevice
from numbered import DEVICE, numbered_device
from torch import Tensor

BYTES = {"F32": 4, "BF16": 2, "F16": 2, "I64": 8, "I32": 4}


def tensor(name: str, dtype: str, *shape: int) -> TensorInfo:
    return TensorInfo(name, dtype, shape, "file", 0, BYTES.get(dtype, 1) * prod(shape))


PLAIN = Read(tensor("plain", "BF16", 4, 64))
NVFP4 = Nvfp4(tensor("codes", "U8", 4, 32), tensor("scale", "F8_E4M3", 4, 4), tensor("global", "F32", 1))
MXFP4 = Mxfp4(tensor("codes", "I8", 4, 32), tensor("scale", "F8_E8M0", 4, 2))
EVERY: list[Expression] = [
    PLAIN,
    BlockScaled(tensor("codes", "F8_E4M3", 4, 64), tensor("scale", "F32", 1, 1), (128, 128)),
    Scaled(tensor("codes", "F8_E4M3", 4, 64), tensor("scale", "F32", 4)),
    NVFP4,
    MXFP4,
    Int4(Packing.GPTQ, tensor("words", "I32", 8, 4), tensor("scales", "F16", 4, 4), tensor("zeros", "I32", 4, 1)),
    GlobalScales((NVFP4,)),
    GlobalScales((NVFP4,), Given((2.5,))),
    Given((1.0, 2.5)),
    Reshape(PLAIN.tensor, (64, 4)),
    NegativeExponential(PLAIN),
    OnePlus(PLAIN),
    Below(Read(tensor("table", "I64", 4, 1)), 2**62),
    Zeros((4, 64)),
    Padded(PLAIN, (8, 64)),
    SideBySide((PLAIN, PLAIN)),
    Rows(PLAIN, 1, 3),
    Columns(PLAIN, 1, 2),
    Transposed(PLAIN),
    RowRuns(PLAIN, ((2, 4), (0, 1))),
    ColumnRuns(PLAIN, ((32, 64), (0, 8))),
    Stack((MXFP4, PLAIN)),
]


class Bytes:
    """Bytes of any tensor, of which none makes a NaN."""

    device = "cpu"

    def read(self, tensor: TensorInfo, start: int = 0, stop: int | None = None) -> Tensor:
        rows = max(tensor.rows, 1)
        data = torch.arange(tensor.length, dtype=torch.int64).remainder(60).to(torch.uint8).view(rows, -1)
        return data[start:stop]


@pytest.mark.parametrize("expression", EVERY, ids=lambda expression: type(expression).__name__)
def test_numbers_are_made_where_bytes_lie(expression: Expression) -> None:
    expert = 0 if isinstance(expression, Stack) else None
    expected = evaluate(expression, Bytes(), expert)
    with numbered_device():
        found = evaluate(expression, OnDevice(Bytes(), DEVICE), expert)
        assert found.device.type == DEVICE.type
        assert torch.equal(found.cpu(), expected)


def test_no_kind_is_missing() -> None:
    assert {type(expression) for expression in EVERY} == _EVALUATIONS.keys()
