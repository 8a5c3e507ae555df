"""What ONNX Runtime computes from unpacked blocks is what ggml reads from the blocks themselves."""

from __future__ import annotations

import ggml
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from moecast.convert.onnx.unpack import unpack_blocks
from moecast.quant import quantize
from moecast.quant.planning.onnx_packing import PACKINGS
from onnx import TensorProto, helper

ROWS, COLUMNS = 8, 512


def _multiplied(numbers: torch.Tensor, scales: torch.Tensor, name: str) -> np.ndarray:
    """The matrix as ONNX Runtime's MatMulNBits sees it: its product with the identity."""
    packing = PACKINGS[name]
    blob = packing.block * packing.bits // 8
    weights = {"numbers": numbers.view(ROWS, -1, blob).numpy(), "scales": scales.numpy()}
    node = helper.make_node(
        "MatMulNBits", ["x", *weights], ["y"], domain="com.microsoft",
        K=COLUMNS, N=ROWS, bits=packing.bits, block_size=packing.block, accuracy_level=0,
    )  # fmt: skip
    ports = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("x", "y")]
    tensors = [onnx.numpy_helper.from_array(value, name) for name, value in weights.items()]
    graph = helper.make_graph([node], "product", ports[:1], ports[1:], tensors)
    opsets = [helper.make_opsetid("", 24), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=11)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": np.eye(COLUMNS, dtype=np.float32)})[0].T


@pytest.mark.parametrize("name", PACKINGS)
def test_unpacked_blocks_are_the_same_matrix(name: str) -> None:
    values = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(3))
    values[0] = 0  # a scale of zero
    values[1] *= 1e-3
    stored = quantize(values, name)
    numbers, scales = unpack_blocks(stored, name)
    assert numbers.dtype == torch.uint8 and scales.shape == (ROWS, COLUMNS // PACKINGS[name].block)
    assert np.array_equal(_multiplied(numbers, scales, name), ggml.dequantize(stored.numpy(), name))
