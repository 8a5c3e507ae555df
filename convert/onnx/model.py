"""A whole graph as an ONNX model: prompts, pieces of them and single steps are all the same model.

Inputs are those of onnxruntime-genai, as far as the blocks need them: `input_ids` and `position_ids` [batch, sequence],
`attention_mask` [batch, all tokens so far], all int64, and a float32 state for everything that is remembered. Outputs:
`logits` [batch, sequence, vocabulary size] and the next states.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial, reduce
from typing import Any

import onnx_ir as ir

from ...archs.graph import (
    MLP,
    Attention,
    Branch,
    CompressedAttention,
    GatedDeltaNet,
    Graph,
    LatentAttention,
    Mamba2,
    MoE,
    Operation,
)
from ...archs.weights import Weight
from ...errors import BadInput
from ...quant.planning.onnx_plan import OnnxPlan
from .attention import attention
from .builder import Builder, State
from .compressed_attention import compressed_attention
from .deltanet import delta_net
from .experts import dense, moe
from .latent_attention import latent_attention
from .mamba import mamba
from .residual import residual_of

ACTIVATIONS = {"int8": 4, "float32": 0}
"""What products with packed weights round activations to, and ONNX Runtime's accuracy level for it."""

Form = Callable[[Builder, Any, ir.Value, int], ir.Value]
"""Operation, states [batch, sequence, hidden size] and number of the layer -> what is added, of the same shape."""

ONNX_FORMS: Mapping[type[Operation], Form] = {
    Attention: attention,
    CompressedAttention: compressed_attention,
    GatedDeltaNet: delta_net,
    LatentAttention: latent_attention,
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
    hidden = residual.begin(build.scaled(build.rows(tokens, graph.embedding), graph.embedding_scale))
    for layer in graph.layers:
        for number, sublayer in enumerate(layer.sublayers):
            build.scope = f"layer.{layer.index}.{number}"
            read, join = residual.branch(sublayer, hidden)
            outputs = [_branch(build, graph, branch, read, layer.index) for branch in sublayer.branches]
            output = reduce(partial(build.op, "Add"), outputs)
            hidden = join(build.norm(output, sublayer.post_norm) if sublayer.post_norm else output)
            if isinstance(sublayer.scale, Weight):
                hidden = build.op("Mul", hidden, build.weight(sublayer.scale))
            elif sublayer.scale is not None:
                hidden = build.scaled(hidden, sublayer.scale)
    build.scope = "head"
    logits = build.project(build.norm(residual.end(hidden), graph.final_norm), graph.head)
    logits = build.scaled(logits, graph.logit_scale)
    if graph.logit_softcap is not None:
        cap = graph.logit_softcap
        logits = build.scaled(build.op("Tanh", build.scaled(logits, 1 / cap)), cap)
    build.output("logits", logits, "float32", ["batch", "sequence", graph.vocabulary_size])
    return build.model(), build.states


def _branch(build: Builder, graph: Graph, branch: Branch, read: ir.Value, layer: int) -> ir.Value:
    """[batch, sequence, hidden size] -> what the branch adds, of the same shape."""
    normed = build.norm(read, branch.norm) if branch.norm else read
    output = _form_of(branch.operation)(build, branch.operation, normed, layer)
    output = build.known(output, "batch", "sequence", graph.hidden_size)
    return build.norm(output, branch.post_norm) if branch.post_norm else output


def _form_of(operation: Operation) -> Form:
    """How an operation is written. Raises BadInput for one that has no form here."""
    form = ONNX_FORMS.get(type(operation))
    if form is None:
        raise BadInput(f"ONNX has no form for {type(operation).__name__} yet: use --to gguf")
    return form
