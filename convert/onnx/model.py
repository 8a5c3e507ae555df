"""A whole graph as an ONNX model: prompts, pieces of them and single steps are all the same model.

Inputs are those of onnxruntime-genai, as far as the blocks need them: `input_ids` and `position_ids` [batch, sequence],
`attention_mask` [batch, all tokens so far], all int64, and a float32 state for everything that is remembered. Outputs:
`logits` [batch, sequence, vocabulary size] and the next states.
"""

from __future__ import annotations

import onnx_ir as ir

from ...archs.errors import BadInput
from ...archs.graph import MLP, Attention, MoE, Operation
from ...quant.onnx_plan import OnnxPlan
from .attention import attention
from .builder import Builder, State
from .experts import mlp, moe

ACTIVATIONS = {"int8": 4, "float32": 0}
"""What products with packed weights round activations to, and ONNX Runtime's accuracy level for it."""


def build_model(plan: OnnxPlan, activations: str = "int8") -> tuple[ir.Model, list[State]]:
    """The model that computes a plan's graph, and its states.

    Raises BadInput for a graph with blocks that have no form in ONNX.
    """
    graph = plan.graph
    if graph.residual:
        raise BadInput(f"{graph.architecture}: hyper-connections cannot be written as ONNX, use --to gguf")
    build = Builder(plan, ACTIVATIONS[activations])
    tokens = build.input("input_ids", "int64", ["batch", "sequence"])
    hidden = build.rows(tokens, graph.embedding)
    for layer in graph.layers:
        for number, sublayer in enumerate(layer.sublayers):
            build.scope = f"layer.{layer.index}.{number}"
            normed = build.norm(hidden, sublayer.norm)
            hidden = build.op("Add", hidden, _operation(build, sublayer.operation, normed, tokens, layer.index))
    build.scope = "head"
    logits = build.project(build.norm(hidden, graph.final_norm), graph.head)
    build.output("logits", logits, "float32", ["batch", "sequence", graph.vocabulary_size])
    return build.model(), build.states


def _operation(build: Builder, operation: Operation, normed: ir.Value, tokens: ir.Value, layer: int) -> ir.Value:
    """[batch, sequence, hidden size] -> the same shape."""
    match operation:
        case Attention():
            return attention(build, operation, normed, layer)
        case MoE():
            return moe(build, operation, normed, tokens)
        case MLP():
            return mlp(build, operation, normed)
    raise BadInput(f"{type(operation).__name__} cannot be written as ONNX, use --to gguf")
