"""Compares candidate plans: the divergence of each from its model, side by side in one pass, without files."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ...quant.planning.plan import Plan
from ..passes import CANDIDATE, REFERENCE, Measuring
from .evaluate import compare_heads
from .rounded import Quantizer, RoundedWeights
from .scores import Divergence


def divergences(measuring: Measuring, plans: Sequence[Plan], tokens: Tensor) -> list[Divergence]:
    """How far each plan is from the model on `tokens` [chunks, context].

    Plans for padded forms of the model's graph may take part. The second half of each chunk is scored.
    """
    source = measuring.weights()
    layer_pass, statistics, importance = measuring.begin(source)
    quantizer = Quantizer(source, importance)
    reference = layer_pass.begin(REFERENCE, tokens, source)
    names = (f"{CANDIDATE} {number}" for number in range(len(plans)))
    rounded = (_rounded(quantizer, plan) for plan in plans)
    candidates = [layer_pass.begin(name, tokens, weights) for name, weights in zip(names, rounded, strict=True)]
    graphs = [stream.weights.graph for stream in layer_pass.streams.values()]
    measuring.progress.begin("Comparing plans", len(reference.weights.graph.layers), "layers", layer_pass.passed)
    for layers in zip(*(graph.layers for graph in graphs), strict=True):
        index = layers[0].index
        if not layer_pass.is_done(index):
            layer_pass.advance(layers)
            statistics.clear()
            layer_pass.save(index)
            measuring.progress.advance(1, f"layer {index}")
    measuring.end(layer_pass, statistics)
    return compare_heads(reference, candidates, tokens)


def _rounded(quantizer: Quantizer, plan: Plan) -> RoundedWeights:
    types = {t.weight.name: t.type.name for t in plan.tensors if t.type.name not in ("F32", "I32")}
    return RoundedWeights(quantizer, plan.graph, types)
