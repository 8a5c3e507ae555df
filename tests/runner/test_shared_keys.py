"""Attention to keys and values of an earlier layer: in one run, in steps, on streams that fork or were stopped."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
import torch
import toy_models as toys
from forward import relative_error, runner_logits
from moecast.archs.graph import Rope, sequential
from moecast.quant.planning.padding import pad
from moecast.runner.activations import Workspace
from moecast.runner.passes import REFERENCE, LayerPass
from moecast.runner.weights import ModelWeights
from moecast.sources.model import Model
from onnx_models import onnx_logits
from torch import Tensor
from torch.nn import functional
from toy_models import tokens_of

HIDDEN, HEADS, SIZE, WINDOW, LAYERS, SCALE = 96, 4, 24, 12, 4, 0.3
SOURCES = (None, None, 0, 1)  # the layer whose keys each layer attends to


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> toys.Toy:
    shapes: dict[str, tuple[int, ...]] = {"embedding": (toys.VOCABULARY, HIDDEN), "head": (toys.VOCABULARY, HIDDEN)}
    for layer, source in enumerate(SOURCES):
        shapes |= {f"{layer}.norm": (HIDDEN,), f"{layer}.q_proj.weight": (HEADS * SIZE, HIDDEN)}
        shapes[f"{layer}.o_proj.weight"] = (HIDDEN, HEADS * SIZE)
        if source is None:
            shapes |= {f"{layer}.{name}_proj.weight": (2 * SIZE, HIDDEN) for name in ("k", "v")}
    return toys.Toy(tmp_path_factory.mktemp("toy"), toys.random_tensors(0, shapes | {"last": (HIDDEN,)}))


@pytest.fixture(scope="module")
def model(toy: toys.Toy) -> Model:
    """The first and third layer have a window, the others do not and know no positions."""
    layers = []
    for layer, source in enumerate(SOURCES):
        windowed = {"window": WINDOW, "rope": Rope(SIZE, 1e4)} if layer % 2 == 0 else {}
        attention = toys.attention(toy, str(layer), (HEADS, 2, SIZE), keys_of=source, scale=SCALE, **windowed)
        layers.append((sequential(toy.norm(f"{layer}.norm"), attention),))
    return toy.model(toy.graph(layers, toy.norm("last")))


def _rms(states: Tensor, weight: Tensor) -> Tensor:
    return states * torch.rsqrt(states.square().mean(-1, keepdim=True) + 1e-6) * weight


def _rotated(heads: Tensor) -> Tensor:
    """[heads, tokens, size], each pair (i, i + size / 2) as a complex number."""
    angles = torch.arange(heads.shape[1])[:, None] * 1e4 ** (-torch.arange(0, SIZE, 2) / SIZE)
    turned = torch.complex(*heads.chunk(2, dim=-1)) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat((turned.real, turned.imag), dim=-1)


def _expected(toy: toys.Toy, tokens: Tensor) -> Tensor:
    """Of one text, [tokens] -> [tokens, vocabulary]."""
    x, remembered = toy["embedding"][tokens], {}
    distance = torch.arange(len(tokens))[:, None] - torch.arange(len(tokens))
    for layer, source in enumerate(SOURCES):
        windowed = layer % 2 == 0
        normed = _rms(x, toy[f"{layer}.norm"])

        def heads(name: str, normed: Tensor = normed, layer: int = layer) -> Tensor:
            return (normed @ toy[f"{layer}.{name}_proj.weight"].T).view(len(normed), -1, SIZE).transpose(0, 1)

        if source is None:
            keys = _rotated(heads("k")) if windowed else heads("k")
            remembered[layer] = keys, heads("v")
        keys, values = (t.repeat_interleave(2, dim=0) for t in remembered[layer if source is None else source])
        queries = _rotated(heads("q")) if windowed else heads("q")
        hidden = (distance < 0) | (distance >= WINDOW) if windowed else distance < 0
        shares = (SCALE * queries @ keys.transpose(1, 2)).masked_fill(hidden, -torch.inf).softmax(-1)
        x = x + (shares @ values).transpose(0, 1).flatten(1) @ toy[f"{layer}.o_proj.weight"].T
    return functional.linear(_rms(x, toy["last"]), toy["head"])


def test_logits_equal_the_formula(toy: toys.Toy, model: Model) -> None:
    tokens = tokens_of(40)
    expected = torch.stack([_expected(toy, text) for text in tokens])
    assert relative_error(runner_logits(model, tokens), expected) < 1e-5
    padded = Model(model.path, model.architecture, pad(model.graph, 128), (), {})
    assert relative_error(runner_logits(padded, tokens), expected) < 1e-5


@pytest.mark.parametrize("sizes", [[1] * 40, [15, 1, 1, 23]])
def test_pieces_equal_the_whole(toy: toys.Toy, model: Model, sizes: list[int]) -> None:
    tokens = tokens_of(40, seed=1)
    expected = torch.stack([_expected(toy, text) for text in tokens])
    assert relative_error(toys.logits_in_pieces(model, tokens, sizes), expected) < 1e-5


class Kept:
    """States of a pass in a list."""

    def __init__(self) -> None:
        self.last: int | None = None
        self.tensors: list[Tensor] = []

    def load(self) -> Iterator[Tensor]:
        return iter(self.tensors)

    def save(self, layer: int, tensors: Iterable[Tensor]) -> None:
        self.last, self.tensors = layer, [tensor.clone() for tensor in tensors]


@pytest.mark.parametrize("stopped", range(LAYERS))
@pytest.mark.parametrize("memory", [None, 1], ids=["in memory", "on disk"])
def test_a_pass_goes_on_where_it_was_stopped(model: Model, stopped: int, memory: int | None) -> None:
    """After any layer, with a stream that has forked from another one."""
    tokens, weights, kept = tokens_of(30, seed=2), ModelWeights(model), Kept()
    layer_pass = LayerPass(model, Workspace(memory), kept)
    whole = layer_pass.begin(REFERENCE, tokens, weights)
    for layer in model.graph.layers:
        if layer.index == 1:
            layer_pass.fork("other", whole, weights)
        layer_pass.advance([layer] * len(layer_pass.streams))
        if layer.index == stopped:
            layer_pass.save(layer.index)
    again = LayerPass(model, Workspace(memory), kept)
    names = [REFERENCE, "other"][: 1 if stopped == 0 else 2]
    taken_up = [again.begin(name, tokens, weights) for name in names]
    for layer in model.graph.layers:
        if not again.is_done(layer.index):
            again.advance([layer] * len(again.streams))
    for stream in (*layer_pass.streams.values(), *taken_up):
        assert not stream.shared
        assert all(torch.equal(stream.hidden[chunk], whole.hidden[chunk]) for chunk in range(len(tokens)))


def test_streams_are_taken_up_under_their_own_names(model: Model) -> None:
    tokens, weights, kept = tokens_of(30), ModelWeights(model), Kept()
    layer_pass = LayerPass(model, None, kept)
    layer_pass.begin(REFERENCE, tokens, weights)
    layer_pass.advance([model.graph.layers[0]])
    layer_pass.save(0)
    with pytest.raises(AssertionError, match="other is begun where reference was saved"):
        LayerPass(model, None, kept).begin("other", tokens, weights)


def test_state_counts_once(model: Model) -> None:
    both = 2 * 2 * SIZE * 2  # keys and values, heads, 16 bits
    assert model.graph.state_bytes_per_token() == both  # of the second layer
    assert model.graph.fixed_state_bytes() == WINDOW * both  # of the first
    assert model.graph.shared_states() == {0: 2, 1: 3}


@pytest.mark.parametrize("pieces", [None, 7])
def test_onnx_equals_the_formula(toy: toys.Toy, model: Model, pieces: int | None, tmp_path: Path) -> None:
    tokens = tokens_of(40)[0]
    found = onnx_logits(toys.onnx_of(model, tmp_path / "onnx"), tokens, pieces)
    assert relative_error(found, _expected(toy, tokens)) < 1e-5
