"""Our runner's logits, whole: for tests that compare them with somebody else's."""

from __future__ import annotations

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
