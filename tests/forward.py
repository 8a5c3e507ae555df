"""Our runner's logits, whole, and how far numbers are from somebody else's."""

from __future__ import annotations

from typing import Any

import torch
from moecast.runner.stream import Stream
from moecast.sources.model import Model
from torch import Tensor


def runner_logits(model: Model, tokens: Tensor) -> Tensor:
    """[chunks, context] -> [chunks, context, vocabulary]"""
    stream = Stream(model, tokens)
    for layer in model.graph.layers:
        stream.advance(layer)
    states = stream.final_states(slice(None))
    return stream.logits(states).view(*tokens.shape, -1)


def random_tokens(chunks: int, context: int, vocabulary: int = 512) -> Tensor:
    """[chunks, context], the same every time."""
    return torch.randint(0, vocabulary, (chunks, context), generator=torch.Generator().manual_seed(0))


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Root mean square of what differs, over that of what is expected."""
    assert found.shape == expected.shape
    return float((found - expected).norm() / expected.norm())


def assert_same_logits(model: Model, oracle: Any, tokens: Tensor) -> None:
    """Our runner's logits are those of a transformers model, up to what float32 rounds."""
    with torch.no_grad():
        expected = oracle(tokens).logits
    assert relative_error(runner_logits(model, tokens), expected) < 1e-5
