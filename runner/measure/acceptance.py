"""How many of the tokens that a draft says the model itself would have said, from one pass over a text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from operator import mul
from pathlib import Path

import torch
from torch import Tensor

from ...errors import BadInput
from ...progress import NoProgress, Progress
from ...sources.model import Model, open_draft
from ..block_drafts import BlockDrafts, Features
from ..drafts import MultiTokenPrediction, most_probable
from ..engines import OnnxModel
from ..memory import workspace
from ..settings import Compute, Evaluation
from ..stream import Stream
from ..texts import beyond_context, with_bos
from ..weights import ModelWeights
from .evaluate import opened

DRAFTED = 3  # tokens of a draft, as llama.cpp has it
_ROOM = 2  # of texts: half of one begins drafts, each as long as what it is from the next


@dataclass(frozen=True)
class DraftedToken:
    """The n-th token of drafts.

    Attributes:
        drafts: those whose tokens before it are both what the model says and what the text does, so that what the
            model says next is known.
        accepted: how many of them have the model's most probable token here.
        confidence: the share of them that the draft itself expects to be accepted; None where it has no opinion.
    """

    drafts: int
    accepted: int
    confidence: float | None = None

    @property
    def rate(self) -> float:
        """The share that is accepted where all before it is; 0 where no draft came so far."""
        return self.accepted / max(self.drafts, 1)


@dataclass(frozen=True)
class Acceptance:
    """What is accepted of drafts, token by token, where the most probable one is taken every time.

    `context_length` is what the model is made for.
    """

    tokens: tuple[DraftedToken, ...]
    context: int
    chunks: int
    compute_dtype: str
    context_length: int

    @property
    def reached(self) -> tuple[float, ...]:
        """The share of all drafts that is accepted up to each token."""
        return (*accumulate((token.rate for token in self.tokens), mul),)

    @property
    def tokens_per_pass(self) -> float:
        """How many tokens a pass of the model says, its own and those of the draft that it checks."""
        return 1 + sum(self.reached)

    @property
    def problems(self) -> tuple[str, ...]:
        return beyond_context(self.context, self.context_length)


def acceptance(
    model: Model | OnnxModel | str | Path,
    draft: Model | str | Path | None = None,
    most: int = DRAFTED,
    evaluation: Evaluation = Evaluation(),
    compute: Compute = Compute(),
    progress: Progress | None = None,
) -> Acceptance:
    """What a model accepts of drafts that begin at every so many tokens of the second half of each chunk of a text.

    Args:
        draft: what drafts, or its GGUF file; by default what the model has itself.
        most: tokens of a draft.

    Raises BadInput for a model without any draft, and for a text or a context too short.
    """
    model, progress = opened(model), progress or NoProgress()
    if isinstance(model, OnnxModel):
        raise BadInput(f"{model.path} is an ONNX model, which has no place for drafts: give its checkpoint")
    draft = open_draft(Path(draft), model) if isinstance(draft, str | Path) else draft or model.draft
    if draft is None:
        raise BadInput(f"{model.path} has no block that drafts tokens: give the file that has, after the model")
    if draft.graph.block and most > draft.graph.block.size:
        raise BadInput(f"--tokens is {most}, expected at most {draft.graph.block.size}: so long is a draft's block")
    tokens = evaluation.tokens(model.tokenizer)
    chunks, context = tokens.shape
    places = range(context // 2, context - most + 1, most)
    if not places:
        raise BadInput(f"--context is {context}, expected at least {2 * most} for drafts of {most} tokens")
    inputs = with_bos(tokens, model.tokenizer)
    with workspace(compute, model.graph, _ROOM * inputs.numel(), _ROOM * context) as room:
        stream = Stream(model, inputs, weights=ModelWeights(model, compute.torch_dtype, room.device), workspace=room)
        features = Features(draft.graph.block.sources if draft.graph.block else (), room)
        progress.begin("Drafts", len(model.graph.layers) + most, "layers")
        for layer in model.graph.layers:
            stream.advance(layer)
            features.passed(stream, layer)
            progress.advance(1, f"layer {layer.index}")
        checked = slice(places[0], places[-1] + most)
        said = most_probable(stream, [stream.final(chunk, checked) for chunk in range(chunks)]).cpu()
        weights = ModelWeights(draft, compute.torch_dtype, room.device)
        drafting: MultiTokenPrediction | BlockDrafts
        if draft.graph.block:
            drafting = BlockDrafts(draft, weights, stream, features, places, room)
        else:
            drafting = MultiTokenPrediction(draft, weights, stream, places, room)
        drafts: list[Tensor] = []
        opinions: list[Tensor] = []
        for step in range(most):
            if drafts:
                drafting.take(drafts[-1])
            if isinstance(drafting, BlockDrafts):
                opinions.append(drafting.confidence().cpu())
            drafts.append(most_probable(*drafting.states()))
            progress.advance(1, f"drafted token {step + 1}")
    accepted = _accepted(torch.stack(drafts, dim=2).cpu(), said, tokens, places, opinions)
    return Acceptance(accepted, context, chunks, compute.dtype, model.context_length)


def _accepted(
    drafts: Tensor, said: Tensor, tokens: Tensor, places: Sequence[int], opinions: Sequence[Tensor]
) -> tuple[DraftedToken, ...]:
    """
    Args:
        drafts: [chunks, places, tokens of a draft].
        said: the model's most probable tokens after each token from the first place on, [chunks, positions].
        tokens: the text, [chunks, context].
        opinions: the confidence of each token of all drafts, [chunks, places] each, or none.
    """
    here = torch.tensor(places, device="cpu")
    follows = torch.ones(drafts.shape[:2], dtype=torch.bool, device="cpu")
    found = []
    for step, drafted in enumerate(drafts.unbind(2)):
        right = follows & (drafted == said[:, here - places[0] + step])
        confidence = float(opinions[step][follows].mean()) if opinions and follows.any() else None
        found.append(DraftedToken(int(follows.sum()), int(right.sum()), confidence))
        if step + 1 < drafts.shape[2]:
            follows = right & (drafted == tokens[:, here + step + 1])
    return tuple(found)
