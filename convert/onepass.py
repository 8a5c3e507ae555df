"""The one pass over a model's layers: calibration, conversion and proof side by side.

Up to three lanes advance together. Calibration tokens run through the source while the inputs of its weights are
watched. Evaluation tokens run through the source, and once more through what is written: the candidate's weights are
encoded at the moment it asks for them, with the importance that calibration has just given. What no lane asked for,
experts that no token reached for one, is encoded when the lanes are done with it.
"""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from dataclasses import dataclass
from datetime import timedelta
from functools import partial

from torch import Tensor

from ..quant.importance import Statistics
from ..quant.plan import Plan
from ..runner.evaluate import Parity, compare_heads, relative_error, summarise, with_bos
from ..runner.memory import peak_rss_bytes
from ..runner.observe import ObservingWeights
from ..runner.stream import Stream, advance
from ..runner.weights import ModelWeights
from ..sources.model import Model
from ..sources.progress import Progress
from .encode import CastingWeights, Encoder, Importance, Writer
from .imatrix import ImatrixWriter


@dataclass(frozen=True)
class Lanes:
    """Token ids [chunks, context] to calibrate with and to evaluate on; None leaves out what they are for."""

    calibration: Tensor | None = None
    evaluation: Tensor | None = None


def cast(
    model: Model,
    plan: Plan,
    writer: Writer,
    lanes: Lanes,
    progress: Progress,
    importance: Importance | None = None,
    imatrix: ImatrixWriter | None = None,
    threads: int | None = None,
) -> Parity | None:
    """Write every tensor of a plan, and compare the result with its source on the evaluation tokens.

    Args:
        importance: what to weigh columns by where there is no calibration.
        imatrix: receives what calibration finds.

    Raises BadInput naming a stored tensor, a block or an expert whose numbers are not finite.
    """
    source, statistics = ModelWeights(model), Statistics()
    known = importance if lanes.calibration is None else statistics
    encoder = Encoder(source, plan, writer, progress, known, threads)
    streams: list[Stream] = []
    if lanes.calibration is not None:
        tokens = with_bos(lanes.calibration, model.tokenizer)
        streams.append(Stream(model, tokens, weights=ObservingWeights(source, statistics)))
    if lanes.evaluation is not None:
        tokens = with_bos(lanes.evaluation, model.tokenizer)
        candidate = CastingWeights(encoder, f"{model.path} as {plan.recipe.name}")
        streams += [Stream(model, tokens, weights=source), Stream(model, tokens, weights=candidate)]
    errors: list[float] = []
    lines = _Lines(plan, progress)
    for layers in zip(*(stream.weights.graph.layers for stream in streams), strict=True):
        index = layers[0].index
        advance(streams, layers, partial(encoder.finish_expert, index))
        encoder.finish(index)
        if lanes.evaluation is not None:
            errors.append(relative_error(streams[-2].hidden, streams[-1].hidden))
        if imatrix:
            imatrix.add(statistics)
        lines.write(index, errors[-1] if errors else None, statistics)
        statistics.clear()
    result = None
    if lanes.evaluation is not None:
        chunks, context = lanes.evaluation.shape
        divergence = compare_heads(streams[-2], streams[-1], lanes.evaluation)
        result = summarise(divergence, tuple(errors), context, chunks)
    encoder.finish_all()
    return result


class _Lines:
    """A line for each layer that is done."""

    def __init__(self, plan: Plan, progress: Progress) -> None:
        self._progress = progress
        self._layers = len(plan.graph.layers)
        self._started = time.monotonic()
        self._types: dict[int | None, Counter[str]] = defaultdict(Counter)
        for tensor in plan.tensors:
            if not tensor.weight.role.protected:
                self._types[tensor.weight.layer][tensor.type.name] += 1

    def write(self, layer: int, error: float | None, statistics: Statistics) -> None:
        facts = [" + ".join(f"{count} {name}" for name, count in self._types[layer].most_common())]
        if error is not None:
            facts.append(f"relative error {error:.1e}")
        tokens = statistics.expert_tokens
        if tokens is not None:
            facts.append(f"{int((tokens > 0).sum())} of {len(tokens)} experts seen, fewest {int(tokens.min())} tokens")
        facts.append(f"{peak_rss_bytes() / 1e9:.1f} GB")
        left = (time.monotonic() - self._started) / (layer + 1) * (self._layers - layer - 1)
        facts.append(f"{timedelta(seconds=round(left))} left")
        self._progress.note(f"Layer {layer}: {', '.join(facts)}")
