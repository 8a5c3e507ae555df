"""Perplexity as llama-perplexity defines it, and the divergence between two models on the same text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

import torch
from torch import Tensor

from ...documents import read_text
from ...errors import BadInput
from ...progress import NoProgress, Progress
from ...sources.model import Model, pieces
from ...sources.tokenizer import Tokenizer
from ..activations import Activations
from ..engines import OnnxModel, open_runnable
from ..stream import Stream, advance
from ..weights import ModelWeights, multiply
from .logits import compare, logit_source, score
from .scores import Divergence, Scores

DEFAULT_CONTEXT = 512
_TEXTS = Path(__file__).parents[2] / "examples" / "text"
EVALUATION_TEXT = _TEXTS / "evaluation.txt"
CALIBRATION_TEXT = _TEXTS / "diverse.txt"


@dataclass(frozen=True)
class Perplexity:
    """exp of the mean negative log-likelihood of `tokens` scored tokens, with its standard error."""

    perplexity: float
    error: float
    tokens: int
    context: int
    chunks: int
    compute_dtype: str


@dataclass(frozen=True)
class Parity:
    """How far a candidate is from its reference on the same text.

    Attributes:
        mean_kld: mean KL(reference || candidate) in nats; `mean_kld_error` is its standard error.
        kld_999: its 99.9 % quantile; kld_maximum: its largest value.
        top1_agreement: share of positions where both find the same token most probable.
        mean_delta_p, rms_delta_p: change of the correct token's probability, candidate minus reference.
        layer_errors: after each layer, |candidate - reference| / |reference| of the hidden states.
        tokens: number of scored positions.
        compute_dtype: what the products of both were computed in, "float32" or "bfloat16".
    """

    perplexity_reference: float
    perplexity_candidate: float
    mean_kld: float
    mean_kld_error: float
    kld_999: float
    kld_maximum: float
    top1_agreement: float
    mean_delta_p: float
    rms_delta_p: float
    layer_errors: tuple[float, ...]
    tokens: int
    context: int
    chunks: int
    compute_dtype: str

    @property
    def perplexity_ratio(self) -> float:
        return self.perplexity_candidate / self.perplexity_reference


def perplexity(
    model: Model | OnnxModel | str | Path,
    file: str | Path,
    context: int = DEFAULT_CONTEXT,
    chunks: int | None = None,
    progress: Progress | None = None,
    compute_dtype: torch.dtype = torch.float32,
) -> Perplexity:
    """Perplexity of a model on a text file, defined as llama-perplexity does.

    The text is cut into chunks of `context` tokens, each with an empty cache; the second half of each is scored.
    Products with weights are computed in `compute_dtype`, except those that route tokens and those of the head, and
    except by ONNX Runtime, whose models say themselves what they compute in. Raises BadInput for a text shorter than
    two chunks.
    """
    model, progress = _opened(model), progress or NoProgress()
    tokens = chunk_tokens(model.tokenizer, Path(file), context, chunks)
    scores = Scores(labels(tokens))
    inputs = with_bos(tokens, model.tokenizer)
    if isinstance(model, OnnxModel):
        score(logit_source(model, inputs, _scored_positions(context), progress), scores, len(tokens), progress)
    else:
        _score_stream(Stream(model, inputs, weights=ModelWeights(model, compute_dtype)), scores, progress)
    value, error = _perplexity_of(scores)
    return Perplexity(value, error, len(scores.labels), context, len(tokens), dtype_name(compute_dtype))


def _score_stream(stream: Stream, scores: Scores, progress: Progress) -> None:
    model, tokens = stream.model, stream.tokens
    progress.begin("Perplexity", len(model.graph.layers), "layers")
    for layer in model.graph.layers:
        stream.advance(layer)
        progress.advance(1, f"layer {layer.index}")
    states = stream.final_activations(_scored_positions(tokens.shape[1]))
    first_word = 0
    for block in stream.head_blocks():
        for chunk, part in enumerate(_chunks(scores.labels, len(tokens))):
            scores.update(part, first_word, multiply(states[chunk], block))
        first_word += len(block)


def parity(
    reference: Model | OnnxModel | str | Path,
    candidate: Model | OnnxModel | str | Path,
    file: str | Path,
    context: int = DEFAULT_CONTEXT,
    chunks: int | None = None,
    progress: Progress | None = None,
    compute_dtype: torch.dtype = torch.float32,
) -> Parity:
    """Compare two models on a text file. They advance together, layer by layer, so that neither is ever in memory.

    A model that ONNX Runtime runs is compared by its logits alone, without errors of layers. Both get the tokens
    of the reference. `compute_dtype` as for `perplexity`. Raises BadInput when the two do not share a vocabulary.
    """
    reference, candidate, progress = _opened(reference), _opened(candidate), progress or NoProgress()
    tokens = chunk_tokens(reference.tokenizer, Path(file), context, chunks)
    _check_same_vocabulary(reference, candidate, tokens, Path(file), chunks, progress)
    inputs = [with_bos(tokens, model.tokenizer) for model in (reference, candidate)]
    layer_errors: tuple[float, ...] = ()
    if isinstance(reference, Model) and isinstance(candidate, Model):
        streams = [
            Stream(model, text, weights=ModelWeights(model, compute_dtype))
            for model, text in zip((reference, candidate), inputs, strict=True)
        ]
        layer_errors = _advance_together(streams[0], streams[1], progress)
        (divergence,) = compare_heads(streams[0], streams[1:], tokens)
    else:
        divergence = Divergence(labels(tokens))
        positions = _scored_positions(context)
        first, second = (
            logit_source(model, text, positions, progress, compute_dtype)
            for model, text in zip((reference, candidate), inputs, strict=True)
        )
        compare(first, second, divergence, len(tokens), progress)
    return summarize(divergence, layer_errors, context, len(tokens), compute_dtype)


def chunk_tokens(tokenizer: Tokenizer, file: Path, context: int, chunks: int | None) -> Tensor:
    """The text as int64 [chunks, context]. Raises BadInput when it is too short or the context too small."""
    if context < 4:
        raise BadInput(f"--context is {context}, expected at least 4 tokens")
    ids = tokenizer.encode(read_text(file).removesuffix("\n"))
    if len(ids) < 2 * context:
        raise BadInput(
            f"{file} holds {len(ids)} tokens, expected at least {2 * context}: use more text or less --context"
        )
    count = len(ids) // context if chunks is None else min(chunks, len(ids) // context)
    if count < 1:
        raise BadInput(f"--chunks is {chunks}, expected at least 1")
    return torch.tensor(ids[: count * context], dtype=torch.int64).view(count, context)


def _opened(model: Model | OnnxModel | str | Path) -> Model | OnnxModel:
    return open_runnable(model) if isinstance(model, str | Path) else model


def with_bos(tokens: Tensor, tokenizer: Tokenizer) -> Tensor:
    """llama-perplexity puts the BOS token in place of each chunk's first token, where the model has one."""
    if not tokenizer.add_bos or tokenizer.bos is None:
        return tokens
    tokens = tokens.clone()
    tokens[:, 0] = tokenizer.bos
    return tokens


def _scored_positions(context: int) -> slice:
    return slice(context // 2, context - 1)


def labels(tokens: Tensor) -> Tensor:
    context = tokens.shape[1]
    return tokens[:, context // 2 + 1 :].flatten()


def _chunks(scored: Tensor, chunks: int) -> list[slice]:
    """Which of all scored positions are those of each chunk."""
    size = len(scored) // chunks
    return [slice(chunk * size, (chunk + 1) * size) for chunk in range(chunks)]


def _check_same_vocabulary(
    reference: Model | OnnxModel,
    candidate: Model | OnnxModel,
    tokens: Tensor,
    file: Path,
    chunks: int | None,
    progress: Progress,
) -> None:
    """The ids must mean the same text to both; that the candidate would have split it otherwise is worth a line."""
    sizes = [model.vocabulary_size for model in (reference, candidate)]
    ids = tokens.flatten().tolist()
    if sizes[0] != sizes[1] or reference.tokenizer.decode(ids) != candidate.tokenizer.decode(ids):
        raise BadInput(
            f"{candidate.path} has another vocabulary ({sizes[1]} tokens) than {reference.path} ({sizes[0]}): "
            "only models of one vocabulary can be compared"
        )
    other = chunk_tokens(candidate.tokenizer, file, tokens.shape[1], chunks)
    if not torch.equal(tokens, other):
        progress.note(f"{candidate.path.name} would split {file.name} otherwise; both get the reference's tokens")


def _advance_together(reference: Stream, candidate: Stream, progress: Progress) -> tuple[float, ...]:
    layers = list(zip_longest(reference.model.graph.layers, candidate.model.graph.layers))
    progress.begin("Parity", len(layers), "layers")
    errors = []
    for index, pair in enumerate(layers):
        advance((reference, candidate), pair)
        errors.append(relative_error(reference.hidden, candidate.hidden))
        progress.advance(1, f"layer {index}: relative error {errors[-1]:.2e}")
    return tuple(errors)


def relative_error(reference: Activations, candidate: Activations) -> float:
    """|candidate - reference| / |reference| over all tokens."""
    difference = size = 0.0
    for chunk in range(len(reference)):
        width = min(reference[chunk].shape[-1], candidate[chunk].shape[-1])
        expected = _unpadded(reference[chunk], width)
        difference += float((_unpadded(candidate[chunk], width) - expected).square().sum(dtype=torch.float64))
        size += float(expected.square().sum(dtype=torch.float64))
    return math.sqrt(difference / size) if difference else 0.0


def _unpadded(hidden: Tensor, size: int) -> Tensor:
    """States of a padded model are larger by the root of its growth and followed by zeros (see quant.padding)."""
    return hidden if hidden.shape[-1] == size else hidden[..., :size] * math.sqrt(size / hidden.shape[-1])


def compare_heads(reference: Stream, candidates: Sequence[Stream], expected: Tensor) -> list[Divergence]:
    """How each candidate predicts the second half of every chunk, against the reference; all have passed all layers.

    `expected` are the tokens [chunks, context]. The vocabulary comes in blocks, each loaded once for all streams.
    """
    streams = (reference, *candidates)
    divergences = [Divergence(labels(expected)) for _ in candidates]
    states = [stream.final_activations(_scored_positions(expected.shape[1])) for stream in streams]
    first_word = 0
    for _, rows in pieces(reference.weights.graph.head):
        blocks = [stream.weights.load(stream.weights.graph.head, None, rows) for stream in streams]
        for chunk, part in enumerate(_chunks(labels(expected), len(expected))):
            logits = multiply(states[0][chunk], blocks[0])
            for divergence, own, block in zip(divergences, states[1:], blocks[1:], strict=True):
                divergence.update(part, first_word, logits, multiply(own[chunk], block))
        first_word += len(blocks[0])
        for stream in streams:
            stream.weights.release()
    return divergences


def _perplexity_of(scores: Scores) -> tuple[float, float]:
    """Perplexity and its standard error, which follows from that of the mean log-likelihood."""
    losses = -scores.log_probability
    value = math.exp(losses.mean())
    return value, value * _standard_error(losses)


def _standard_error(values: Tensor) -> float:
    return math.sqrt(float(values.var(correction=0)) / max(len(values) - 1, 1))


def summarize(
    divergence: Divergence, layer_errors: tuple[float, ...], context: int, chunks: int, compute_dtype: torch.dtype
) -> Parity:
    """What a comparison of all scored tokens amounts to."""
    kld = divergence.kld
    reference, candidate = divergence.reference, divergence.candidate
    delta = candidate.log_probability.exp() - reference.log_probability.exp()
    return Parity(
        perplexity_reference=_perplexity_of(reference)[0],
        perplexity_candidate=_perplexity_of(candidate)[0],
        mean_kld=float(kld.mean()),
        mean_kld_error=_standard_error(kld),
        kld_999=float(kld.quantile(0.999)),
        kld_maximum=float(kld.max()),
        top1_agreement=float((reference.best == candidate.best).double().mean()),
        mean_delta_p=float(delta.mean()),
        rms_delta_p=float(delta.square().mean().sqrt()),
        layer_errors=layer_errors,
        tokens=len(kld),
        context=context,
        chunks=chunks,
        compute_dtype=dtype_name(compute_dtype),
    )


def dtype_name(dtype: torch.dtype) -> str:
    """bfloat16, of torch.bfloat16"""
    return str(dtype).removeprefix("torch.")
