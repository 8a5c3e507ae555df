"""Measures an importance matrix without converting: calibration alone."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from ..progress import NoProgress, Progress
from ..quant.rounding.statistics import Statistics
from ..runner.memory import workspace
from ..runner.observe import ObservingWeights
from ..runner.passes import CALIBRATION, LayerPass
from ..runner.settings import Compute
from ..runner.texts import CALIBRATION_TEXT
from ..runner.weights import ModelWeights
from ..sources.model import Model, open_model
from .gguf.imatrix import ImatrixWriter, Origin
from .gguf.metadata import source_metadata
from .resume.fingerprint import measurement_fingerprint, text_identity
from .resume.journal import Journal
from .resume.records import Spent
from .resume.states import SavedStates, holds_statistics, load_statistics, save_statistics
from .settings import Calibration


@dataclass(frozen=True)
class MeasuredMatrix:
    """What an importance matrix amounts to.

    Attributes:
        file: the importance matrix.
        tokens: how many tokens ran through the model, in chunks of `context`.
        unseen_experts: how many experts no token reached, over all layers.
        fewest_tokens: how many reached the expert with the fewest, None where there are no experts.
        seconds, peak_rss_bytes: what all runs took that worked at it, the largest memory of any.
    """

    file: Path
    tokens: int
    context: int
    unseen_experts: int
    fewest_tokens: int | None
    seconds: float
    peak_rss_bytes: int


def write_imatrix(
    model: Model | str | Path,
    output: str | Path,
    calibration: Calibration = Calibration(),
    compute: Compute = Compute(),
    overwrite: bool = False,
    progress: Progress | None = None,
    provenance: Mapping[str, str] | None = None,
) -> MeasuredMatrix:
    """Write llama.cpp's importance matrix of a model on a text: what llama-imatrix writes, layer by layer.

    A journal beside the output records what is done: stopped by whatever means, the same call continues. `provenance`
    is what is known of where the model came from, see `locate`. Raises
    BadInput for an existing output, less memory than the model takes, a text that is too short, and numbers that are
    not finite.
    """
    started = time.monotonic()
    model = model if isinstance(model, Model) else open_model(model)
    path, text, progress = Path(output), Path(calibration.text or CALIBRATION_TEXT), progress or NoProgress()
    tokens = calibration.tokens(model.tokenizer)
    room = workspace(compute, model.graph, tokens.numel(), calibration.context, path.parent)
    statistics = Statistics()
    unseen, fewest = 0, []
    facts = {"calibration": text_identity(text, tokens), "compute dtype": compute.dtype}
    identity = measurement_fingerprint(model, facts | {"device": room.device.type})
    with (
        room,
        Journal(path, identity, overwrite, progress) as journal,
        ImatrixWriter(path, Origin.of(text, tokens, source_metadata(provenance or {})), overwrite) as writer,
    ):
        layers = model.graph.layers
        layer_pass = LayerPass(model, room, SavedStates(journal, layers, intact=partial(holds_statistics, journal)))
        source = ModelWeights(model, compute.torch_dtype, room.device)
        layer_pass.begin(CALIBRATION, tokens, ObservingWeights(source, statistics))
        progress.begin("Calibrating", len(layers), "layers", layer_pass.passed)
        for layer in layers:
            if layer_pass.is_done(layer.index):
                seen = load_statistics(journal, layer.index)
            else:
                layer_pass.advance([layer])
                seen = statistics
                save_statistics(journal, layer.index, seen)
                layer_pass.save(layer.index)
                progress.advance(1, f"layer {layer.index}")
            writer.add(seen.sums, seen.counts)
            experts = seen.expert_tokens
            if experts is not None:
                unseen += int((experts == 0).sum())
                fewest.append(int(experts.min()))
            statistics.clear()
    spent, least = journal.earlier + Spent.since(started), min(fewest, default=None)
    context = calibration.context
    return MeasuredMatrix(path, tokens.numel(), context, unseen, least, spent.seconds, spent.peak_rss_bytes)
