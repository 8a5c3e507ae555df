"""The quantities of MiniMax M3, and its blocks under their GGUF names."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..errors import BadInput
from .architecture import refuse_unlike
from .dimensions import Dimensions, FromGraph, constant, of, of_rope, quantity, written
from .graph import MLP, Activation, Attention, BlockSelection, Graph, Layer, MoE, Rope, Router, Score, sequential
from .minimax_m2 import GGUF_SIGMOID
from .shared import Builder, Source, check_heads, check_rotary, check_top_k
from .weights import Role, Weight

NAME = "minimax-m3"
CLAMP = 7.0  # the only one that llama.cpp has
SPARSE = "sparse_attention_config"
_SCALED_ROLES = (Role.ATTENTION_Q, Role.ATTENTION_K, Role.ATTENTION_V, Role.ATTENTION_OUTPUT)
_NEEDS_FLASH_ATTENTION = (
    "llama.cpp selects blocks of tokens with -fa on and one text at a time (llama-server: -np 1) alone; otherwise all "
    "tokens are attended to, which is another model"
)


def _selecting(graph: Graph) -> list[bool]:
    """Of each layer whether its attention selects blocks."""
    return [op.selection is not None for op in graph.operations() if isinstance(op, Attention)]


def _routed(graph: Graph) -> list[bool]:
    """Of each layer whether it has experts."""
    return [any(isinstance(op, MoE) for op in layer.operations) for layer in graph.layers]


def leading_layers(routed: Sequence[bool]) -> int:
    """How many layers come before the first with experts."""
    return [*routed, True].index(True)


def _of_selection(get: Callable[[BlockSelection], int]) -> FromGraph:
    def find(graph: Graph) -> int | None:
        found = (op.selection for op in graph.operations() if isinstance(op, Attention) and op.selection)
        return next(map(get, found), None)

    return find


def _shared_count(moe: MoE) -> int:
    assert moe.shared
    return moe.shared.up.shape[0] // moe.expert_size


def _routed_scale(moe: MoE) -> float:
    assert isinstance(moe.router, Router)
    return moe.router.scale


@dataclass(frozen=True)
class Family(Dimensions):
    """`routed` layers have experts, `selecting` ones look at blocks of tokens; what no layer has is of size 0."""

    layers: int = quantity("num_hidden_layers", "block_count", lambda graph: len(graph.layers))
    dense_size: int = quantity(gguf="feed_forward_length", from_graph=of(MLP, lambda mlp: mlp.up.shape[0]), default=0)
    heads: int = quantity("num_attention_heads", "attention.head_count", of(Attention, lambda op: op.heads))
    key_value_heads: int = quantity(
        "num_key_value_heads", "attention.head_count_kv", of(Attention, lambda op: op.key_value_heads)
    )
    head_size: int = quantity(
        "head_dim", ("attention.key_length", "attention.value_length"), of(Attention, lambda op: op.head_size)
    )
    epsilon: float = quantity(
        "rms_norm_eps", "attention.layer_norm_rms_epsilon", lambda graph: graph.final_norm.epsilon
    )
    rotary_size: int = quantity(gguf="rope.dimension_count", from_graph=of_rope(lambda rope: rope.size))
    rope_base: float = quantity(gguf="rope.freq_base", from_graph=of_rope(lambda rope: rope.base))
    experts: int = quantity(("num_local_experts", "num_experts"), "expert_count", of(MoE, lambda moe: moe.experts))
    top_k: int = quantity("num_experts_per_tok", "expert_used_count", of(MoE, lambda moe: moe.router.top_k))
    expert_size: int = quantity(
        ("intermediate_size", "moe_intermediate_size"),
        "expert_feed_forward_length",
        of(MoE, lambda moe: moe.expert_size),
    )
    shared_count: int = written("expert_shared_count", of(MoE, _shared_count))
    routed_scale: float = quantity("routed_scaling_factor", "expert_weights_scale", of(MoE, _routed_scale), default=2.0)
    normalized: bool = constant("expert_weights_norm", True)
    gating: int = constant("expert_gating_func", GGUF_SIGMOID)
    leading: int = written("leading_dense_block_count", lambda graph: leading_layers(_routed(graph)))
    index_heads: int = quantity(
        (f"{SPARSE}.sparse_num_index_heads", "index_n_heads"),
        "attention.indexer.head_count",
        _of_selection(lambda selection: selection.heads),
        default=4,
    )
    index_size: int = quantity(
        (f"{SPARSE}.sparse_index_dim", "index_head_dim"),
        "attention.indexer.key_length",
        _of_selection(lambda selection: selection.head_size),
        default=128,
    )
    blocks: int = quantity(
        (f"{SPARSE}.sparse_topk_blocks", "index_topk_blocks"),
        "attention.indexer.top_k",
        _of_selection(lambda selection: selection.top_k),
        default=16,
    )
    block_size: int = quantity(
        (f"{SPARSE}.sparse_block_size", "index_block_size"),
        "attention.indexer.block_size",
        _of_selection(lambda selection: selection.block_size),
        default=128,
    )
    local: int = quantity(
        (f"{SPARSE}.sparse_local_block", "index_local_blocks"),
        "attention.indexer.local_blocks",
        _of_selection(lambda selection: selection.local),
        default=1,
    )
    clamp: float = quantity("swiglu_limit", default=CLAMP)
    shared_size: int = quantity()
    routed: Sequence[bool] = quantity()
    selecting: Sequence[bool] = quantity()


def check(d: Family, origin: str) -> None:
    check_heads(origin, d.heads, d.key_value_heads)
    check_top_k(origin, d.top_k, d.experts)
    check_rotary(origin, "rotary_dim", d.rotary_size, d.head_size)
    if not any(d.selecting):
        return
    check_rotary(origin, "rotary_dim of index heads", d.rotary_size, d.index_size)
    if d.index_heads != d.key_value_heads:
        raise BadInput(
            f"{origin}: {d.index_heads} index heads, expected one for each of the {d.key_value_heads} key-value heads"
        )
    if d.local > d.blocks:
        raise BadInput(f"{origin}: {d.local} local blocks, expected at most the {d.blocks} that a token sees")


def build(d: Family, source: Source) -> Graph:
    builder = Builder(d, d.epsilon, source)
    rope, norms = Rope(d.rotary_size, d.rope_base), (d.head_size, d.head_size)

    def selection(blk: str) -> BlockSelection:
        def matrix(kind: str, heads: int) -> Weight:
            return builder.weight(f"{blk}.indexer.{kind}.weight", Role.BLOCK_INDEX, heads * d.index_size, d.hidden)

        return BlockSelection(
            head_size=d.index_size,
            block_size=d.block_size,
            top_k=d.blocks,
            local=d.local,
            query=matrix("q_proj", d.index_heads),
            key=matrix("k_proj", 1),
            query_norm=builder.norm(f"{blk}.indexer.q_norm.weight", d.index_size),
            key_norm=builder.norm(f"{blk}.indexer.k_norm.weight", d.index_size),
            rope=rope,
        )

    def attention(blk: str, selecting: bool) -> Attention:
        whole = builder.attention(blk, d.heads, d.key_value_heads, d.head_size, rope, norms)
        return replace(whole, selection=selection(blk)) if selecting else whole

    def dense(blk: str) -> MLP:
        return replace(builder.gated_mlp(blk, d.dense_size), activation=Activation.SWIGLU_OAI, clamp=d.clamp)

    def experts(blk: str) -> MoE:
        router = Router(
            weight=builder.weight(f"{blk}.ffn_gate_inp.weight", Role.ROUTER, d.experts, d.hidden),
            bias=builder.weight(f"{blk}.exp_probs_b.bias", Role.ROUTER_BIAS, d.experts),
            score=Score.SIGMOID,
            top_k=d.top_k,
            scale=d.routed_scale,
        )
        shape = (d.experts, d.expert_size, d.hidden)
        return builder.experts(blk, router, Activation.SWIGLU_OAI, shape, d.shared_size, d.clamp)

    def layer(index: int) -> Layer:
        blk = f"blk.{index}"
        mixed = sequential(builder.norm(f"{blk}.attn_norm.weight", d.hidden), attention(blk, d.selecting[index]))
        norm = builder.norm(f"{blk}.ffn_norm.weight", d.hidden)
        return Layer(index, (mixed, sequential(norm, experts(blk) if d.routed[index] else dense(blk))))

    graph = builder.graph(NAME, tuple(layer(index) for index in range(d.layers)))
    notes = (_NEEDS_FLASH_ATTENTION,) if graph.needs_flash_attention else ()
    return replace(graph, scaled_roles=_SCALED_ROLES, notes=notes)


def gguf_metadata(graph: Graph) -> dict[str, Any]:
    """Raises BadInput for what llama.cpp would compute otherwise, or not load."""
    routed, operations = _routed(graph), [*graph.operations()]
    later = [layer >= leading_layers(routed) for layer in range(len(routed))]
    mixtures = [op for op in operations if isinstance(op, MoE)]
    uneven = any(moe.shared and moe.shared.up.shape[0] % moe.expert_size for moe in mixtures)
    unlike = {
        "no experts (moe_layer_freq)": not mixtures,
        "layers with experts before dense ones (moe_layer_freq)": routed != later,
        "selected blocks in other layers than those with experts (sparse_attention_freq)": _selecting(graph) != routed,
        f"a swiglu_limit other than {CLAMP:g}": any(
            op.clamp != CLAMP for op in operations if isinstance(op, MLP | MoE)
        ),
        "a shared expert that is no multiple of the others (shared_intermediate_size)": uneven,
    }
    refuse_unlike(graph, unlike)
    return Family.metadata(graph)
