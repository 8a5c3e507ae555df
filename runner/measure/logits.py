"""Next-token logits of whole texts, for models that run in an engine of their own, and of streams beside them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ...progress import Progress
from ...sources.model import Model
from ..activations import Workspace
from ..engines import OnnxModel
from ..stream import Stream
from ..weights import ModelWeights
from .scores import Divergence, Scores

LogitSource = Callable[[int], Tensor]  # number of a chunk -> float32 [scored positions, vocabulary size]
_WORDS = 4096  # of the vocabulary at a time: what is computed from logits needs several times their memory


def logit_source(
    model: Model | OnnxModel,
    tokens: Tensor,
    positions: slice,
    progress: Progress,
    compute_dtype: torch.dtype = torch.float32,
    workspace: Workspace | None = None,
) -> LogitSource:
    """A model's logits at `positions` of every chunk of `tokens` [chunks, context].

    A stream runs through all its layers here, once for all chunks; an engine whenever a chunk is asked for.
    """
    if isinstance(model, OnnxModel):
        return lambda chunk: model.advance(tokens[chunk], model.initial_state())[0][positions]
    workspace = workspace or Workspace()
    stream = Stream(model, tokens, weights=ModelWeights(model, compute_dtype, workspace.device), workspace=workspace)
    progress.begin(model.path.name, len(model.graph.layers), "layers")
    for layer in model.graph.layers:
        stream.advance(layer)
        progress.advance(1, f"layer {layer.index}")
    states = stream.final_states(positions).unflatten(0, (len(tokens), -1))
    return lambda chunk: stream.logits(states[chunk]).cpu()


def score(source: LogitSource, scores: Scores, chunks: int, progress: Progress) -> None:
    """Feed the logits of all chunks to `scores`, whose labels are those of one chunk after another."""
    progress.begin("Perplexity", chunks, "chunks")
    for chunk, part in enumerate(_parts(len(scores.labels), chunks)):
        for first_word, words in enumerate(source(chunk).split(_WORDS, dim=1)):
            scores.update(part, first_word * _WORDS, words)
        progress.advance(1, f"chunk {chunk}")


def compare(
    reference: LogitSource, candidate: LogitSource, divergence: Divergence, chunks: int, progress: Progress
) -> None:
    """The same for two models on the same tokens."""
    progress.begin("Parity", chunks, "chunks")
    for chunk, part in enumerate(_parts(len(divergence.reference.labels), chunks)):
        logits = [source(chunk).split(_WORDS, dim=1) for source in (reference, candidate)]
        for block, (expected, found) in enumerate(zip(*logits, strict=True)):
            divergence.update(part, block * _WORDS, expected, found)
        progress.advance(1, f"chunk {chunk}")


def _parts(positions: int, chunks: int) -> list[slice]:
    size = positions // chunks
    return [slice(chunk * size, (chunk + 1) * size) for chunk in range(chunks)]
