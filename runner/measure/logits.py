"""Next-token logits of whole texts, for models that run in an engine of their own, and of streams beside them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from ...progress import Progress
from ..engines import OnnxModel
from ..stream import Stream
from .scores import Divergence, Scores, chunk_parts

LogitSource = Callable[[int], Tensor]  # number of a chunk -> float32 [scored positions, vocabulary size]
_WORDS = 4096  # of the vocabulary at a time: what is computed from logits needs several times their memory


def engine_logits(model: OnnxModel, tokens: Tensor, positions: slice) -> LogitSource:
    """A model's logits at `positions` of every chunk of `tokens` [chunks, context]: it runs when one is asked for."""
    return lambda chunk: model.advance(tokens[chunk], model.initial_state())[0][positions]


def stream_logits(stream: Stream, positions: slice) -> LogitSource:
    """The same of a stream that has passed all layers."""
    states = stream.final_activations(positions)
    return lambda chunk: stream.logits(states[chunk]).cpu()


def score(source: LogitSource, scores: Scores, chunks: int, progress: Progress) -> None:
    """Feed the logits of all chunks to `scores`, whose labels are those of one chunk after another."""
    progress.begin("Perplexity", chunks, "chunks")
    for chunk, part in enumerate(chunk_parts(len(scores.labels), chunks)):
        for first_word, words in enumerate(source(chunk).split(_WORDS, dim=1)):
            scores.update(part, first_word * _WORDS, words)
        progress.advance(1, f"chunk {chunk}")


def compare_logits(
    reference: LogitSource, candidates: Sequence[LogitSource], labels: Tensor, chunks: int, progress: Progress
) -> list[Divergence]:
    """How far candidates are from a reference on the same chunks, whose labels come one chunk after another.

    Of a chunk, the logits of the reference and of one candidate are in memory.
    """
    scores = Scores(labels)
    divergences = [Divergence(scores) for _ in candidates]
    progress.begin("Parity", chunks * len(candidates), "chunks")
    for chunk, part in enumerate(chunk_parts(len(labels), chunks)):
        blocks = [
            (number * _WORDS, scores.update(part, number * _WORDS, words))
            for number, words in enumerate(reference(chunk).split(_WORDS, dim=1))
        ]
        for candidate, divergence in zip(candidates, divergences, strict=True):
            for (first_word, update), words in zip(blocks, candidate(chunk).split(_WORDS, dim=1), strict=True):
                divergence.update(part, first_word, update, words)
            progress.advance(1, f"chunk {chunk}")
    return divergences
