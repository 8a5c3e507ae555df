"""What Cohere2's models are made of: their quantities, and how a graph is built of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from ..errors import BadInput
from .dimensions import Dimensions, constant, of, quantity, written
from .graph import MLP, Activation, Attention, Branch, Graph, Layer, MoE, Norm, Rope, Router, Score, SubLayer
from .shared import Builder, Source, check_heads, check_rotary, check_top_k
from .weights import Role

DENSE_NAME, MIXTURE_NAME = "cohere2", "cohere2moe"
_SCALED_ROLES = (  # what llama.cpp multiplies by a `.scale`
    *(Role.ATTENTION_Q, Role.ATTENTION_K, Role.ATTENTION_V, Role.ATTENTION_OUTPUT),
    *(Role.EXPERT_GATE, Role.EXPERT_UP, Role.EXPERT_DOWN),
    *(Role.SHARED_GATE, Role.SHARED_UP, Role.SHARED_DOWN),
    *(Role.DENSE_GATE, Role.DENSE_UP, Role.DENSE_DOWN),
)
GATING = {1: Score.SOFTMAX, 2: Score.SIGMOID}  # llama.cpp's numbers
AVERAGE = 0.5  # of routed experts and the shared one


def attentions(graph: Graph) -> list[Attention]:
    return [operation for operation in graph.operations() if isinstance(operation, Attention)]


def _rope_base(graph: Graph) -> float | None:
    return next((op.rope.base for op in attentions(graph) if op.rope), None)


def _epsilon(centered: bool) -> Callable[[Graph], float | None]:
    """llama.cpp tells the kind of norm by the key that is there."""
    return lambda graph: graph.final_norm.epsilon if graph.final_norm.centered == centered else None


def _shared_count(moe: MoE) -> int | None:
    return -(-moe.shared.up.shape[0] // moe.expert_size) if moe.shared else None


def _dense_layers(graph: Graph) -> int | None:
    dense = sum(isinstance(operation, MLP) for operation in graph.operations())
    return dense if graph.architecture == MIXTURE_NAME else None


@dataclass(frozen=True)
class Family(Dimensions):
    """Quantities of absent kinds of layers are 0. `windowed`, `rotated` and `dense` say of each layer whether its
    attention has a window, whether it knows positions, and whether there are no experts."""

    layers: int = quantity("num_hidden_layers", "block_count", lambda graph: len(graph.layers))
    dense_size: int = quantity(gguf="feed_forward_length", from_graph=of(MLP, lambda mlp: mlp.up.shape[0]), default=0)
    heads: int = quantity("num_attention_heads", "attention.head_count", of(Attention, lambda op: op.heads))
    key_value_heads: int = quantity(
        gguf="attention.head_count_kv", from_graph=of(Attention, lambda op: op.key_value_heads)
    )
    head_size: int = quantity(
        gguf=("attention.key_length", "attention.value_length"), from_graph=of(Attention, lambda op: op.head_size)
    )
    epsilon: float = quantity()
    centered: bool = quantity()
    layer_norm: float = written("attention.layer_norm_epsilon", _epsilon(centered=True))
    rms_norm: float = written("attention.layer_norm_rms_epsilon", _epsilon(centered=False))
    window: int = quantity(
        gguf="attention.sliding_window",
        from_graph=lambda graph: max(op.window or 0 for op in attentions(graph)),
        default=0,
    )
    pattern: tuple[bool, ...] = written(
        "attention.sliding_window_pattern", lambda graph: [op.window is not None for op in attentions(graph)]
    )
    rotary_size: int = written("rope.dimension_count", of(Attention, lambda op: op.head_size))
    rope_base: float = quantity(gguf="rope.freq_base", from_graph=_rope_base, default=1e4)
    scaling: str = constant("rope.scaling.type", "none")
    logit_scale: float = quantity("logit_scale", "logit_scale", lambda graph: graph.logit_scale, default=0.0625)
    experts: int = quantity("num_experts", "expert_count", of(MoE, lambda moe: moe.experts))
    top_k: int = quantity("num_experts_per_tok", "expert_used_count", of(MoE, lambda moe: moe.router.top_k))
    expert_size: int = quantity(gguf="expert_feed_forward_length", from_graph=of(MoE, lambda moe: moe.expert_size))
    dense_layers: int = written("leading_dense_block_count", _dense_layers)
    shared_count: int = written("expert_shared_count", of(MoE, _shared_count))
    shared_size: int = quantity(
        gguf="expert_shared_feed_forward_length",
        from_graph=of(MoE, lambda moe: moe.shared and moe.shared.up.shape[0]),
        default=0,
    )
    gating: int = quantity(
        gguf="expert_gating_func",
        from_graph=of(MoE, lambda moe: next(number for number, score in GATING.items() if score is moe.router.score)),
        default=2,
    )
    normalized: bool = quantity(
        gguf="expert_weights_norm",
        from_graph=of(MoE, lambda moe: moe.router.normalize if isinstance(moe.router, Router) else None),
        default=False,
    )
    averaged: bool = quantity()
    biased: bool = quantity()
    tied: bool = quantity()
    windowed: tuple[bool, ...] = quantity()
    rotated: tuple[bool, ...] = quantity()
    dense: tuple[bool, ...] = quantity()


WITHOUT_EXPERTS: Mapping[str, Any] = {"experts": 0, "top_k": 0, "expert_size": 0, "shared_size": 0}


def check(d: Family, origin: str) -> None:
    check_heads(origin, d.heads, d.key_value_heads)
    check_rotary(origin, "head_dim", d.head_size, d.head_size)
    if any(d.windowed) and not d.window:
        raise BadInput(f"{origin}: sliding_window is missing, which most layers have")
    if not all(d.dense):
        check_top_k(origin, d.top_k, d.experts)
        if d.gating not in GATING:
            raise BadInput(f"{origin}: expert_gating_func is {d.gating}, expected one of {[*GATING]}")


class _Builder(Builder):
    """Makes the blocks of one model."""

    def __init__(self, d: Family, source: Source) -> None:
        super().__init__(d, d.epsilon, source)
        self._d = d

    def norm(self, name: str, *shape: int) -> Norm:
        return replace(super().norm(name, *shape), centered=self._d.centered)

    def layer(self, index: int) -> Layer:
        """Both branches read the same norm."""
        d, blk = self._d, f"blk.{index}"
        rope = Rope(d.head_size, d.rope_base, interleaved=True) if d.rotated[index] else None
        attention = self.attention(blk, d.heads, d.key_value_heads, d.head_size, rope)
        attention = replace(
            self.biased(blk, attention) if d.biased else attention, window=d.window if d.windowed[index] else None
        )
        inner = self.gated_mlp(blk, d.dense_size) if d.dense[index] else self._routed(blk)
        norm = self.norm(f"{blk}.attn_norm.weight", d.hidden)
        return Layer(index, (SubLayer((Branch(norm, attention), Branch(norm, inner))),))

    def _routed(self, blk: str) -> MoE:
        d = self._d
        weight = self.weight(f"{blk}.ffn_gate_inp.weight", Role.ROUTER, d.experts, d.hidden)
        router = Router(weight, None, GATING[d.gating], d.top_k, normalize=d.normalized)
        shape = (d.experts, d.expert_size, d.hidden)
        moe = self.experts(blk, router, Activation.SWIGLU, shape, d.shared_size)
        return replace(moe, scale=AVERAGE) if moe.shared and d.averaged else moe


def build(d: Family, source: Source) -> Graph:
    builder = _Builder(d, source)
    name = MIXTURE_NAME if d.experts else DENSE_NAME
    graph = builder.graph(name, tuple(map(builder.layer, range(d.layers))), d.tied)
    return replace(graph, scaled_roles=_SCALED_ROLES, logit_scale=d.logit_scale)
