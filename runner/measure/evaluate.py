"""Perplexity as llama-perplexity defines it, and the divergence between two models on the same text."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path

import torch
from torch import Tensor

from ...errors import BadInput
from ...progress import NoProgress, Progress
from ...sources.model import Model, pieces
from ..activations import Activations, Workspace
from ..engines import OnnxModel, open_runnable
from ..memory import working_set, workspace
from ..placement import wide
from ..settings import Compute, Evaluation
from ..stream import Stream, advance, word_logits
from ..texts import beyond_context, with_bos
from ..weights import ModelWeights
from .logits import compare_logits, engine_logits, score, stream_logits
from .scores import Divergence, Scores, chunk_parts, standard_error
from .slices import Slice, slices_of
from .tokenization import Tokenization, compare_tokenizers

_LARGEST_EXPONENT = 700.0  # of a float64; what a broken model gives may be beyond


@dataclass(frozen=True)
class Perplexity:
    """exp of the mean negative log-likelihood of `tokens` scored tokens, with its standard error.

    `context_length` is what the model is made for.
    """

    perplexity: float
    error: float
    tokens: int
    context: int
    chunks: int
    compute_dtype: str
    context_length: int

    @property
    def is_finite(self) -> bool:
        return math.isfinite(self.perplexity)

    @property
    def problems(self) -> tuple[str, ...]:
        broken = () if self.is_finite else ("the perplexity is not a finite number: the model is broken",)
        return (*broken, *beyond_context(self.context, self.context_length))


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
        context_length: what both models are made for.
        slices: the same by "category" of text, "position" in the context, and "confidence", the probability of the
            reference's most probable token; each key's slices are all scored tokens.
        tokenization: what the candidate's tokenizer gives other ids; None where moecast cannot run it. All other
            figures are of the reference's tokens, in both models.
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
    context_length: int
    slices: Mapping[str, tuple[Slice, ...]]
    tokenization: Tokenization | None = None

    @property
    def perplexity_ratio(self) -> float:
        return self.perplexity_candidate / self.perplexity_reference

    @property
    def is_finite(self) -> bool:
        """Whether both models gave numbers; where one did not, nothing was compared."""
        return all(map(math.isfinite, (self.perplexity_reference, self.perplexity_candidate, self.mean_kld)))

    @property
    def problems(self) -> tuple[str, ...]:
        problems = [] if self.is_finite else ["the comparison is not a finite number: one of the models is broken"]
        if self.tokenization and self.tokenization.first:
            problems.append(f"token ids differ on {self.tokenization}: {self.tokenization.first}")
        return (*problems, *beyond_context(self.context, self.context_length))


def perplexity(
    model: Model | OnnxModel | str | Path,
    evaluation: Evaluation = Evaluation(),
    compute: Compute = Compute(),
    progress: Progress | None = None,
) -> Perplexity:
    """Perplexity of a model on a text, defined as llama-perplexity does.

    Each chunk of the text begins with an empty cache, and its second half is scored. ONNX models say themselves what
    they compute in. Raises BadInput for a text shorter than two chunks.
    """
    model, progress = opened(model), progress or NoProgress()
    tokens = evaluation.tokens(model.tokenizer)
    context = evaluation.context
    scores = Scores(labels(tokens))
    inputs = with_bos(tokens, model.tokenizer)
    if isinstance(model, OnnxModel):
        score(engine_logits(model, inputs, _scored_positions(context)), scores, len(tokens), progress)
    else:
        with workspace(compute, model.graph, inputs.numel(), context) as room:
            weights = ModelWeights(model, compute.torch_dtype, room.device)
            _score_stream(Stream(model, inputs, weights=weights, workspace=room), scores, progress)
    value, error = _perplexity_of(scores)
    return Perplexity(value, error, len(scores.labels), context, len(tokens), compute.dtype, model.context_length)


def _score_stream(stream: Stream, scores: Scores, progress: Progress) -> None:
    model, tokens = stream.model, stream.tokens
    progress.begin("Perplexity", len(model.graph.layers), "layers")
    for layer in model.graph.layers:
        stream.advance(layer)
        progress.advance(1, f"layer {layer.index}")
    states = stream.final_activations(_scored_positions(tokens.shape[1]))
    first_word = 0
    for block in stream.head_blocks():
        for chunk, part in enumerate(chunk_parts(len(scores.labels), len(tokens))):
            scores.update(part, first_word, word_logits(stream.weights.graph, states[chunk], block))
        first_word += len(block)


def parity(
    reference: Model | OnnxModel | str | Path,
    candidate: Model | OnnxModel | str | Path,
    evaluation: Evaluation = Evaluation(),
    compute: Compute = Compute(),
    progress: Progress | None = None,
) -> Parity:
    """Compare two models on a text. They advance together, layer by layer, so that neither is ever in memory.

    A model that ONNX Runtime runs is compared by its logits alone, without errors of layers. Both get the tokens
    of the reference. Raises BadInput when the two do not share a vocabulary.
    """
    (found,) = parities(reference, [candidate], evaluation, compute, progress)
    return found


def parities(
    reference: Model | OnnxModel | str | Path,
    candidates: Sequence[Model | OnnxModel | str | Path],
    evaluation: Evaluation = Evaluation(),
    compute: Compute = Compute(),
    progress: Progress | None = None,
) -> list[Parity]:
    """The same for several candidates, all in one pass over the reference.

    Raises as `parity`, and for more candidates than memory is allowed for.
    """
    reference, models, progress = opened(reference), [*map(opened, candidates)], progress or NoProgress()
    texts = evaluation.tokens_by_text(reference.tokenizer)
    tokens = torch.cat([*texts.values()])
    for candidate in models:
        _check_same_vocabulary(reference, candidate, tokens)
    with _room_for([reference, *models], tokens, compute) as room:
        found = _compared([reference, *models], tokens, compute, room, progress)
    chunks, text, results = {name: len(ids) for name, ids in texts.items()}, evaluation.read(), []
    for candidate, (divergence, layer_errors) in zip(models, found, strict=True):
        length = min(reference.context_length, candidate.context_length)
        result = summarize(divergence, layer_errors, chunks, evaluation.context, compute.dtype, length)
        tokenization = compare_tokenizers(reference.tokenizer, candidate.tokenizer, text)
        results.append(replace(result, tokenization=tokenization))
    return results


def _compared(
    models: Sequence[Model | OnnxModel], tokens: Tensor, compute: Compute, room: Workspace, progress: Progress
) -> list[tuple[Divergence, tuple[float, ...]]]:
    """How far each model is from the first, and its errors of layers where both are streams."""
    texts = [with_bos(tokens, model.tokenizer) for model in models]
    streams = {
        place: Stream(model, text, weights=ModelWeights(model, compute.torch_dtype, room.device), workspace=room)
        for place, (model, text) in enumerate(zip(models, texts, strict=True))
        if isinstance(model, Model)
    }
    reference, alike = streams.get(0), [place for place in streams if place]
    own = [streams[place] for place in alike]
    errors = _advance_together(reference, own, progress) if streams else []
    found: dict[int, tuple[Divergence, tuple[float, ...]]] = {}
    if reference and own:
        divergences = compare_heads(reference, own, tokens)
        found.update(zip(alike, zip(divergences, errors, strict=True), strict=True))
    if others := [place for place in range(1, len(models)) if place not in found]:
        positions = _scored_positions(tokens.shape[1])
        engines = {place: model for place, model in enumerate(models) if isinstance(model, OnnxModel)}
        first, *rest = (
            engine_logits(engines[place], texts[place], positions)
            if place in engines
            else stream_logits(streams[place], positions)
            for place in (0, *others)
        )
        divergences = compare_logits(first, rest, labels(tokens), len(tokens), progress)
        found.update((place, (divergence, ())) for place, divergence in zip(others, divergences, strict=True))
    return [found[place] for place in range(1, len(models))]


def _room_for(models: Sequence[Model | OnnxModel], tokens: Tensor, compute: Compute) -> Workspace:
    """For those of the models that run here, each on all tokens [chunks, context]; room for the largest is for all.

    Raises BadInput where memory is not enough.
    """
    graphs = [model.graph for model in models if isinstance(model, Model)]
    if not graphs:
        return Workspace()
    largest = max(graphs, key=lambda graph: working_set(graph, tokens.shape[1], len(graphs)))
    try:
        return workspace(compute, largest, len(graphs) * tokens.numel(), tokens.shape[1], copies=len(graphs))
    except BadInput as error:
        raise BadInput(f"{error}, or compare fewer models at once") from None


def opened(model: Model | OnnxModel | str | Path) -> Model | OnnxModel:
    """A model that is open already is taken as it is."""
    return open_runnable(model) if isinstance(model, str | Path) else model


def _scored_positions(context: int) -> slice:
    return slice(context // 2, context - 1)


def labels(tokens: Tensor) -> Tensor:
    context = tokens.shape[1]
    return tokens[:, context // 2 + 1 :].flatten()


def _check_same_vocabulary(reference: Model | OnnxModel, candidate: Model | OnnxModel, tokens: Tensor) -> None:
    """The ids must mean the same text to both."""
    sizes = [model.vocabulary_size for model in (reference, candidate)]
    ids = tokens.flatten().tolist()
    if sizes[0] != sizes[1] or reference.tokenizer.decode(ids) != candidate.tokenizer.decode(ids):
        raise BadInput(
            f"{candidate.path} has another vocabulary ({sizes[1]} tokens) than {reference.path} ({sizes[0]}): "
            "only models of one vocabulary can be compared"
        )


def _advance_together(
    reference: Stream | None, candidates: Sequence[Stream], progress: Progress
) -> list[tuple[float, ...]]:
    """Through all layers; each candidate's errors after each of them, none without a reference."""
    streams = [reference, *candidates] if reference else [*candidates]
    layers = list(zip_longest(*(stream.model.graph.layers for stream in streams)))
    progress.begin("Parity", len(layers), "layers")
    errors: list[list[float]] = [[] for _ in candidates]
    for index, own in enumerate(layers):
        advance(streams, own)
        detail = f"layer {index}"
        if reference and candidates:
            for of_candidate, candidate in zip(errors, candidates, strict=True):
                of_candidate.append(relative_error(reference.hidden, candidate.hidden))
            detail += f": relative error {max(of_candidate[-1] for of_candidate in errors):.2e}"
        progress.advance(1, detail)
    return [*map(tuple, errors)]


def relative_error(reference: Activations, candidate: Activations) -> float:
    """|candidate - reference| / |reference| over all tokens."""
    difference = size = 0.0
    for chunk in range(len(reference)):
        width = min(reference[chunk].shape[-1], candidate[chunk].shape[-1])
        expected = _unpadded(reference[chunk], width)
        difference += float(wide((_unpadded(candidate[chunk], width) - expected).square()).sum())
        size += float(wide(expected.square()).sum())
    return math.sqrt(difference / size) if difference else 0.0


def _unpadded(hidden: Tensor, size: int) -> Tensor:
    """States of a padded model are larger by the root of its growth and followed by zeros (see quant.padding)."""
    return hidden if hidden.shape[-1] == size else hidden[..., :size] * math.sqrt(size / hidden.shape[-1])


def compare_heads(reference: Stream, candidates: Sequence[Stream], expected: Tensor) -> list[Divergence]:
    """How each candidate predicts the second half of every chunk, against the reference; all have passed all layers.

    `expected` are the tokens [chunks, context]. The vocabulary comes in blocks, each loaded once for all streams.
    """
    streams, scores = (reference, *candidates), Scores(labels(expected))
    divergences = [Divergence(scores) for _ in candidates]
    states = [stream.final_activations(_scored_positions(expected.shape[1])) for stream in streams]
    first_word = 0
    for _, rows in pieces(reference.weights.graph.head):
        blocks = [stream.weights.load(stream.weights.graph.head, None, rows) for stream in streams]
        for chunk, part in enumerate(chunk_parts(len(scores.labels), len(expected))):
            logits = word_logits(reference.weights.graph, states[0][chunk], blocks[0])
            update = scores.update(part, first_word, logits)
            for divergence, stream, own, block in zip(divergences, candidates, states[1:], blocks[1:], strict=True):
                divergence.update(part, first_word, update, word_logits(stream.weights.graph, own[chunk], block))
        first_word += len(blocks[0])
        for stream in streams:
            stream.weights.release()
    return divergences


def _perplexity_of(scores: Scores) -> tuple[float, float]:
    """Perplexity and its standard error, which follows from that of the mean log-likelihood."""
    losses = -scores.log_probability
    mean = float(losses.mean())
    value = math.exp(mean) if mean < _LARGEST_EXPONENT else math.inf
    return value, value * standard_error(losses)


def summarize(
    divergence: Divergence,
    layer_errors: tuple[float, ...],
    texts: Mapping[str, int],
    context: int,
    compute_dtype: str,
    context_length: int,
) -> Parity:
    """What a comparison of all scored tokens amounts to. `texts` are the numbers of their chunks, by category."""
    kld = divergence.kld
    reference, candidate = divergence.reference, divergence.candidate
    delta = candidate.log_probability.exp() - reference.log_probability.exp()
    return Parity(
        perplexity_reference=_perplexity_of(reference)[0],
        perplexity_candidate=_perplexity_of(candidate)[0],
        mean_kld=float(kld.mean()),
        mean_kld_error=standard_error(kld),
        kld_999=float(kld.quantile(0.999)),
        kld_maximum=float(kld.max()),
        top1_agreement=float((reference.best == candidate.best).double().mean()),
        mean_delta_p=float(delta.mean()),
        rms_delta_p=float(delta.square().mean().sqrt()),
        layer_errors=layer_errors,
        tokens=len(kld),
        context=context,
        chunks=sum(texts.values()),
        compute_dtype=compute_dtype,
        context_length=context_length,
        slices=slices_of(divergence, context, texts),
    )
