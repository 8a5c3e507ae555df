"""The quantities of Nemotron 3 and Nemotron-H, and their blocks under their GGUF names."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from ..errors import BadInput
from .dimensions import Dimensions, of, quantity, written
from .graph import (
    MLP,
    Activation,
    Attention,
    Graph,
    Layer,
    Mamba2,
    MoE,
    Operation,
    Prediction,
    Router,
    Score,
    sequential,
)
from .shared import Builder, Source, check_heads, check_top_k
from .weights import Role

MIXTURE_NAME, DENSE_NAME = "nemotron_h_moe", "nemotron_h"
MAMBA, ATTENTION, EXPERTS, DENSE_LAYER = "M", "*", "E", "-"
ROUTER_EPSILON = 1e-20

# What llama.cpp multiplies by a `.scale`; its latent projections, for one, do without.
_SCALED_ROLES = (
    Role.ATTENTION_Q,
    Role.ATTENTION_K,
    Role.ATTENTION_V,
    Role.ATTENTION_OUTPUT,
    Role.MAMBA_INPUT,
    Role.MAMBA_OUTPUT,
    Role.EXPERT_UP,
    Role.EXPERT_DOWN,
    Role.SHARED_UP,
    Role.SHARED_DOWN,
    Role.DENSE_UP,
    Role.DENSE_DOWN,
)


def _all_layers(graph: Graph) -> list[Layer]:
    return [*graph.layers, *(prediction.layer for prediction in graph.predictions)]


def _key_value_heads(layer: Layer) -> int:
    """Number of key-value heads; 0 tells llama.cpp that the layer has no attention."""
    attentions = (op.key_value_heads for op in layer.operations if isinstance(op, Attention))
    return next(attentions, 0)


def _feed_forward_width(layer: Layer) -> int:
    """Width of a layer's experts or of its dense MLP; 0 tells llama.cpp that it has neither."""
    for operation in layer.operations:
        match operation:
            case MoE():
                return operation.expert_size
            case MLP():
                return operation.up.shape[0]
    return 0


def _of_limit(get: Callable[[Router], int]) -> Callable[[Graph], int | None]:
    """To use all groups is no limit, and llama.cpp refuses to be told so."""

    def find(moe: MoE) -> int | None:
        router = moe.router
        return get(router) if isinstance(router, Router) and router.groups_used < router.groups else None

    return of(MoE, find)


@dataclass(frozen=True)
class Family(Dimensions):
    """Quantities of absent kinds of layers are 0. `kinds` has a letter for each layer."""

    blocks: int = written("block_count", lambda graph: len(_all_layers(graph)))
    kinds: str = quantity()
    dense_size: int = quantity(
        "intermediate_size", "feed_forward_length", lambda graph: [*map(_feed_forward_width, _all_layers(graph))]
    )
    heads: int = quantity("num_attention_heads", "attention.head_count", of(Attention, lambda op: op.heads))
    key_value_heads: int = quantity(
        "num_key_value_heads", "attention.head_count_kv", lambda graph: [*map(_key_value_heads, _all_layers(graph))]
    )
    head_size: int = quantity(
        ("head_dim", "attention_head_dim"),
        ("attention.key_length", "attention.value_length"),
        of(Attention, lambda op: op.head_size),
    )
    epsilon: float = quantity(
        ("layer_norm_epsilon", "norm_eps", "rms_norm_eps"),
        ("attention.layer_norm_epsilon", "attention.layer_norm_rms_epsilon"),
        lambda graph: graph.final_norm.epsilon,
        default=1e-5,
    )
    kernel: int = quantity(
        ("conv_kernel", "mamba_d_conv"), "ssm.conv_kernel", of(Mamba2, lambda op: op.convolution.columns), default=4
    )
    mamba_head_size: int = quantity("mamba_head_dim", "ssm.inner_size", of(Mamba2, lambda op: op.inner_size))
    mamba_state: int = quantity("ssm_state_size", "ssm.state_size", of(Mamba2, lambda op: op.state_size))
    mamba_heads: int = quantity("mamba_num_heads", "ssm.time_step_rank", of(Mamba2, lambda op: op.heads))
    mamba_groups: int = quantity(("n_groups", "mamba_n_groups"), "ssm.group_count", of(Mamba2, lambda op: op.groups))
    experts: int = quantity("n_routed_experts", "expert_count", of(MoE, lambda moe: moe.experts))
    top_k: int = quantity("num_experts_per_tok", "expert_used_count", of(MoE, lambda moe: moe.router.top_k))
    expert_size: int = quantity(
        "moe_intermediate_size", "expert_feed_forward_length", of(MoE, lambda moe: moe.expert_size)
    )
    shared_size: int = quantity(
        "moe_shared_expert_intermediate_size",
        "expert_shared_feed_forward_length",
        of(MoE, lambda moe: moe.shared and moe.shared.up.shape[0]),
    )
    shared_count: int = written("expert_shared_count", of(MoE, lambda moe: 1))
    normalized: bool = written("expert_weights_norm", of(MoE, lambda moe: True))
    router_scale: float = quantity(
        "routed_scaling_factor", "expert_weights_scale", of(MoE, lambda moe: moe.router.scale), default=1.0
    )
    latent: int = quantity(
        "moe_latent_size",
        "moe_latent_size",
        of(MoE, lambda moe: moe.latent_down and moe.latent_down.shape[0]),
        default=0,
    )
    router_groups: int = quantity("n_group", "expert_group_count", _of_limit(lambda router: router.groups), default=1)
    router_groups_used: int = quantity(
        "topk_group", "expert_group_used_count", _of_limit(lambda router: router.groups_used), default=1
    )
    drafts: int = quantity(
        gguf="nextn_predict_layers", from_graph=lambda graph: len(graph.predictions) or None, default=0
    )


WITHOUT_EXPERTS = dict.fromkeys(("experts", "top_k", "expert_size", "shared_size", "latent"), 0) | dict.fromkeys(
    ("router_groups", "router_groups_used"), 1
)


def check(d: Family, origin: str) -> None:
    if MAMBA not in d.kinds or ATTENTION not in d.kinds:
        raise BadInput(f"{origin}: layers are {d.kinds}, expected Mamba-2 (M) and attention (*) among them")
    check_heads(origin, d.heads, d.key_value_heads)
    if d.mamba_heads % d.mamba_groups:
        raise BadInput(
            f"{origin}: mamba_num_heads is {d.mamba_heads}, expected a multiple of n_groups ({d.mamba_groups})"
        )
    if not d.experts:
        return
    if d.experts % d.router_groups or not d.router_groups_used <= d.router_groups:
        raise BadInput(
            f"{origin}: n_group is {d.router_groups} and topk_group {d.router_groups_used}, expected groups that "
            f"divide the {d.experts} experts"
        )
    if d.router_groups > 1 and d.experts < 2 * d.router_groups:
        raise BadInput(f"{origin}: n_group is {d.router_groups}, expected groups of at least two experts")
    check_top_k(origin, d.top_k, d.experts // d.router_groups * d.router_groups_used)


def build(d: Family, source: Source) -> Graph:
    """The graph; raises BadInput where `source` gives another shape than the quantities demand."""
    builder = _Builder(d, source)
    graph = builder.graph(
        MIXTURE_NAME if EXPERTS in d.kinds else DENSE_NAME,
        tuple(builder.layer(index, kind) for index, kind in enumerate(d.kinds)),
    )
    predictions = (builder.prediction(len(d.kinds)),) if d.drafts else ()
    return replace(graph, predictions=predictions, scaled_roles=_SCALED_ROLES)


class _Builder(Builder):
    def __init__(self, d: Family, source: Source) -> None:
        super().__init__(d, d.epsilon, source)
        self.d = d

    def layer(self, index: int, kind: str) -> Layer:
        blk = f"blk.{index}"
        operations: dict[str, Callable[[str], Operation]] = {
            MAMBA: self.mamba,
            ATTENTION: self.plain_attention,
            DENSE_LAYER: self.dense,
            EXPERTS: self.latent_experts,
        }
        return Layer(index, (sequential(self.norm(f"{blk}.attn_norm.weight", self.hidden), operations[kind](blk)),))

    def plain_attention(self, blk: str) -> Attention:
        return self.attention(blk, self.d.heads, self.d.key_value_heads, self.d.head_size)

    def mamba(self, blk: str) -> Mamba2:
        d = self.d
        inner = d.mamba_heads * d.mamba_head_size
        convolved = inner + 2 * d.mamba_groups * d.mamba_state
        return Mamba2(
            heads=d.mamba_heads,
            head_size=d.mamba_head_size,
            groups=d.mamba_groups,
            state_size=d.mamba_state,
            input=self.weight(f"{blk}.ssm_in.weight", Role.MAMBA_INPUT, inner + convolved + d.mamba_heads, d.hidden),
            convolution=self.weight(f"{blk}.ssm_conv1d.weight", Role.MAMBA_CONVOLUTION, convolved, d.kernel),
            convolution_bias=self.weight(f"{blk}.ssm_conv1d.bias", Role.MAMBA_CONVOLUTION, convolved),
            step_bias=self.weight(f"{blk}.ssm_dt.bias", Role.MAMBA_SCALAR, d.mamba_heads),
            decay=self.weight(f"{blk}.ssm_a", Role.MAMBA_SCALAR, d.mamba_heads, 1),
            skip=self.weight(f"{blk}.ssm_d", Role.MAMBA_SCALAR, d.mamba_heads, 1),
            norm=self.norm(f"{blk}.ssm_norm.weight", d.mamba_groups, inner // d.mamba_groups),
            output=self.weight(f"{blk}.ssm_out.weight", Role.MAMBA_OUTPUT, d.hidden, inner),
        )

    def dense(self, blk: str) -> MLP:
        return MLP(
            up=self.weight(f"{blk}.ffn_up.weight", Role.DENSE_UP, self.d.dense_size, self.hidden),
            down=self.weight(f"{blk}.ffn_down.weight", Role.DENSE_DOWN, self.hidden, self.d.dense_size),
            activation=Activation.RELU_SQUARED,
        )

    def latent_experts(self, blk: str) -> MoE:
        d = self.d
        router = Router(
            weight=self.weight(f"{blk}.ffn_gate_inp.weight", Role.ROUTER, d.experts, d.hidden),
            bias=self.weight(f"{blk}.exp_probs_b.bias", Role.ROUTER_BIAS, d.experts),
            score=Score.SIGMOID,
            top_k=d.top_k,
            groups=d.router_groups,
            groups_used=d.router_groups_used,
            epsilon=ROUTER_EPSILON,
            scale=d.router_scale,
        )
        shape = (d.experts, d.expert_size, d.latent or d.hidden)
        moe = self.experts(blk, router, Activation.RELU_SQUARED, shape, d.shared_size)
        if not d.latent:
            return moe
        return replace(
            moe,
            latent_down=self.weight(f"{blk}.ffn_latent_down.weight", Role.LATENT_DOWN, d.latent, d.hidden),
            latent_up=self.weight(f"{blk}.ffn_latent_up.weight", Role.LATENT_UP, d.hidden, d.latent),
        )

    def prediction(self, index: int) -> Prediction:
        blk, hidden = f"blk.{index}", self.hidden
        after = sequential(self.norm(f"{blk}.post_attention_norm.weight", hidden), self.latent_experts(blk))
        return Prediction(
            embedding_norm=self.norm(f"{blk}.nextn.enorm.weight", hidden),
            hidden_norm=self.norm(f"{blk}.nextn.hnorm.weight", hidden),
            projection=self.weight(f"{blk}.nextn.eh_proj.weight", Role.PREDICTION_INPUT, hidden, 2 * hidden),
            layer=Layer(index, (*self.layer(index, ATTENTION).sublayers, after)),
            final_norm=replace(self.norm(f"{blk}.nextn.shared_head_norm.weight", hidden), centered=True),
        )
