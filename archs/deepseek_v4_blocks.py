"""The blocks of DeepSeek V4, from its dimensions and a source of weights by their GGUF names."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from ..errors import BadInput
from .graph import (
    MLP,
    Activation,
    CompressedAttention,
    Compressor,
    Graph,
    HashRouter,
    HyperConnections,
    Indexer,
    Layer,
    MoE,
    Norm,
    Prediction,
    ResidualMix,
    Rope,
    Router,
    Score,
    Yarn,
    sequential,
)
from .weights import Expression, Role, Weight

NAME = "deepseek4"
STREAMS = 4  # what llama.cpp's kernels are written for
OVERLAPPING = 4  # entries of this ratio overlap and are picked by an indexer, those of 128 are not
ROUTER_EPSILON = 1e-20


@dataclass(frozen=True)
class Dimensions:
    vocabulary: int
    hidden: int
    context: int
    epsilon: float
    ratios: tuple[int, ...]  # of the compressed entries of each layer, 0 where there are none
    hash_layers: int
    heads: int
    head_size: int
    query_rank: int
    output_groups: int
    output_rank: int
    window: int
    rotary_size: int
    rope_base: float
    compressed_rope_base: float
    yarn: Yarn | None
    index_heads: int
    index_head_size: int
    index_top_k: int
    experts: int
    top_k: int
    expert_size: int
    shared_size: int
    router_scale: float
    clamp: float
    sinkhorn_iterations: int
    stream_epsilon: float


def check(dimensions: Dimensions, origin: str) -> None:
    d = dimensions
    if d.heads * d.head_size % d.output_groups:
        raise BadInput(f"{origin}: {d.heads} attention heads do not divide into {d.output_groups} output groups")
    if d.top_k > d.experts:
        raise BadInput(f"{origin}: num_experts_per_tok is {d.top_k}, expected at most the {d.experts} experts")
    if d.rotary_size > min(d.head_size, d.index_head_size) or d.rotary_size % 2:
        raise BadInput(
            f"{origin}: {d.rotary_size} rotary dimensions, expected an even number up to head_dim {d.head_size} and "
            f"index_head_dim {d.index_head_size}"
        )


def build(d: Dimensions, source: Callable[[str], Expression]) -> Graph:
    """The model without its draft."""
    builder = _Builder(d, source)
    return Graph(
        architecture=NAME,
        vocabulary_size=d.vocabulary,
        hidden_size=d.hidden,
        context_length=d.context,
        embedding=builder.weight("token_embd.weight", Role.EMBEDDING, d.vocabulary, d.hidden),
        layers=tuple(builder.layer(index, ratio) for index, ratio in enumerate(d.ratios)),
        final_norm=builder.norm("output_norm.weight", d.hidden),
        head=builder.weight("output.weight", Role.HEAD, d.vocabulary, d.hidden),
        residual=builder.residual(),
    )


def build_draft(model: Graph, d: Dimensions, source: Callable[[str], Expression]) -> Graph:
    """The block for multi-token prediction, which shares embedding and head with the model."""
    builder = _Builder(d, source)
    index = len(model.layers)
    nextn = f"blk.{index}.nextn"
    prediction = Prediction(
        embedding_norm=builder.norm(f"{nextn}.enorm.weight", d.hidden),
        hidden_norm=builder.norm(f"{nextn}.hnorm.weight", d.hidden),
        projection=builder.weight(f"{nextn}.eh_proj.weight", Role.PREDICTION_INPUT, d.hidden, 2 * d.hidden),
        layer=builder.layer(index, ratio=0),
    )
    final_norm = builder.norm("output_norm.weight", d.hidden)
    return replace(
        model, layers=(), predictions=(prediction,), final_norm=final_norm, residual=builder.residual(), draft=None
    )


class _Builder:
    """Makes the blocks of a graph whose weights come from `source`, by their GGUF names."""

    def __init__(self, dimensions: Dimensions, source: Callable[[str], Expression]) -> None:
        self.dimensions = dimensions
        self.source = source

    def weight(self, name: str, role: Role, *shape: int) -> Weight:
        return Weight(name, role, shape, self.source(name))

    def norm(self, name: str, size: int) -> Norm:
        return Norm(self.weight(name, Role.NORM, size), self.dimensions.epsilon)

    def mix(self, stem: str, coefficients: int, kinds: int) -> ResidualMix:
        return ResidualMix(
            function=self.weight(
                f"{stem}_fn.weight", Role.HYPER_CONNECTION, coefficients, STREAMS * self.dimensions.hidden
            ),
            base=self.weight(f"{stem}_base.weight", Role.HYPER_CONNECTION, coefficients),
            scale=self.weight(f"{stem}_scale.weight", Role.HYPER_CONNECTION, kinds),
        )

    def residual(self) -> HyperConnections:
        d = self.dimensions
        return HyperConnections(
            multiplicity=STREAMS,
            iterations=d.sinkhorn_iterations,
            epsilon=d.stream_epsilon,
            norm_epsilon=d.epsilon,
            head=self.mix("output_hc", STREAMS, 1),
        )

    def layer(self, index: int, ratio: int) -> Layer:
        blk, hidden = f"blk.{index}", self.dimensions.hidden
        coefficients = STREAMS * (2 + STREAMS)
        return Layer(
            index,
            (
                sequential(
                    self.norm(f"{blk}.attn_norm.weight", hidden),
                    self.attention(blk, ratio),
                    self.mix(f"{blk}.hc_attn", coefficients, 3),
                ),
                sequential(
                    self.norm(f"{blk}.ffn_norm.weight", hidden),
                    self.experts(blk, hashed=index < self.dimensions.hash_layers),
                    self.mix(f"{blk}.hc_ffn", coefficients, 3),
                ),
            ),
        )

    def attention(self, blk: str, ratio: int) -> CompressedAttention:
        d = self.dimensions
        width, ranks = d.heads * d.head_size, d.output_groups * d.output_rank
        rope = self.rope(compressed=ratio > 0)
        compressor = self.compressor(f"{blk}.attn_compressor", Role.COMPRESSOR, ratio, d.head_size) if ratio else None
        return CompressedAttention(
            heads=d.heads,
            head_size=d.head_size,
            window=d.window,
            groups=d.output_groups,
            query_down=self.weight(f"{blk}.attn_q_a.weight", Role.ATTENTION_Q_DOWN, d.query_rank, d.hidden),
            query_norm=self.norm(f"{blk}.attn_q_a_norm.weight", d.query_rank),
            query_up=self.weight(f"{blk}.attn_q_b.weight", Role.ATTENTION_Q_UP, width, d.query_rank),
            key_value=self.weight(f"{blk}.attn_kv.weight", Role.ATTENTION_KV, d.head_size, d.hidden),
            key_value_norm=self.norm(f"{blk}.attn_kv_a_norm.weight", d.head_size),
            sink=self.weight(f"{blk}.attn_sinks.weight", Role.ATTENTION_SINK, d.heads),
            output_down=self.weight(
                f"{blk}.attn_output_a.weight", Role.ATTENTION_OUTPUT_DOWN, ranks, width // d.output_groups
            ),
            output_up=self.weight(f"{blk}.attn_output_b.weight", Role.ATTENTION_OUTPUT_UP, d.hidden, ranks),
            rope=rope,
            compressor=compressor,
            indexer=self.indexer(blk) if ratio == OVERLAPPING else None,
        )

    def rope(self, compressed: bool) -> Rope:
        d = self.dimensions
        base, yarn = (d.compressed_rope_base, d.yarn) if compressed else (d.rope_base, None)
        return Rope(d.rotary_size, base, interleaved=True, last=True, yarn=yarn)

    def compressor(self, stem: str, role: Role, ratio: int, size: int) -> Compressor:
        overlaps = ratio == OVERLAPPING
        width, hidden = size * (2 if overlaps else 1), self.dimensions.hidden
        return Compressor(
            ratio=ratio,
            overlaps=overlaps,
            value=self.weight(f"{stem}_kv.weight", role, width, hidden),
            gate=self.weight(f"{stem}_gate.weight", role, width, hidden),
            position=self.weight(f"{stem}_ape.weight", Role.COMPRESSOR_POSITION, ratio, width),
            norm=self.norm(f"{stem}_norm.weight", size),
            rope=self.rope(compressed=True),
        )

    def indexer(self, blk: str) -> Indexer:
        d = self.dimensions
        width = d.index_heads * d.index_head_size
        return Indexer(
            heads=d.index_heads,
            head_size=d.index_head_size,
            top_k=d.index_top_k,
            query=self.weight(f"{blk}.indexer.attn_q_b.weight", Role.INDEXER, width, d.query_rank),
            head_weight=self.weight(f"{blk}.indexer.proj.weight", Role.INDEXER_HEADS, d.index_heads, d.hidden),
            compressor=self.compressor(f"{blk}.indexer_compressor", Role.INDEXER, OVERLAPPING, d.index_head_size),
        )

    def experts(self, blk: str, hashed: bool) -> MoE:
        d = self.dimensions
        return MoE(
            router=self.router(blk, hashed),
            gate=self.weight(f"{blk}.ffn_gate_exps.weight", Role.EXPERT_GATE, d.experts, d.expert_size, d.hidden),
            up=self.weight(f"{blk}.ffn_up_exps.weight", Role.EXPERT_UP, d.experts, d.expert_size, d.hidden),
            down=self.weight(f"{blk}.ffn_down_exps.weight", Role.EXPERT_DOWN, d.experts, d.hidden, d.expert_size),
            activation=Activation.SWIGLU,
            clamp=d.clamp,
            shared=MLP(
                gate=self.weight(f"{blk}.ffn_gate_shexp.weight", Role.SHARED_GATE, d.shared_size, d.hidden),
                up=self.weight(f"{blk}.ffn_up_shexp.weight", Role.SHARED_UP, d.shared_size, d.hidden),
                down=self.weight(f"{blk}.ffn_down_shexp.weight", Role.SHARED_DOWN, d.hidden, d.shared_size),
                activation=Activation.SWIGLU,
                clamp=d.clamp,
            ),
        )

    def router(self, blk: str, hashed: bool) -> Router | HashRouter:
        d = self.dimensions
        weight = self.weight(f"{blk}.ffn_gate_inp.weight", Role.ROUTER, d.experts, d.hidden)
        if hashed:
            table = self.weight(f"{blk}.ffn_gate_tid2eid.weight", Role.HASH_TABLE, d.vocabulary, d.top_k)
            return HashRouter(weight, table, Score.SQRT_SOFTPLUS, ROUTER_EPSILON, d.router_scale)
        bias = self.weight(f"{blk}.exp_probs_b.bias", Role.ROUTER_BIAS, d.experts)
        return Router(weight, bias, Score.SQRT_SOFTPLUS, d.top_k, epsilon=ROUTER_EPSILON, scale=d.router_scale)
