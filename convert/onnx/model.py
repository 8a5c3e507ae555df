"""A whole graph as an ONNX model: prompts, pieces of them and single steps are all the same model.

Inputs are those of onnxruntime-genai, as far as the blocks need them: `input_ids` and `position_ids` [batch, sequence],
`attention_mask` [batch, all tokens so far], all int64, and a float32 state for everything that is remembered. Outputs:
`logits` [batch, sequence, vocabulary size] and the next states.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import onnx_ir as ir

from ...archs.graph import MLP, Attention, CompressedAttention, Mamba2, MoE, Operation
from ...errors import BadInput
from ...quant.planning.onnx_plan import OnnxPlan
from .attention import attention
from .builder import Builder, State
from .compressed_attention import compressed_attention
from .experts import dense, moe
from .mamba import mamba
from .residual import residual_of

ACTIVATIONS = {"int8": 4, "float32": 0}
"""What products with packed weights round activations to, and ONNX Runtime's accuracy level for it."""

Form = Callable[[Builder, Any, ir.Value, int], ir.Value]
"""Operation, states [batch, sequence, hidden size] and number of the layer -> what is added, of the same shape."""

ONNX_FORMS: Mapping[type[Operation], Form] = {
    Attention: attention,
    CompressedAttention: compressed_attention,
    Mamba2: mamba,
    MLP: dense,
    MoE: moe,
}


def build_model(plan: OnnxPlan, activations: str = "int8") -> tuple[ir.Model, list[State]]:
    """The model that computes a plan's graph, and its states. Raises BadInput for what has no form in ONNX."""
    graph = plan.graph
    build = Builder(plan, ACTIVATIONS[activations])
    tokens = build.tokens()
    residual = residual_of(graph, build)
    hidden = residual.begin(build.rows(tokens, graph.embedding))
    for layer in graph.layers:
        for number, sublayer in enumerate(layer.sublayers):
            build.scope = f"layer.{layer.index}.{number}"
            read, join = residual.branch(sublayer, hidden)
            normed = build.norm(read, sublayer.norm)
            output = _form_of(sublayer.operation)(build, sublayer.operation, normed, layer.index)
            hidden = join(build.known(output, "batch", "sequence", graph.hidden_size))
    build.scope = "head"
    logits = build.project(build.norm(residual.end(hidden), graph.final_norm), graph.head)
    build.output("logits", logits, "float32", ["batch", "sequence", graph.vocabulary_size])
    return build.model(), build.states


def _form_of(operation: Operation) -> Form:
    """How an operation is written. Raises BadInput for one that has no form here."""
    form = ONNX_FORMS.get(type(operation))
    if form is None:
        raise BadInput(f"ONNX has no form for {type(operation).__name__} yet: use --to gguf")
    return form
