"""The blocks of Nemotron 3 and Nemotron-H under their GGUF names, wherever their numbers come from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from .graph import (
    MLP,
    Activation,
    Attention,
    Graph,
    Layer,
    Mamba2,
    MoE,
    Norm,
    Operation,
    Prediction,
    Router,
    Score,
    sequential,
)
from .weights import Expression, Role, Weight

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

Source = Callable[[str, tuple[int, ...]], Expression]  # GGUF name and shape of a weight -> its numbers


@dataclass(frozen=True)
class Dimensions:
    """Sizes that belong to absent kinds of layers are 0; `drafts` tells whether the drafting block is there."""

    vocabulary: int
    hidden: int
    kinds: str
    heads: int
    key_value_heads: int
    head_size: int
    mamba_heads: int
    mamba_head_size: int
    mamba_groups: int
    mamba_state: int
    kernel: int
    dense_size: int
    experts: int
    top_k: int
    expert_size: int
    shared_size: int
    latent: int
    router_groups: int
    router_groups_used: int
    router_scale: float
    epsilon: float
    context: int
    drafts: bool


def build(d: Dimensions, source: Source) -> Graph:
    """The graph; raises BadInput where `source` gives another shape than the dimensions demand."""

    def weight(name: str, role: Role, *shape: int) -> Weight:
        return Weight(name, role, shape, source(name, shape))

    def norm(name: str, *shape: int) -> Norm:
        return Norm(weight(name, Role.NORM, *shape), d.epsilon)

    def mamba(blk: str) -> Mamba2:
        inner = d.mamba_heads * d.mamba_head_size
        convolved = inner + 2 * d.mamba_groups * d.mamba_state
        return Mamba2(
            heads=d.mamba_heads,
            head_size=d.mamba_head_size,
            groups=d.mamba_groups,
            state_size=d.mamba_state,
            input=weight(f"{blk}.ssm_in.weight", Role.MAMBA_INPUT, inner + convolved + d.mamba_heads, d.hidden),
            convolution=weight(f"{blk}.ssm_conv1d.weight", Role.MAMBA_CONVOLUTION, convolved, d.kernel),
            convolution_bias=weight(f"{blk}.ssm_conv1d.bias", Role.MAMBA_CONVOLUTION, convolved),
            step_bias=weight(f"{blk}.ssm_dt.bias", Role.MAMBA_SCALAR, d.mamba_heads),
            decay=weight(f"{blk}.ssm_a", Role.MAMBA_SCALAR, d.mamba_heads, 1),
            skip=weight(f"{blk}.ssm_d", Role.MAMBA_SCALAR, d.mamba_heads, 1),
            norm=norm(f"{blk}.ssm_norm.weight", d.mamba_groups, inner // d.mamba_groups),
            output=weight(f"{blk}.ssm_out.weight", Role.MAMBA_OUTPUT, d.hidden, inner),
        )

    def attention(blk: str) -> Attention:
        query_size, key_size = d.heads * d.head_size, d.key_value_heads * d.head_size
        return Attention(
            heads=d.heads,
            key_value_heads=d.key_value_heads,
            head_size=d.head_size,
            query=weight(f"{blk}.attn_q.weight", Role.ATTENTION_Q, query_size, d.hidden),
            key=weight(f"{blk}.attn_k.weight", Role.ATTENTION_K, key_size, d.hidden),
            value=weight(f"{blk}.attn_v.weight", Role.ATTENTION_V, key_size, d.hidden),
            output=weight(f"{blk}.attn_output.weight", Role.ATTENTION_OUTPUT, d.hidden, query_size),
        )

    def dense(blk: str) -> MLP:
        return MLP(
            up=weight(f"{blk}.ffn_up.weight", Role.DENSE_UP, d.dense_size, d.hidden),
            down=weight(f"{blk}.ffn_down.weight", Role.DENSE_DOWN, d.hidden, d.dense_size),
            activation=Activation.RELU_SQUARED,
        )

    def experts(blk: str) -> MoE:
        width = d.latent or d.hidden
        latent_down = weight(f"{blk}.ffn_latent_down.weight", Role.LATENT_DOWN, width, d.hidden) if d.latent else None
        latent_up = weight(f"{blk}.ffn_latent_up.weight", Role.LATENT_UP, d.hidden, width) if d.latent else None
        return MoE(
            router=Router(
                weight=weight(f"{blk}.ffn_gate_inp.weight", Role.ROUTER, d.experts, d.hidden),
                bias=weight(f"{blk}.exp_probs_b.bias", Role.ROUTER_BIAS, d.experts),
                score=Score.SIGMOID,
                top_k=d.top_k,
                groups=d.router_groups,
                groups_used=d.router_groups_used,
                epsilon=ROUTER_EPSILON,
                scale=d.router_scale,
            ),
            up=weight(f"{blk}.ffn_up_exps.weight", Role.EXPERT_UP, d.experts, d.expert_size, width),
            down=weight(f"{blk}.ffn_down_exps.weight", Role.EXPERT_DOWN, d.experts, width, d.expert_size),
            activation=Activation.RELU_SQUARED,
            latent_down=latent_down,
            latent_up=latent_up,
            shared=MLP(
                up=weight(f"{blk}.ffn_up_shexp.weight", Role.SHARED_UP, d.shared_size, d.hidden),
                down=weight(f"{blk}.ffn_down_shexp.weight", Role.SHARED_DOWN, d.hidden, d.shared_size),
                activation=Activation.RELU_SQUARED,
            ),
        )

    operations: dict[str, Callable[[str], Operation]] = {
        MAMBA: mamba,
        ATTENTION: attention,
        DENSE_LAYER: dense,
        EXPERTS: experts,
    }

    def layer(index: int, kind: str) -> Layer:
        blk = f"blk.{index}"
        return Layer(index, (sequential(norm(f"{blk}.attn_norm.weight", d.hidden), operations[kind](blk)),))

    def prediction(index: int) -> Prediction:
        blk = f"blk.{index}"
        after = sequential(norm(f"{blk}.post_attention_norm.weight", d.hidden), experts(blk))
        return Prediction(
            embedding_norm=norm(f"{blk}.nextn.enorm.weight", d.hidden),
            hidden_norm=norm(f"{blk}.nextn.hnorm.weight", d.hidden),
            projection=weight(f"{blk}.nextn.eh_proj.weight", Role.PREDICTION_INPUT, d.hidden, 2 * d.hidden),
            layer=Layer(index, (*layer(index, ATTENTION).sublayers, after)),
            final_layer_norm=weight(f"{blk}.nextn.shared_head_norm.weight", Role.NORM, d.hidden),
        )

    return Graph(
        architecture=MIXTURE_NAME if EXPERTS in d.kinds else DENSE_NAME,
        vocabulary_size=d.vocabulary,
        hidden_size=d.hidden,
        context_length=d.context,
        embedding=weight("token_embd.weight", Role.EMBEDDING, d.vocabulary, d.hidden),
        layers=tuple(layer(index, kind) for index, kind in enumerate(d.kinds)),
        final_norm=norm("output_norm.weight", d.hidden),
        head=weight("output.weight", Role.HEAD, d.vocabulary, d.hidden),
        predictions=(prediction(len(d.kinds)),) if d.drafts else (),
        scaled_roles=_SCALED_ROLES,
    )
