"""Slices of a comparison: its scored tokens by category of text, by position in the context, by confidence."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from .scores import Divergence, standard_error

_POSITIONS = 8  # slices of what is scored of a context
_CONFIDENCE = (0.1, 0.25, 0.5, 0.75, 0.9, 0.99)  # bounds of the probability of the reference's most probable token


@dataclass(frozen=True)
class Slice:
    """What a comparison comes to on some of the scored tokens.

    Attributes:
        name: a category's; the first and last place of its tokens in the context, "257-288"; or bounds of the
            probability that the reference gives to its most probable token, "0.5-0.75".
        tokens: how many there are.
        mean_kld: mean KL(reference || candidate) in nats; `mean_kld_error` is its standard error.
        top1_agreement: share of them where both find the same token most probable.
    """

    name: str
    tokens: int
    mean_kld: float
    mean_kld_error: float
    top1_agreement: float


def slices_of(divergence: Divergence, context: int, texts: Mapping[str, int]) -> dict[str, tuple[Slice, ...]]:
    """All scored tokens by "category", "position" and "confidence", each in order, without slices that have none.

    texts: how many chunks of `context` tokens each text has, by its category, in the order they were scored in.
    """
    return {
        "category": _slices(divergence, *_by_category(texts, len(divergence.reference.labels))),
        "position": _slices(divergence, *_by_position(context, sum(texts.values()))),
        "confidence": _slices(divergence, *_by_confidence(divergence.reference.confidence)),
    }


def _slices(divergence: Divergence, names: list[str], numbers: Tensor) -> tuple[Slice, ...]:
    """`numbers` [positions] say which of the names a token falls under."""
    kld, same = divergence.kld, (divergence.reference.best == divergence.candidate.best).double()
    found = []
    for number, name in enumerate(names):
        inside = numbers == number
        if tokens := int(inside.sum()):
            own = kld[inside]
            agreement = float(same[inside].mean())
            found.append(Slice(name, tokens, float(own.mean()), standard_error(own), agreement))
    return tuple(found)


def _by_category(texts: Mapping[str, int], positions: int) -> tuple[list[str], Tensor]:
    """Which text each scored token is of."""
    counts = torch.tensor([*texts.values()], device="cpu") * (positions // sum(texts.values()))
    return [*texts], torch.arange(len(texts), device="cpu").repeat_interleave(counts)


def _by_position(context: int, chunks: int) -> tuple[list[str], Tensor]:
    """In which part of the second half of its context each scored token is."""
    parts = torch.arange(context // 2 + 1, context, device="cpu").tensor_split(_POSITIONS)
    names = [f"{int(part[0])}-{int(part[-1])}" if len(part) else "" for part in parts]
    of_a_chunk = torch.cat([torch.full_like(part, number) for number, part in enumerate(parts)])
    return names, of_a_chunk.repeat(chunks)


def _by_confidence(confidence: Tensor) -> tuple[list[str], Tensor]:
    """In which band the reference's top probability at each scored token is."""
    bounds = (0, *_CONFIDENCE, 1)
    names = [f"{low:g}-{high:g}" for low, high in pairwise(bounds)]
    return names, torch.bucketize(confidence, torch.tensor(_CONFIDENCE, dtype=confidence.dtype, device="cpu"))
