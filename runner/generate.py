"""Generates text from a prompt, token by token, with every kind of model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ..errors import BadInput
from ..sources.model import Model
from ..sources.tokenizer import Tokenizer
from .engines import OnnxModel
from .memory import workspace
from .settings import Compute
from .stream import Cache, Stream
from .weights import ModelWeights

Engine = Callable[[Tensor], Tensor]  # further token ids int64 [tokens] -> logits of what follows, [vocabulary size]


def generate(
    model: Model | OnnxModel,
    prompt: str,
    most: int = 128,
    temperature: float = 0.0,
    seed: int | None = None,
    compute: Compute = Compute(),
) -> Iterator[str]:
    """Continue a prompt, in pieces of text as they come, until the model ends it or after `most` tokens.

    Args:
        prompt: text as it is; control tokens in it, such as those of a chat template, are recognized.
        temperature: 0 takes the most probable token every time; otherwise tokens are drawn from the softmax of
            logits / temperature.
        seed: of the draws, for the same text again.
        compute: how a model that moecast runs itself is computed.

    Raises BadInput for a prompt that is empty or no UTF-8, and a negative temperature.
    """
    tokenizer = model.tokenizer
    try:
        prompt.encode()
    except UnicodeEncodeError as error:  # bytes of a command line that are no UTF-8 arrive as half characters
        raise BadInput(f"--prompt is no UTF-8 text: character {error.start + 1} is none") from None
    ids = tokenizer.encode(prompt, parse_special=True)
    if not ids:
        raise BadInput("--prompt is empty, expected some text")
    if not 0 <= temperature < math.inf:
        raise BadInput(f"--temperature is {temperature}, expected 0 or more")
    engine = engine_of(model, len(ids) + most, compute)
    return _text(_tokens(engine, ids, _chooser(temperature, seed)), tokenizer, most)


def beyond_context(model: Model | OnnxModel, prompt: str, most: int) -> tuple[str, ...]:
    """A line where a prompt and `most` tokens after it are more than the model is made for."""
    count, made_for = len(model.tokenizer.encode(prompt, parse_special=True)), model.context_length
    if count + most <= made_for:
        return ()
    return (f"--prompt of {count} tokens and --tokens {most} are beyond the {made_for} tokens the model is made for",)


def engine_of(model: Model | OnnxModel, most: int, compute: Compute = Compute()) -> Engine:
    """A model that remembers the tokens it has seen, `most` of them in the end."""
    return _onnx_engine(model) if isinstance(model, OnnxModel) else _stream_engine(model, most, compute)


def _onnx_engine(model: OnnxModel) -> Engine:
    state = model.initial_state()

    def engine(tokens: Tensor) -> Tensor:
        nonlocal state
        logits, state = model.advance(tokens, state)
        return logits[-1]

    return engine


def _stream_engine(model: Model, most: int, compute: Compute) -> Engine:
    cache, room = Cache(), workspace(compute, model.graph, most, most)

    def engine(tokens: Tensor) -> Tensor:
        weights = ModelWeights(model, compute.torch_dtype, room.device)
        stream = Stream(model, tokens[None], cache, weights, workspace=room)
        for layer in model.graph.layers:
            stream.advance(layer)
        return stream.logits(stream.final_states(slice(-1, None)))[0].cpu()

    return engine


def _chooser(temperature: float, seed: int | None) -> Callable[[Tensor], int]:
    generator = torch.Generator()
    if seed is None:
        generator.seed()
    elif 0 <= seed < 2**63:
        generator.manual_seed(seed)
    else:
        raise BadInput(f"--seed is {seed}, expected a whole number from 0 to {2**63 - 1}")

    def choose(logits: Tensor) -> int:
        if temperature == 0:
            return int(logits.argmax())
        return int(torch.multinomial((logits / temperature).softmax(dim=-1), 1, generator=generator))

    return choose


def _tokens(engine: Engine, ids: list[int], choose: Callable[[Tensor], int]) -> Iterator[int]:
    while True:
        ids = [choose(engine(torch.tensor(ids, device="cpu")))]
        yield ids[0]


def _text(tokens: Iterator[int], tokenizer: Tokenizer, most: int) -> Iterator[str]:
    """Text as soon as it is whole: a character may take several tokens."""
    ids: list[int] = []
    shown = 0
    for count, token in zip(range(1, most + 1), tokens, strict=False):
        if token in tokenizer.end_of_generation:
            token_text = tokenizer.decode(ids)[shown:]
            if token_text:
                yield token_text
            return
        ids.append(token)
        text = tokenizer.decode(ids)
        if not text.endswith("\ufffd") or count == most:
            yield text[shown:]
            shown = len(text)
