"""A table of quantities, read from both files and written to one."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from moecast.archs.config import Config
from moecast.archs.dimensions import Dimensions, constant, of, quantity, written
from moecast.archs.expressions import Zeros
from moecast.archs.graph import MLP, Activation, Graph, Layer, Mamba2, Norm, sequential
from moecast.archs.weights import Role, Weight
from moecast.errors import BadInput


@dataclass(frozen=True)
class Table(Dimensions):
    double: int = written("embedding_length_out", lambda graph: 2 * graph.hidden_size)
    width: int = quantity(("ffn_size", "mlp.size"), ("ffn", "ffn_again"), of(MLP, lambda op: op.up.shape[0]))
    epsilon: float = quantity("eps", "epsilon", lambda graph: graph.final_norm.epsilon, default=0.5)
    state: int = quantity(gguf="state", from_graph=of(Mamba2, lambda op: op.state_size), default=0)
    kind: int = constant("kind", 3)


def weight(name: str, *shape: int) -> Weight:
    return Weight(name, Role.NORM, shape, Zeros(shape))


NORM = Norm(weight("norm", 8), epsilon=0.25)
OPERATION = MLP(weight("up", 16, 8), weight("down", 8, 16), Activation.RELU_SQUARED)
GRAPH = Graph(
    architecture="tiny",
    vocabulary_size=32,
    hidden_size=8,
    context_length=64,
    embedding=weight("embedding", 32, 8),
    layers=(Layer(0, (sequential(NORM, OPERATION),)),),
    final_norm=NORM,
    head=weight("head", 32, 8),
)
METADATA = {
    "tiny.context_length": 64,
    "tiny.embedding_length": 8,
    "tiny.embedding_length_out": 16,
    "tiny.ffn": 16,
    "tiny.ffn_again": 16,
    "tiny.epsilon": 0.25,
    "tiny.kind": 3,
}
CONFIG = {"vocab_size": 32, "max_position_embeddings": 64, "hidden_size": 8, "ffn_size": 16, "eps": 0.25}
DIMENSIONS = Table(vocabulary=32, context=64, hidden=8, width=16, epsilon=0.25, state=0)


def test_metadata_comes_in_the_order_of_the_table_without_what_the_graph_lacks() -> None:
    assert list(Table.metadata(GRAPH).items()) == list(METADATA.items())


def test_what_was_written_is_read() -> None:
    assert Table.from_gguf(Config(METADATA, "file"), "tiny", vocabulary=32) == DIMENSIONS
    assert DIMENSIONS.kind == 3


def test_config_has_several_spellings() -> None:
    nested = {key: value for key, value in CONFIG.items() if key != "ffn_size"} | {"mlp": {"size": 16}}
    for values in (CONFIG, nested, CONFIG | {"mlp": {"size": 9}}):
        config = Config(values, "config.json")
        assert Table.from_config(config) == DIMENSIONS
        assert config.unread() == ()
    assert Table.from_config(Config(CONFIG | {"eps": None}, "config.json")).epsilon == 0.5
    assert Table.from_config(Config(CONFIG, "config.json"), hidden=4).hidden == 4


def test_missing_and_other_values_are_named() -> None:
    with pytest.raises(BadInput, match=r"^config\.json: ffn_size or mlp\.size is missing, expected a whole number$"):
        Table.from_config(Config({key: CONFIG[key] for key in CONFIG if key != "ffn_size"}, "config.json"))
    with pytest.raises(BadInput, match=r"^config\.json: mlp: size is 'wide', expected a whole number$"):
        Table.from_config(Config(CONFIG | {"ffn_size": None, "mlp": {"size": "wide"}}, "config.json"))
    with pytest.raises(BadInput, match=r"^file: tiny\.ffn is missing"):
        Table.from_gguf(Config({k: v for k, v in METADATA.items() if k != "tiny.ffn"}, "file"), "tiny", vocabulary=32)
    with pytest.raises(BadInput, match=r"^file: tiny\.kind is 2, expected 3"):
        Table.from_gguf(Config(METADATA | {"tiny.kind": 2}, "file"), "tiny", vocabulary=32)
