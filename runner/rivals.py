"""Several plans for one model side by side: the divergence of each from the model, in one pass and without files."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..archs.graph import Graph
from ..quant.formats import Format
from ..quant.plan import Plan
from ..sources.model import Model
from ..sources.progress import Progress
from .evaluate import compare_heads, targets_of, with_bos
from .quantized import Importance, QuantizedWeights, Quantizer
from .stream import Stream, advance
from .weights import ModelWeights


def divergences(
    model: Model, plans: Sequence[Plan], tokens: Tensor, importance: Importance | None, progress: Progress
) -> list[Tensor]:
    """KL(model || plan) in nats, float64 [positions], of each plan on `tokens` [chunks, context].

    Plans for padded forms of the model's graph may take part. The second half of each chunk is scored.
    """
    reference = Stream(model, with_bos(tokens, model.tokenizer))
    forms: list[tuple[Graph, Quantizer]] = []
    streams = [_lane(model, plan, reference.tokens, importance, forms) for plan in plans]
    progress.begin("Comparing plans", len(model.graph.layers), "layers")
    for index, layer in enumerate(model.graph.layers):
        advance([reference, *streams], [layer, *(stream.weights.graph.layers[index] for stream in streams)])
        progress.advance(1, f"layer {index}")
    found = compare_heads(reference, streams, targets_of(tokens), tokens.shape[1])
    return [divergence.kld for divergence in found]


def _lane(
    model: Model, plan: Plan, tokens: Tensor, importance: Importance | None, forms: list[tuple[Graph, Quantizer]]
) -> Stream:
    quantizer = next((known for graph, known in forms if graph == plan.graph), None)
    if quantizer is None:
        quantizer = Quantizer(ModelWeights(model, plan.graph), importance)
        forms.append((plan.graph, quantizer))
    types = {t.weight.name: t.type.name for t in plan.tensors if _rounds(t.type)}
    return Stream(model, tokens, weights=QuantizedWeights(quantizer, types))


def _rounds(type: Format) -> bool:
    return type.name not in ("F32", "I32")
