"""The quantities of Qwen3-Next and Qwen3.5, and their blocks under their GGUF names."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from ..errors import BadInput
from .architecture import refuse_unlike
from .dimensions import Dimensions, first, of, of_rope, of_yarn, quantity, written
from .graph import (
    MLP,
    Activation,
    Attention,
    GatedDeltaNet,
    Graph,
    Layer,
    MoE,
    Operation,
    Prediction,
    Rope,
    Router,
    Score,
    sequential,
)
from .shared import Builder, Source, check_heads, check_rotary, check_top_k, yarn_of
from .weights import Role

INTERVAL = 4  # every so many layers have attention, unless a file says otherwise
KEY_EPSILON = 1e-6  # whatever a configuration says
SECTIONS = 4  # of rotated pairs, of which the last is 0

# What llama.cpp multiplies by a `.scale`; of Gated DeltaNet only where its projections are not fused.
_SCALED = (
    Role.HEAD,
    Role.EXPERT_GATE,
    Role.EXPERT_UP,
    Role.EXPERT_DOWN,
    Role.SHARED_GATE,
    Role.SHARED_UP,
    Role.SHARED_DOWN,
    Role.ATTENTION_Q,
    Role.ATTENTION_K,
    Role.ATTENTION_V,
    Role.ATTENTION_OUTPUT,
    Role.DENSE_GATE,
    Role.DENSE_UP,
    Role.DENSE_DOWN,
)
_SCALED_DELTA = (Role.DELTA_INPUT, Role.DELTA_GATE, Role.DELTA_OUTPUT)


def _blocks(graph: Graph) -> int:
    return len(graph.layers) + len(graph.predictions)


def _recurrent(graph: Graph) -> list[bool]:
    """By block, whether it has a state instead of keys and values."""
    found = [any(isinstance(op, GatedDeltaNet) for op in layer.operations) for layer in graph.layers]
    return found + [False] * len(graph.predictions)


def _interval(graph: Graph) -> int | None:
    """How many layers from one with attention to the next; None where they are not regular."""
    kinds = _recurrent(graph)[: len(graph.layers)]
    interval = kinds.index(False) + 1 if False in kinds else len(kinds) + 1
    regular = [bool((index + 1) % interval) for index in range(len(kinds))]
    return interval if kinds == regular else None


@dataclass(frozen=True)
class Family(Dimensions):
    """`recurrent` has an entry for each layer; of experts and dense layers those that are absent have size 0."""

    blocks: int = written("block_count", _blocks)
    recurrent: tuple[bool, ...] = quantity()
    interval: int = written("full_attention_interval", _interval)
    listed: int = written("attention.recurrent_layers", lambda graph: None if _interval(graph) else _recurrent(graph))
    heads: int = quantity("num_attention_heads", "attention.head_count", of(Attention, lambda op: op.heads))
    key_value_heads: int = quantity(
        "num_key_value_heads", "attention.head_count_kv", of(Attention, lambda op: op.key_value_heads)
    )
    head_size: int = quantity(
        "head_dim", ("attention.key_length", "attention.value_length"), of(Attention, lambda op: op.head_size)
    )
    epsilon: float = quantity(
        "rms_norm_eps", "attention.layer_norm_rms_epsilon", lambda graph: graph.final_norm.epsilon, default=1e-6
    )
    key_epsilon: float = quantity()
    rotary_size: int = quantity(gguf="rope.dimension_count", from_graph=of_rope(lambda rope: rope.size))
    rope_base: float = quantity(gguf="rope.freq_base", from_graph=of_rope(lambda rope: rope.base), default=1e4)
    sections: tuple[int, ...] = quantity()
    padded_sections: int = written(
        "rope.dimension_sections",
        of_rope(lambda rope: [*rope.sections, *[0] * SECTIONS][:SECTIONS] if rope.sections else None),
    )
    scaling: str = quantity(gguf="rope.scaling.type", from_graph=of_yarn(lambda yarn: "yarn"), default="none")
    yarn_factor: float = quantity(gguf="rope.scaling.factor", from_graph=of_yarn(lambda yarn: yarn.factor), default=1.0)
    yarn_context: int = quantity(
        gguf="rope.scaling.original_context_length", from_graph=of_yarn(lambda yarn: yarn.original_context), default=0
    )
    kernel: int = quantity(
        "linear_conv_kernel_dim", "ssm.conv_kernel", of(GatedDeltaNet, lambda op: op.convolution.columns)
    )
    key_size: int = quantity("linear_key_head_dim", "ssm.state_size", of(GatedDeltaNet, lambda op: op.key_size))
    value_size: int = quantity("linear_value_head_dim")
    value_width: int = written("ssm.inner_size", of(GatedDeltaNet, lambda op: op.parts[2]))
    delta_key_heads: int = quantity(
        "linear_num_key_heads", "ssm.group_count", of(GatedDeltaNet, lambda op: op.key_heads)
    )
    delta_heads: int = quantity("linear_num_value_heads", "ssm.time_step_rank", of(GatedDeltaNet, lambda op: op.heads))
    experts: int = quantity(("num_experts", "num_local_experts"), "expert_count", of(MoE, lambda moe: moe.experts))
    top_k: int = quantity("num_experts_per_tok", "expert_used_count", of(MoE, lambda moe: moe.router.top_k))
    expert_size: int = quantity(
        "moe_intermediate_size", "expert_feed_forward_length", of(MoE, lambda moe: moe.expert_size)
    )
    shared_size: int = quantity(
        "shared_expert_intermediate_size",
        "expert_shared_feed_forward_length",
        of(MoE, lambda moe: moe.shared and moe.shared.up.shape[0]),
    )
    normalized: bool = quantity("norm_topk_prob", default=True)
    dense_size: int = quantity("intermediate_size", "feed_forward_length", of(MLP, lambda mlp: mlp.up.shape[0]))
    drafts: int = quantity(
        gguf="nextn_predict_layers", from_graph=lambda graph: len(graph.predictions) or None, default=0
    )


WITHOUT_EXPERTS: dict[str, Any] = {
    **dict.fromkeys(("experts", "top_k", "expert_size", "shared_size"), 0),
    "normalized": True,
}
WITHOUT_DENSE: dict[str, Any] = {"dense_size": 0}


def check(d: Family, origin: str) -> None:
    check_heads(origin, d.heads, d.key_value_heads)
    check_rotary(origin, "partial_rotary_factor of head_dim", d.rotary_size, d.head_size)
    if d.experts:
        check_top_k(origin, d.top_k, d.experts)
    if d.delta_heads % d.delta_key_heads:
        raise BadInput(
            f"{origin}: linear_num_value_heads is {d.delta_heads}, expected a multiple of linear_num_key_heads "
            f"({d.delta_key_heads})"
        )


def build(name: str, d: Family, source: Source, fused: bool) -> Graph:
    """The graph of GGUF's architecture of that name.

    Args:
        fused: whether one matrix gives beta and alpha; then heads are in the order of their key heads.
    """
    builder = _Builder(d, source, fused)
    graph = builder.graph(name, tuple(builder.layer(index, recurrent) for index, recurrent in enumerate(d.recurrent)))
    predictions = (builder.prediction(len(d.recurrent)),) if d.drafts else ()
    return replace(graph, predictions=predictions, scaled_roles=_SCALED if fused else (*_SCALED, *_SCALED_DELTA))


class _Builder(Builder):
    def __init__(self, d: Family, source: Source, fused: bool) -> None:
        super().__init__(d, d.epsilon, source)
        self.d = d
        self.fused = fused

    def layer(self, index: int, recurrent: bool) -> Layer:
        blk = f"blk.{index}"
        mixer = self.delta_net(blk) if recurrent else self.gated_attention(blk)
        inner: Operation = self.mixture(blk) if self.d.experts else self.gated_mlp(blk, self.d.dense_size)
        after = self.norm(f"{blk}.post_attention_norm.weight", self.hidden)
        return Layer(
            index, (sequential(self.norm(f"{blk}.attn_norm.weight", self.hidden), mixer), sequential(after, inner))
        )

    def gated_attention(self, blk: str) -> Attention:
        d = self.d
        yarn = yarn_of(d.yarn_factor, d.yarn_context) if d.scaling == "yarn" else None
        rope = Rope(d.rotary_size, d.rope_base, yarn=yarn, sections=d.sections)
        norms = (d.head_size, d.head_size)
        return self.attention(blk, d.heads, d.key_value_heads, d.head_size, rope, norms, gated=True)

    def delta_net(self, blk: str) -> GatedDeltaNet:
        d = self.d
        value, heads = d.delta_heads * d.value_size, d.delta_heads
        channels = 2 * d.delta_key_heads * d.key_size + value
        beta, rows = ("ssm_ba", 2 * heads) if self.fused else ("ssm_beta", heads)
        return GatedDeltaNet(
            key_heads=d.delta_key_heads,
            heads=heads,
            key_size=d.key_size,
            value_size=d.value_size,
            input=self.weight(f"{blk}.attn_qkv.weight", Role.DELTA_INPUT, channels, d.hidden),
            gate=self.weight(f"{blk}.attn_gate.weight", Role.DELTA_GATE, value, d.hidden),
            beta=self.weight(f"{blk}.{beta}.weight", Role.DELTA_RATE, rows, d.hidden),
            alpha=None if self.fused else self.weight(f"{blk}.ssm_alpha.weight", Role.DELTA_RATE, heads, d.hidden),
            convolution=self.weight(f"{blk}.ssm_conv1d.weight", Role.DELTA_CONVOLUTION, channels, d.kernel),
            step_bias=self.weight(f"{blk}.ssm_dt.bias", Role.DELTA_SCALAR, heads),
            decay=self.weight(f"{blk}.ssm_a", Role.DELTA_SCALAR, heads),
            norm=self.norm(f"{blk}.ssm_norm.weight", d.value_size),
            output=self.weight(f"{blk}.ssm_out.weight", Role.DELTA_OUTPUT, d.hidden, value),
            tiled=not self.fused,
            key_epsilon=d.key_epsilon,
        )

    def mixture(self, blk: str) -> MoE:
        d = self.d
        weight = self.weight(f"{blk}.ffn_gate_inp.weight", Role.ROUTER, d.experts, d.hidden)
        router = Router(weight, None, Score.SOFTMAX, d.top_k, normalize=d.normalized)
        shape = (d.experts, d.expert_size, d.hidden)
        moe = self.experts(blk, router, Activation.SWIGLU, shape, d.shared_size)
        gate = self.weight(f"{blk}.ffn_gate_inp_shexp.weight", Role.SHARED_ROUTER, 1, d.hidden)
        return replace(moe, shared_gate=gate)

    def prediction(self, index: int) -> Prediction:
        blk, hidden = f"blk.{index}.nextn", self.hidden
        return Prediction(
            embedding_norm=self.norm(f"{blk}.enorm.weight", hidden),
            hidden_norm=self.norm(f"{blk}.hnorm.weight", hidden),
            projection=self.weight(f"{blk}.eh_proj.weight", Role.PREDICTION_INPUT, hidden, 2 * hidden),
            layer=self.layer(index, recurrent=False),
            final_norm=self.norm(f"{blk}.shared_head_norm.weight", hidden),
        )


def gguf_metadata(graph: Graph) -> dict[str, Any]:
    """Raises BadInput for what llama.cpp would compute otherwise, or not load."""
    delta, attention, experts = first(graph, GatedDeltaNet), first(graph, Attention), first(graph, MoE)
    unlike = {
        "layers of one kind alone (layer_types)": not (delta and attention),
        "values of another width than keys (linear_value_head_dim, linear_key_head_dim)": (
            delta and delta.value_size != delta.key_size
        ),
        f"norms with an epsilon other than {KEY_EPSILON:g} (rms_norm_eps)": (
            delta and delta.key_epsilon != graph.final_norm.epsilon
        ),
        "shares of experts that do not add up to 1 (norm_topk_prob false)": (
            experts and isinstance(experts.router, Router) and not experts.router.normalize
        ),
    }
    refuse_unlike(graph, unlike)
    return Family.metadata(graph)
