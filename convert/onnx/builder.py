"""Makes the nodes of an ONNX graph; weights appear as the places where a plan has put them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from ...archs.graph import Norm
from ...archs.weights import Weight
from ...quant.planning.onnx_packing import PACKINGS
from ...quant.planning.onnx_plan import OnnxPlan, StoredArray

OPSETS = {"": 24, "com.microsoft": 1}
IR_VERSION = 11

_END = 1 << 62  # behind the last element of any axis

Shape = Sequence[int | str]
Made = TypeVar("Made")


def _type(dtype: str) -> ir.DataType:
    return ir.DataType.from_numpy(np.dtype(dtype))


@dataclass(frozen=True)
class State:
    """What the model remembers between two runs: it reads `input` and gives the next one as `output`.

    `shape` is that of the initial state for a single text, which is filled with `fill`.
    """

    input: str
    output: str
    shape: tuple[int, ...]
    fill: float = 0.0


class Builder:
    """A graph in the making.

    Values are float32 unless said otherwise. Names of nodes and values follow `scope`, which the caller sets.

    Args:
        plan: types and places of the weights.
        accuracy_level: of products with whole numbers: 0 keeps activations in float32, 4 rounds them to 8 bits.
    """

    def __init__(self, plan: OnnxPlan, accuracy_level: int) -> None:
        self.accuracy_level = accuracy_level
        self.scope = ""
        self.states: list[State] = []
        self._plan = plan
        self._nodes: list[ir.Node] = []
        self._inputs: dict[str, ir.Value] = {}
        self._state_shapes: dict[str, Shape] = {}
        self._outputs: list[ir.Value] = []
        self._initializers: dict[str, ir.Value] = {}
        self._made: dict[Any, Any] = {}

    # Graph

    def input(self, name: str, dtype: str, shape: Shape) -> ir.Value:
        """An input of the model; asking twice gives the same one."""
        if name not in self._inputs:
            self._inputs[name] = ir.Value(name=name, type=ir.TensorType(_type(dtype)), shape=ir.Shape(shape))
        return self._inputs[name]

    def tokens(self) -> ir.Value:
        """Token ids, int64 [batch, sequence]."""
        return self.input("input_ids", "int64", ["batch", "sequence"])

    def output(self, name: str, value: ir.Value, dtype: str, shape: Shape) -> None:
        value.name, value.type, value.shape = name, ir.TensorType(_type(dtype)), ir.Shape(shape)
        self._outputs.append(value)

    def state(
        self, input: str, output: str, shape: Sequence[int], growing: int | None = None, fill: float = 0.0
    ) -> ir.Value:
        """A state, float32 ["batch", *shape], of which axis `growing` may have any size; `remember` gives the next one.

        `shape` and `fill` are those of the initial state.
        """
        self.states.append(State(input, output, (1, *shape), fill))
        growth = f"{input}.size"
        self._state_shapes[output] = ["batch", *(growth if axis == growing else n for axis, n in enumerate(shape))]
        return self.input(input, "float32", self._state_shapes[output])

    def remember(self, output: str, value: ir.Value) -> None:
        """Make a value the next state of that name."""
        next_shape = [f"next.{size}" if str(size).endswith(".size") else size for size in self._state_shapes[output]]
        self.output(output, value, "float32", next_shape)

    def op(self, type: str, *inputs: ir.Value | None, domain: str = "", **attributes: Any) -> ir.Value:
        """A node with one output."""
        return self.ops(type, *inputs, outputs=1, domain=domain, **attributes)[0]

    def ops(
        self, type: str, *inputs: ir.Value | None, outputs: int, domain: str = "", **attributes: Any
    ) -> Sequence[ir.Value]:
        """A node with several outputs."""
        name = f"{self.scope}/{type}_{len(self._nodes)}"
        results = [ir.Value(name=f"{name}:{number}") for number in range(outputs)]
        self._nodes.append(ir.node(type, inputs, attributes, domain=domain, outputs=results, name=name))
        return results

    def microsoft(self, type: str, *inputs: ir.Value | None, **attributes: Any) -> ir.Value:
        """A node of ONNX Runtime's own operators."""
        return self.op(type, *inputs, domain="com.microsoft", **attributes)

    def constant(self, value: NDArray[Any] | float | int | Sequence[int]) -> ir.Value:
        """Numbers that are no weights: a float is float32, whole numbers are int64."""
        array = np.asarray(value, np.float32) if isinstance(value, float) else np.asarray(value)
        key = (array.dtype.str, array.shape, array.tobytes())
        return self.once(key, lambda: self._initializer(f"constant_{len(self._initializers)}", ir.tensor(array)))

    def split(self, value: ir.Value, sizes: Sequence[int]) -> Sequence[ir.Value]:
        """Parts of the given sizes along the last axis."""
        if len(sizes) == 1:
            return [value]
        return self.ops("Split", value, self.constant([*sizes]), outputs=len(sizes), axis=-1)

    def slice(self, value: ir.Value, start: ir.Value, stop: ir.Value | None, axis: int) -> ir.Value:
        """From `start` to before `stop`, int64 [1], or to the end."""
        end = self.constant([_END]) if stop is None else stop
        return self.op("Slice", value, start, end, self.constant([axis]))

    def scaled(self, value: ir.Value, factor: float) -> ir.Value:
        """A number times the value."""
        return value if factor == 1.0 else self.op("Mul", value, self.constant(float(factor)))

    def reshape(self, value: ir.Value, shape: Sequence[int]) -> ir.Value:
        """In another shape, where 0 keeps a dimension and -1 is what the others leave."""
        return self.op("Reshape", value, self.constant([*shape]))

    def known(self, value: ir.Value, *shape: int | str) -> ir.Value:
        """The same value, of a shape that ONNX Runtime cannot work out itself; one name is one size in all of a graph.

        It uses memory again by shapes, and takes time that grows with the square of how many it does not know.
        """
        value.type, value.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape(shape)
        return value

    def silu(self, value: ir.Value) -> ir.Value:
        return self.microsoft("QuickGelu", value, alpha=1.0)  # x * sigmoid(x)

    def to_int32(self, value: ir.Value) -> ir.Value:
        return self.op("Cast", value, to=ir.DataType.INT32)

    def once(self, key: Any, make: Callable[[], Made]) -> Made:
        """What `make` gave the first time it was asked for under this key: values that all layers share."""
        if key not in self._made:
            self._made[key] = make()
        made: Made = self._made[key]
        return made

    def model(self) -> ir.Model:
        """The finished model."""
        graph = ir.Graph(
            list(self._inputs.values()),
            self._outputs,
            nodes=self._nodes,
            initializers=list(self._initializers.values()),
            opset_imports=OPSETS,
            name="main",
        )
        return ir.Model(graph, ir_version=IR_VERSION, producer_name="moecast")

    # Weights

    def weight(self, weight: Weight, shape: Sequence[int] | None = None) -> ir.Value:
        """A weight that is stored as it is, in the shape that an operator wants."""
        (array,) = self._plan.placements[weight.name].arrays
        return self._stored(array, shape or array.shape)

    def packed(self, weight: Weight, shape: Sequence[int] | None = None) -> tuple[ir.Value, ir.Value]:
        """Numbers, in the shape that an operator wants, and scales of a packed weight."""
        numbers, scales = self._plan.placements[weight.name].arrays
        return self._stored(numbers, shape or numbers.shape), self._stored(scales, scales.shape)

    def packing(self, weight: Weight) -> dict[str, int] | None:
        """`bits` and `block_size` of a packed weight; None for one that is stored as it is."""
        packing = PACKINGS.get(self._plan.placements[weight.name].type.name)
        return {"bits": packing.bits, "block_size": packing.block} if packing else None

    def project(self, states: ir.Value, weight: Weight, part: tuple[int, int] | None = None) -> ir.Value:
        """states [..., columns] -> [..., rows], or through rows `part` of the matrix alone."""
        first, last = part or (0, weight.shape[0])
        arrays = [array.rows(first, last) for array in self._plan.placements[weight.name].arrays]
        packing = self.packing(weight)
        if packing is None:
            return self.microsoft("FusedMatMul", states, self._stored(arrays[0], arrays[0].shape), transB=1)
        blocks, block_bytes = weight.columns // packing["block_size"], packing["block_size"] * packing["bits"] // 8
        numbers = self._stored(arrays[0], (last - first, blocks, block_bytes))
        scales = self._stored(arrays[1], arrays[1].shape)
        shape = {"N": last - first, "K": weight.columns}
        return self.microsoft(
            "MatMulNBits", states, numbers, scales, **shape, accuracy_level=self.accuracy_level, **packing
        )

    def project_heads(self, states: ir.Value, weight: Weight) -> ir.Value:
        """states [batch, heads, sequence, columns] -> [batch, heads, sequence, rows], each head by its own matrix."""
        return self.microsoft("FusedMatMul", states, self.weight(weight), transB=1)

    def rows(self, indices: ir.Value, weight: Weight) -> ir.Value:
        """The rows of a matrix that whole numbers [...] name: [..., columns]"""
        packing = self.packing(weight)
        if packing is None:
            return self.op("Gather", self.weight(weight), indices, axis=0)
        numbers, scales = self.packed(weight)
        inputs = (numbers, indices, scales)
        return self.microsoft("GatherBlockQuantized", *inputs, gather_axis=0, quantize_axis=1, **packing)

    def norm(self, states: ir.Value, norm: Norm) -> ir.Value:
        """A norm over the last axis."""
        if norm.centered:
            weights = [self.weight(weight) for weight in (norm.weight, norm.bias) if weight]
            return self.op("LayerNormalization", states, *weights, axis=-1, epsilon=norm.epsilon)
        return self.op("RMSNormalization", states, self.weight(norm.weight), axis=-1, epsilon=norm.epsilon)

    def normalize(self, states: ir.Value, size: int, epsilon: float) -> ir.Value:
        """RMSNorm without a weight over the last axis, which has that size."""
        return self.op("RMSNormalization", states, self.constant(np.ones(size, np.float32)), axis=-1, epsilon=epsilon)

    def _stored(self, array: StoredArray, shape: Sequence[int]) -> ir.Value:
        """An array in the shape that an operator wants; in another one too, where two operators share it."""
        name, wanted = array.name, ir.Shape(shape)
        if name in self._initializers and self._initializers[name].shape != wanted:
            name = f"{name}.{'x'.join(map(str, shape))}"
        if name not in self._initializers:
            tensor = ir.ExternalTensor(
                array.file, array.offset, array.bytes, _type(array.dtype), shape=wanted, name=name
            )
            self._initializer(name, tensor)
        return self._initializers[name]

    def _initializer(self, name: str, tensor: ir.TensorProtocol) -> ir.Value:
        shape = ir.Shape(tensor.shape.numpy())
        value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=shape, const_value=tensor)
        self._initializers[name] = value
        return value
