"""Dense models get the types that llama-quantize gives them: it counts their tensors where it reads the numbers of a
mixture's layers, and knows how many experts a model has."""

from __future__ import annotations

from collections import Counter
from functools import cache
from math import prod

import pytest
from moecast.archs.expressions import Read, TensorInfo
from moecast.archs.graph import MLP, Activation, Attention, Branch, Graph, Layer, Norm, SubLayer
from moecast.archs.weights import Role, Weight
from moecast.quant.planning.plan import plan_tensors
from moecast.quant.planning.recipes import recipe_named

LAYERS, HIDDEN, INNER, VOCABULARY = 24, 256, 512, 288


def weight(name: str, role: Role, *shape: int) -> Weight:
    return Weight(name, role, shape, Read(TensorInfo(name, "F32", shape, "model.safetensors", 0, 4 * prod(shape))))


def attention(blk: str, heads: int) -> Attention:
    """Of two key-value heads."""
    size = HIDDEN // heads
    return Attention(
        heads=heads,
        key_value_heads=2,
        head_size=size,
        query=weight(f"{blk}.attn_q.weight", Role.ATTENTION_Q, HIDDEN, HIDDEN),
        key=weight(f"{blk}.attn_k.weight", Role.ATTENTION_K, 2 * size, HIDDEN),
        value=weight(f"{blk}.attn_v.weight", Role.ATTENTION_V, 2 * size, HIDDEN),
        output=weight(f"{blk}.attn_output.weight", Role.ATTENTION_OUTPUT, HIDDEN, HIDDEN),
    )


def mlp(blk: str) -> MLP:
    return MLP(
        gate=weight(f"{blk}.ffn_gate.weight", Role.DENSE_GATE, INNER, HIDDEN),
        up=weight(f"{blk}.ffn_up.weight", Role.DENSE_UP, INNER, HIDDEN),
        down=weight(f"{blk}.ffn_down.weight", Role.DENSE_DOWN, HIDDEN, INNER),
        activation=Activation.SWIGLU,
    )


@cache
def dense(heads: int, every: int, tied: bool) -> Graph:
    """A multi-layer perceptron in every so many layers."""

    def layer(index: int) -> Layer:
        blk = f"blk.{index}"
        norm = Norm(weight(f"{blk}.attn_norm.weight", Role.NORM, HIDDEN), 1e-5)
        attending = Branch(norm, attention(blk, heads))
        branches = (attending,) if index % every else (attending, Branch(norm, mlp(blk)))
        return Layer(index, (SubLayer(branches),))

    head = weight("token_embd.weight" if tied else "output.weight", Role.HEAD, VOCABULARY, HIDDEN)
    return Graph(
        architecture="dense",
        vocabulary_size=VOCABULARY,
        hidden_size=HIDDEN,
        context_length=512,
        embedding=head if tied else weight("token_embd.weight", Role.EMBEDDING, VOCABULARY, HIDDEN),
        layers=tuple(map(layer, range(LAYERS))),
        final_norm=Norm(weight("output_norm.weight", Role.NORM, HIDDEN), 1e-5),
        head=head,
    )


@pytest.mark.parametrize(
    ("name", "narrow", "grouped"),
    [  # llama_tensor_get_type gave these: 2 heads a group and no importance, 4 heads a group and some
        ("Q8_0", {"Q8_0": 121}, {"Q8_0": 170}),
        ("Q6_K", {"Q6_K": 121}, {"Q6_K": 170}),
        ("Q5_K_M", {"Q5_K": 104, "Q6_K": 17}, {"Q5_K": 145, "Q6_K": 25}),
        ("Q5_K_S", {"Q5_K": 120, "Q6_K": 1}, {"Q5_K": 169, "Q6_K": 1}),
        ("Q4_K_M", {"Q4_K": 104, "Q6_K": 17}, {"Q4_K": 145, "Q6_K": 25}),
        ("Q4_K_S", {"Q4_K": 113, "Q5_K": 7, "Q6_K": 1}, {"Q4_K": 162, "Q5_K": 7, "Q6_K": 1}),
        ("Q3_K_L", {"Q3_K": 64, "Q5_K": 56, "Q6_K": 1}, {"Q3_K": 97, "Q5_K": 72, "Q6_K": 1}),
        ("Q3_K_M", {"Q3_K": 64, "Q4_K": 53, "Q5_K": 3, "Q6_K": 1}, {"Q3_K": 97, "Q4_K": 69, "Q5_K": 3, "Q6_K": 1}),
        ("Q3_K_S", {"Q3_K": 120, "Q6_K": 1}, {"Q3_K": 169, "Q6_K": 1}),
        ("Q2_K", {"Q2_K": 64, "Q3_K": 56, "Q6_K": 1}, {"Q2_K": 97, "Q3_K": 48, "Q4_K": 24, "Q6_K": 1}),
        ("Q2_K_S", {"Q2_K": 117, "Q4_K": 3, "Q6_K": 1}, {"Q2_K": 142, "Q4_K": 27, "Q6_K": 1}),
        ("Q4_0", {"Q4_0": 120, "Q6_K": 1}, {"Q4_0": 166, "Q4_1": 3, "Q6_K": 1}),
        ("Q5_0", {"Q5_0": 120, "Q6_K": 1}, {"Q5_0": 166, "Q5_1": 3, "Q6_K": 1}),
        ("IQ4_NL", {"IQ4_NL": 117, "Q5_K": 3, "Q6_K": 1}, {"IQ4_NL": 145, "Q5_K": 24, "Q6_K": 1}),
        ("IQ4_XS", {"IQ4_XS": 117, "Q5_K": 3, "Q6_K": 1}, {"IQ4_XS": 145, "Q5_K": 24, "Q6_K": 1}),
        ("IQ3_M", {"IQ3_S": 69, "Q4_K": 51, "Q6_K": 1}, {"IQ3_S": 118, "Q4_K": 51, "Q6_K": 1}),
        ("IQ3_S", {"IQ3_S": 120, "Q6_K": 1}, {"IQ3_S": 145, "Q4_K": 24, "Q6_K": 1}),
        ("IQ3_XS", {"IQ3_S": 62, "IQ3_XXS": 58, "Q6_K": 1}, {"IQ3_XXS": 84, "IQ3_S": 61, "Q4_K": 24, "Q6_K": 1}),
        (
            "IQ3_XXS",
            {"IQ2_S": 48, "IQ3_S": 48, "IQ3_XXS": 16, "Q3_K": 5, "Q4_K": 3, "Q5_K": 1},
            {"IQ3_XXS": 72, "IQ2_S": 48, "IQ3_S": 25, "Q4_K": 24, "Q5_K": 1},
        ),
        ("IQ2_M", {"IQ2_S": 69, "IQ3_S": 51, "Q5_K": 1}, {"IQ2_S": 117, "IQ3_S": 28, "Q4_K": 24, "Q5_K": 1}),
        ("IQ2_S", {"IQ2_XS": 69, "IQ3_S": 51, "Q5_K": 1}, {"IQ2_XS": 117, "IQ3_S": 28, "Q4_K": 24, "Q5_K": 1}),
        ("IQ2_XS", {"IQ2_XS": 93, "Q2_K": 27, "Q5_K": 1}, {"IQ2_XS": 141, "Q4_K": 24, "Q2_K": 4, "Q5_K": 1}),
        ("IQ2_XXS", {"IQ2_XXS": 93, "Q2_K": 27, "Q5_K": 1}, {"IQ2_XXS": 141, "Q4_K": 24, "Q2_K": 4, "Q5_K": 1}),
        (
            "IQ1_M",
            {"IQ1_M": 69, "Q2_K": 27, "IQ2_XXS": 24, "Q5_K": 1},
            {"IQ1_M": 117, "IQ2_XXS": 24, "Q4_K": 24, "Q2_K": 4, "Q5_K": 1},
        ),
        (
            "IQ1_S",
            {"IQ1_S": 69, "Q2_K": 27, "IQ2_XXS": 24, "Q5_K": 1},
            {"IQ1_S": 117, "IQ2_XXS": 24, "Q4_K": 24, "Q2_K": 4, "Q5_K": 1},
        ),
        ("MXFP4_MOE", {"Q8_0": 121}, {"Q8_0": 170}),
        ("Q2_0", {"Q2_0": 120, "Q6_K": 1}, {"Q2_0": 168, "Q6_K": 1, "Q4_K": 1}),
    ],
)
def test_types_are_those_that_llama_quantize_gives(name: str, narrow: dict[str, int], grouped: dict[str, int]) -> None:
    """With the head in the embedding, whose type is then the head's, and a perceptron in every third layer; and not."""
    for graph, calibrated, counts in ((dense(4, 3, True), False, narrow), (dense(8, 1, False), True, grouped)):
        plan = plan_tensors(graph, recipe_named(name), calibrated)
        assert Counter(tensor.type.name for tensor in plan.tensors if len(tensor.weight.shape) > 1) == counts


def test_tensors_of_a_kind_are_counted_where_few_layers_have_one() -> None:
    """The first three perceptrons of an eighth of 24 layers are those of layers 0, 3 and 6."""
    plan = plan_tensors(dense(4, 3, True), recipe_named("Q4_K_S"))
    early = [t.weight.layer for t in plan.tensors if t.weight.role is Role.DENSE_DOWN and t.type.name == "Q5_K"]
    assert early == [0, 3, 6]
