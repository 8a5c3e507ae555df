"""The quantities of DeepSeek V3 and Kimi K2, and their blocks under their GGUF names: multi-head latent attention."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from ..errors import BadInput
from .deepseek_v3_ropes import MscaledYarn, attention_factor, log_multiplier
from .dimensions import Dimensions, constant, of, quantity, written
from .graph import (
    MLP,
    Activation,
    Graph,
    LatentAttention,
    Layer,
    MoE,
    Norm,
    Prediction,
    Rope,
    Router,
    Score,
    Yarn,
    sequential,
)
from .shared import Builder, Source, check_rotary, check_top_k
from .weights import Role

ROUTER_EPSILON = 1e-20
LATENT_EPSILON = 1e-6  # of the norms of latents in the original models, whatever a configuration says of the others


def _all_layers(graph: Graph) -> list[Layer]:
    return [*graph.layers, *(prediction.layer for prediction in graph.predictions)]


def _of_router(get: Callable[[Router], Any]) -> Callable[[Graph], Any]:
    return of(MoE, lambda moe: get(moe.router) if isinstance(moe.router, Router) else None)


def _limited(get: Callable[[Router], int]) -> Callable[[Graph], int]:
    """To use all groups is no limit, and llama.cpp refuses to be told so."""
    return _of_router(lambda router: get(router) if router.groups_used < router.groups else 1)


def _of_yarn(get: Callable[[Yarn], Any]) -> Callable[[Graph], Any]:
    return of(LatentAttention, lambda op: get(op.rope.yarn) if op.rope.yarn else None)


def _of_mscale(get: Callable[[MscaledYarn], Any]) -> Callable[[Graph], Any]:
    """What `get` finds in YaRN and what it multiplies scores by, None where there is none."""
    return of(LatentAttention, lambda op: get(MscaledYarn(op.rope.yarn, _in_scores(op))) if op.rope.yarn else None)


def _in_scores(op: LatentAttention) -> float:
    """What queries and keys are each multiplied by beside YaRN's magnitude, which is of what is rotated alone."""
    scale: float = (op.scale * (op.key_size + op.rope.size) ** 0.5) ** 0.5
    return scale


@dataclass(frozen=True)
class Family(Dimensions):
    """A `query_rank` of 0 is none; `yarn` is None where nothing is scaled."""

    blocks: int = written("block_count", lambda graph: len(_all_layers(graph)))
    layers: int = quantity("num_hidden_layers")
    drafts: int = quantity(
        gguf="nextn_predict_layers", from_graph=lambda graph: len(graph.predictions) or None, default=0
    )
    words: int = written("vocab_size", lambda graph: graph.vocabulary_size)
    dense_layers: int = quantity(
        "first_k_dense_replace",
        "leading_dense_block_count",
        lambda graph: sum(isinstance(operation, MLP) for operation in graph.operations()),
        default=0,
    )
    dense_size: int = quantity(
        "intermediate_size", "feed_forward_length", of(MLP, lambda mlp: mlp.up.shape[0]), default=0
    )
    heads: int = quantity("num_attention_heads", "attention.head_count", of(LatentAttention, lambda op: op.heads))
    key_value_heads: int = constant("attention.head_count_kv", 1)
    query_rank: int = quantity(
        "q_lora_rank",
        "attention.q_lora_rank",
        of(LatentAttention, lambda op: op.query_down.shape[0] if op.query_down else 0),
        default=0,
    )
    latent_size: int = quantity(
        "kv_lora_rank",
        ("attention.kv_lora_rank", "attention.value_length"),
        of(LatentAttention, lambda op: op.latent_size),
    )
    remembered: int = written("attention.key_length", of(LatentAttention, lambda op: op.remembered_size))
    rotary_size: int = quantity(
        "qk_rope_head_dim", "rope.dimension_count", of(LatentAttention, lambda op: op.rope.size)
    )
    head_size: int = quantity(
        gguf="attention.key_length_mla", from_graph=of(LatentAttention, lambda op: op.key_size + op.rope.size)
    )
    value_size: int = quantity(
        "v_head_dim", "attention.value_length_mla", of(LatentAttention, lambda op: op.value_size)
    )
    epsilon: float = quantity(
        "rms_norm_eps", "attention.layer_norm_rms_epsilon", lambda graph: graph.final_norm.epsilon, default=1e-6
    )
    latent_epsilon: float = quantity()
    rope_base: float = quantity(
        gguf="rope.freq_base", from_graph=of(LatentAttention, lambda op: op.rope.base), default=1e4
    )
    yarn: MscaledYarn | None = quantity()  # noqa: RUF009 - a field, of frozen values
    scaling: str = written("rope.scaling.type", _of_yarn(lambda yarn: "yarn"))
    yarn_factor: float = written("rope.scaling.factor", _of_yarn(lambda yarn: yarn.factor))
    yarn_context: int = written("rope.scaling.original_context_length", _of_yarn(lambda yarn: yarn.original_context))
    yarn_fast: float = written("rope.scaling.yarn_beta_fast", _of_yarn(lambda yarn: yarn.fast))
    yarn_slow: float = written("rope.scaling.yarn_beta_slow", _of_yarn(lambda yarn: yarn.slow))
    yarn_multiplier: float = written("rope.scaling.yarn_log_multiplier", _of_mscale(log_multiplier))
    yarn_attention: float = written("rope.scaling.attn_factor", _of_mscale(attention_factor))
    experts: int = quantity(("n_routed_experts", "num_local_experts"), "expert_count", of(MoE, lambda moe: moe.experts))
    top_k: int = quantity("num_experts_per_tok", "expert_used_count", of(MoE, lambda moe: moe.router.top_k))
    expert_size: int = quantity(
        "moe_intermediate_size", "expert_feed_forward_length", of(MoE, lambda moe: moe.expert_size)
    )
    shared_count: int = quantity(
        "n_shared_experts",
        "expert_shared_count",
        of(MoE, lambda moe: moe.shared and moe.shared.up.shape[0] // moe.expert_size),
    )
    gating: int = constant("expert_gating_func", 2)
    groups: int = quantity(gguf="expert_group_count", from_graph=_limited(lambda router: router.groups), default=1)
    groups_used: int = quantity(
        gguf="expert_group_used_count", from_graph=_limited(lambda router: router.groups_used), default=1
    )
    router_scale: float = quantity(
        gguf="expert_weights_scale", from_graph=of(MoE, lambda moe: moe.router.scale), default=1.0
    )
    normalized: bool = quantity(
        gguf="expert_weights_norm", from_graph=_of_router(lambda router: router.normalize), default=False
    )


def check(d: Family, origin: str) -> None:
    check_rotary(origin, "qk_rope_head_dim", d.rotary_size, d.head_size - 1)
    if d.dense_layers >= d.layers:
        raise BadInput(
            f"{origin}: first_k_dense_replace is {d.dense_layers}, expected less than the {d.layers} layers, of which "
            "some have experts"
        )
    if d.dense_layers and not d.dense_size:
        raise BadInput(f"{origin}: intermediate_size is missing, which the first {d.dense_layers} layers have")
    if d.experts % d.groups or d.groups_used > d.groups or d.experts < 2 * d.groups:
        raise BadInput(
            f"{origin}: n_group is {d.groups} and topk_group {d.groups_used}, expected groups of at least two that "
            f"divide the {d.experts} experts"
        )
    check_top_k(origin, d.top_k, d.experts // d.groups * d.groups_used)
    if d.drafts and not d.query_rank:
        raise BadInput(f"{origin}: q_lora_rank is missing, without which llama.cpp does not draft")


def build(name: str, d: Family, source: Source) -> Graph:
    """The graph of GGUF's architecture of that name."""
    return replace(LatentBuilder(d, source).model(name), scaled_roles=(Role.ATTENTION_OUTPUT,))


class LatentBuilder(Builder):
    """Makes the blocks of one model."""

    def __init__(self, d: Family, source: Source) -> None:
        super().__init__(d, d.epsilon, source)
        self.d = d

    def model(self, name: str) -> Graph:
        graph = self.graph(name, tuple(self.layer(index) for index in range(self.d.layers)))
        return replace(graph, predictions=(self.prediction(self.d.layers),) if self.d.drafts else ())

    def layer(self, index: int) -> Layer:
        blk, hidden = f"blk.{index}", self.hidden
        mixed = sequential(self.norm(f"{blk}.attn_norm.weight", hidden), self.latent_attention(index))
        inner = self.gated_mlp(blk, self.d.dense_size) if index < self.d.dense_layers else self.mixture(blk)
        return Layer(index, (mixed, sequential(self.norm(f"{blk}.ffn_norm.weight", hidden), inner)))

    def latent_attention(self, index: int) -> LatentAttention:
        d, blk, hidden, query = self.d, f"blk.{index}", self.hidden, self.d.heads * self.d.head_size
        key_size, rank = d.head_size - d.rotary_size, d.query_rank
        yarn, scale = (d.yarn.yarn, d.yarn.in_scores) if d.yarn else (None, 1.0)
        plain, up = (f"{blk}.attn_q.weight", Role.ATTENTION_Q), (f"{blk}.attn_q_b.weight", Role.ATTENTION_Q_UP)
        return LatentAttention(
            heads=d.heads,
            query_down=self.weight(f"{blk}.attn_q_a.weight", Role.ATTENTION_Q_DOWN, rank, hidden) if rank else None,
            query_norm=self.latent_norm(f"{blk}.attn_q_a_norm.weight", rank) if rank else None,
            query=self.weight(*(up if rank else plain), query, rank or hidden),
            key_value_down=self.weight(
                f"{blk}.attn_kv_a_mqa.weight", Role.ATTENTION_KV, d.latent_size + d.rotary_size, hidden
            ),
            key_value_norm=self.latent_norm(f"{blk}.attn_kv_a_norm.weight", d.latent_size),
            key_up=self.weight(f"{blk}.attn_k_b.weight", Role.ATTENTION_KEY_UP, d.heads, d.latent_size, key_size),
            value_up=self.weight(
                f"{blk}.attn_v_b.weight", Role.ATTENTION_VALUE_UP, d.heads, d.value_size, d.latent_size
            ),
            output=self.weight(f"{blk}.attn_output.weight", Role.ATTENTION_OUTPUT, hidden, d.heads * d.value_size),
            rope=Rope(d.rotary_size, d.rope_base, interleaved=True, last=True, yarn=yarn),
            scale=d.head_size**-0.5 * scale**2,
        )

    def latent_norm(self, name: str, size: int) -> Norm:
        return replace(self.norm(name, size), epsilon=self.d.latent_epsilon)

    def mixture(self, blk: str) -> MoE:
        d = self.d
        router = Router(
            weight=self.weight(f"{blk}.ffn_gate_inp.weight", Role.ROUTER, d.experts, d.hidden),
            bias=self.weight(f"{blk}.exp_probs_b.bias", Role.ROUTER_BIAS, d.experts),
            score=Score.SIGMOID,
            top_k=d.top_k,
            groups=d.groups,
            groups_used=d.groups_used,
            epsilon=ROUTER_EPSILON,
            scale=d.router_scale,
            normalize=d.normalized,
        )
        shape = (d.experts, d.expert_size, d.hidden)
        return self.experts(blk, router, Activation.SWIGLU, shape, d.shared_count * d.expert_size)

    def prediction(self, index: int) -> Prediction:
        blk, hidden = f"blk.{index}.nextn", self.hidden
        return Prediction(
            embedding_norm=self.norm(f"{blk}.enorm.weight", hidden),
            hidden_norm=self.norm(f"{blk}.hnorm.weight", hidden),
            projection=self.weight(f"{blk}.eh_proj.weight", Role.PREDICTION_INPUT, hidden, 2 * hidden),
            layer=self.layer(index),
            final_norm=self.norm(f"{blk}.shared_head_norm.weight", hidden),
        )
