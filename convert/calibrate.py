"""Measures an importance matrix without converting: calibration alone."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import torch

from ..progress import NoProgress, Progress
from ..quant.rounding.statistics import Statistics
from ..runner.measure.evaluate import CALIBRATION_TEXT, DEFAULT_CONTEXT, chunk_tokens, dtype_name
from ..runner.memory import peak_rss_bytes, workspace
from ..runner.observe import ObservingWeights
from ..runner.passes import LayerPass
from ..runner.stream import advance
from ..runner.weights import ModelWeights
from ..sources.model import Model, open_model
from .gguf.imatrix import ImatrixWriter
from .resume.fingerprint import measurement_fingerprint, text_identity
from .resume.journal import Journal
from .resume.states import SavedStates, load_statistics, save_statistics


@dataclass(frozen=True)
class Calibration:
    """What was measured.

    Attributes:
        file: the importance matrix.
        tokens: how many tokens ran through the model, in chunks of `context`.
        unseen_experts: how many experts no token reached, over all layers.
        fewest_tokens: how many reached the expert with the fewest, None where there are no experts.
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
    calibration: str | Path = CALIBRATION_TEXT,
    *,
    context: int = DEFAULT_CONTEXT,
    chunks: int | None = None,
    overwrite: bool = False,
    memory: int | None = None,
    progress: Progress | None = None,
    compute_dtype: torch.dtype = torch.float32,
) -> Calibration:
    """Write llama.cpp's importance matrix of a model on a text: what llama-imatrix writes, layer by layer.

    Activations that do not fit into `memory` bytes for the whole process go to a scratch file beside the output, which
    changes no number. A journal beside the output records what is done: stopped by whatever means, the same call
    continues. `compute_dtype` as for `perplexity`. Raises BadInput for an existing output, less memory than the
    model takes, a text that is too short, and numbers that are not finite.
    """
    started = time.monotonic()
    model = model if isinstance(model, Model) else open_model(model)
    progress = progress or NoProgress()
    tokens = chunk_tokens(model.tokenizer, Path(calibration), context, chunks)
    room = workspace(memory, model.graph, tokens.numel(), context, Path(output).parent)
    statistics = Statistics()
    unseen, fewest = 0, []
    facts = {"calibration": text_identity(calibration, tokens), "the type of products": dtype_name(compute_dtype)}
    identity = measurement_fingerprint(model, facts)
    with (
        Journal(Path(output), identity, overwrite) as journal,
        ImatrixWriter(Path(output), Path(calibration), tokens, overwrite) as writer,
    ):
        layer_pass = LayerPass(model, room, SavedStates(journal, model.graph.layers))
        layer_pass.begin(tokens, ObservingWeights(ModelWeights(model, compute_dtype), statistics))
        progress.begin("Calibrating", len(model.graph.layers), "layers")
        for layer in model.graph.layers:
            if layer_pass.is_done(layer.index):
                seen = load_statistics(journal, layer.index)
            else:
                advance(layer_pass.streams, [layer])
                seen = statistics
                save_statistics(journal, layer.index, seen)
                layer_pass.save(layer.index)
            writer.add(seen)
            progress.advance(1, f"layer {layer.index}")
            experts = seen.expert_tokens
            if experts is not None:
                unseen += int((experts == 0).sum())
                fewest.append(int(experts.min()))
            statistics.clear()
    seconds, least = time.monotonic() - started, min(fewest, default=None)
    return Calibration(Path(output), tokens.numel(), context, unseen, least, seconds, peak_rss_bytes())
