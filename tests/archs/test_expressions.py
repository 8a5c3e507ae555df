"""Facts of expressions, worked out by hand; and that every kind can be evaluated."""

from __future__ import annotations

import inspect
from math import prod

import pytest
from moecast.archs import encodings, expressions, rearranged
from moecast.archs.catalogue import Catalogue
from moecast.archs.encodings import BlockScaled, GlobalScales, Int4, Mxfp4, Nvfp4, Packing, Scaled
from moecast.archs.expressions import (
    Columns,
    Expression,
    NegativeExponential,
    Padded,
    Read,
    Reshape,
    Rows,
    SideBySide,
    Stack,
    TensorInfo,
    Transposed,
    Zeros,
    stored_tensors,
)
from moecast.archs.rearranged import ColumnRuns, RowRuns
from moecast.errors import BadInput
from moecast.sources.decode import _EVALUATIONS

BYTES = {"F32": 4, "BF16": 2, "F16": 2, "I64": 8, "I32": 4}


def tensor(name: str, dtype: str, *shape: int) -> TensorInfo:
    return TensorInfo(name, dtype, shape, "file", 0, BYTES.get(dtype, 1) * prod(shape))


PLAIN = Read(tensor("plain", "BF16", 4, 64))
FLOAT = Read(tensor("float", "F32", 4, 64))
NVFP4 = Nvfp4(tensor("codes", "U8", 4, 32), tensor("scale", "F8_E4M3", 4, 4), tensor("global", "F32", 1))
MXFP4 = Mxfp4(tensor("codes", "I8", 4, 32), tensor("scale", "F8_E8M0", 4, 2))
STACKED = Mxfp4(tensor("codes", "U8", 3, 4, 32), tensor("scale", "U8", 3, 4, 2))


@pytest.mark.parametrize(
    ("expression", "bits", "exact", "names"),
    [
        (PLAIN, 16, "BF16", ["plain"]),
        (Read(tensor("table", "I64", 4, 2)), 64, "I32", ["table"]),
        (BlockScaled(tensor("codes", "F8_E4M3", 4, 64), tensor("scale", "F8_E8M0", 1, 1), (128, 128)), 8, "BF16",
         ["codes", "scale"]),
        (BlockScaled(tensor("codes", "F8_E4M3", 4, 64), tensor("scale", "F32", 1, 1), (128, 128)), 8, None,
         ["codes", "scale"]),
        (Scaled(tensor("codes", "F8_E4M3", 4, 64), tensor("scale", "F32", 4)), 8, None, ["codes", "scale"]),
        (NVFP4, 4.5, None, ["codes", "scale", "global"]),
        (MXFP4, 4.25, "MXFP4", ["codes", "scale"]),
        (Int4(Packing.AWQ, tensor("words", "I32", 64, 1), tensor("scales", "F16", 4, 8)), 5, None, ["words", "scales"]),
        (Int4(Packing.COMPRESSED_TENSORS, tensor("words", "I32", 4, 8), tensor("scales", "BF16", 4, 2)), 4.5, "Q4_0",
         ["words", "scales"]),
        (GlobalScales((NVFP4,)), 32, None, ["codes", "scale", "global"]),
        (Reshape(PLAIN.tensor, (64, 4)), 16, None, ["plain"]),
        (NegativeExponential(PLAIN), 16, None, ["plain"]),
        (Zeros((4, 64)), 32, None, []),
        (Padded(PLAIN, (8, 64)), 16, None, ["plain"]),
        (SideBySide((PLAIN, PLAIN)), 16, "BF16", ["plain", "plain"]),
        (SideBySide((PLAIN, FLOAT)), 32, None, ["plain", "float"]),
        (Rows(FLOAT, 1, 3), 32, "F32", ["float"]),
        (Columns(PLAIN, 1, 2), 16, "BF16", ["plain"]),
        (Transposed(FLOAT), 32, "F32", ["float"]),
        (RowRuns(PLAIN, ((2, 4), (0, 1))), 16, "BF16", ["plain"]),
        (ColumnRuns(FLOAT, ((32, 64), (0, 8))), 32, "F32", ["float"]),
        (STACKED, 4.25, "MXFP4", ["codes", "scale"]),
        (Transposed(PLAIN), 16, "BF16", ["plain"]), (Transposed(MXFP4), 4.25, None, ["codes", "scale"]),
        (Stack((MXFP4, MXFP4)), 4.25, "MXFP4", ["codes", "scale"] * 2),
    ],
)  # fmt: skip
def test_facts(expression: Expression, bits: float, exact: str | None, names: list[str]) -> None:
    assert (expression.bits, expression.exact) == (bits, exact)
    assert [tensor.name for tensor in stored_tensors(expression)] == names


def test_one_expert_depends_on_its_own_matrix() -> None:
    stack = Stack((PLAIN, FLOAT))
    for whole in (stack, Padded(stack, (2, 8, 64)), Rows(stack, 0, 2), Columns(stack, 0, 2), Transposed(stack)):
        assert whole.of_expert(1) == FLOAT
    assert stack.of_expert(None) == stack and PLAIN.of_expert(1) == PLAIN


@pytest.mark.parametrize("rows", [None, (0, 5), (1, 4), (2, 3), (4, 5)])
def test_runs_of_rows_within_rows(rows: tuple[int, int] | None) -> None:
    runs = RowRuns(FLOAT, ((2, 4), (0, 1), (1, 3)))
    assert runs.shape == (5, 64)
    source = [row for start, stop in runs.within(rows) for row in range(start, stop)]
    assert source == [2, 3, 0, 1, 2][slice(*rows) if rows else slice(None)]


def test_every_kind_can_be_evaluated() -> None:
    found = (inspect.getmembers(module, inspect.isclass) for module in (expressions, encodings, rearranged))
    classes = {kind for members in found for name, kind in members if hasattr(kind, "of_expert") and name[0] != "_"}
    assert classes - {Expression, expressions.Derived} == _EVALUATIONS.keys()


def test_fused_experts_of_another_width_are_named() -> None:
    catalogue = Catalogue([tensor("gate_up", "F32", 2, 12, 4)], "folder")
    with pytest.raises(BadInput, match=r"^gate_up in file has shape \[2, 12, 4\], expected 10 rows for each expert"):
        catalogue.experts("experts.{}.gate", "gate_up", (2, 5, 4), half=0)
    catalogue = Catalogue([tensor("gate_up", "F32", 2, 12, 4)], "folder")
    up = catalogue.experts("experts.{}.up", "gate_up", (2, 6, 4), half=1)
    gate = catalogue.experts("experts.{}.gate", "gate_up", (2, 6, 4), half=0)
    assert (gate, up) == (Rows(Read(tensor("gate_up", "F32", 2, 12, 4)), 0, 6), Rows(gate.source, 6, 12))  # type: ignore[attr-defined]
    catalogue.finish()
