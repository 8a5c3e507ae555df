"""Several plans for one model side by side: the divergence of each from the model, in one pass and without files."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..quant.importance import Importance, Statistics
from ..quant.plan import Plan
from ..sources.model import Model
from ..sources.progress import Progress
from .evaluate import compare_heads, with_bos
from .observe import calibration_lanes
from .quantized import Quantizer, RoundedWeights
from .scores import Divergence
from .stream import Stream, advance
from .weights import ModelWeights


def divergences(
    model: Model,
    plans: Sequence[Plan],
    tokens: Tensor,
    calibration: Tensor | None,
    importance: Importance | None,
    progress: Progress,
) -> list[Divergence]:
    """How far each plan is from the model on `tokens` [chunks, context].

    Columns are weighed by what the calibration tokens show, or else by `importance`. Plans for padded forms of the
    model's graph may take part. The second half of each chunk is scored.
    """
    source, statistics = ModelWeights(model), Statistics()
    quantizer = Quantizer(source, importance if calibration is None else statistics)
    inputs = with_bos(tokens, model.tokenizer)
    observers = calibration_lanes(model, calibration, source, statistics)
    reference = Stream(model, inputs, weights=source)
    candidates = [Stream(model, inputs, weights=_rounded(quantizer, plan)) for plan in plans]
    streams = [*observers, reference, *candidates]
    progress.begin("Comparing plans", len(model.graph.layers), "layers")
    for layers in zip(*(stream.weights.graph.layers for stream in streams), strict=True):
        advance(streams, layers)
        statistics.clear()
        progress.advance(1, f"layer {layers[0].index}")
    return compare_heads(reference, candidates, tokens)


def _rounded(quantizer: Quantizer, plan: Plan) -> RoundedWeights:
    types = {t.weight.name: t.type.name for t in plan.tensors if t.type.name not in ("F32", "I32")}
    return RoundedWeights(quantizer, plan.graph, types)
