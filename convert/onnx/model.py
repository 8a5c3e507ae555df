"""A whole graph as an ONNX model: prompts, pieces of them and single steps are all the same model.

Inputs are those of onnxruntime-genai, as far as the blocks need them: `input_ids` and `position_ids` [batch, sequence],
`attention_mask` [batch, all tokens so far], all int64, and a float32 state for everything that is remembered. Outputs:
`logits` [batch, sequence, vocabulary size] and the next states.
"""

from __future__ import annotations

import onnx_ir as ir

from ...archs.graph import MLP, Attention, CompressedAttention, Mamba2, MoE, Operation
from ...quant.planning.onnx_plan import OnnxPlan
from .attention import attention
from .builder import Builder, State
from .compressed_attention import compressed_attention
from .experts import mlp, moe
from .mamba import mamba
from .residual import residual_of

ACTIVATIONS = {"int8": 4, "float32": 0}
"""What products with packed weights round activations to, and ONNX Runtime's accuracy level for it."""


def build_model(plan: OnnxPlan, activations: str = "int8") -> tuple[ir.Model, list[State]]:
    """The model that computes a plan's graph, and its states."""
    graph = plan.graph
    build = Builder(plan, ACTIVATIONS[activations])
    tokens = build.input("input_ids", "int64", ["batch", "sequence"])
    residual = residual_of(graph, build)
    hidden = residual.begin(build.rows(tokens, graph.embedding))
    for layer in graph.layers:
        for number, sublayer in enumerate(layer.sublayers):
            build.scope = f"layer.{layer.index}.{number}"
            read, join = residual.branch(sublayer, hidden)
            normed = build.norm(read, sublayer.norm)
            output = _operation(build, sublayer.operation, normed, tokens, layer.index)
            hidden = join(build.known(output, "batch", "sequence", graph.hidden_size))
    build.scope = "head"
    logits = build.project(build.norm(residual.end(hidden), graph.final_norm), graph.head)
    build.output("logits", logits, "float32", ["batch", "sequence", graph.vocabulary_size])
    return build.model(), build.states


def _operation(build: Builder, operation: Operation, normed: ir.Value, tokens: ir.Value, layer: int) -> ir.Value:
    """[batch, sequence, hidden size] -> the same shape."""
    match operation:
        case Attention():
            return attention(build, operation, normed, layer)
        case CompressedAttention():
            return compressed_attention(build, operation, normed, layer)
        case Mamba2():
            return mamba(build, operation, normed, layer)
        case MoE():
            return moe(build, operation, normed, tokens)
        case MLP():
            return mlp(build, operation, normed)
