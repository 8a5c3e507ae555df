"""The quantities of DeepSeek V4, and its blocks under their GGUF names."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from ..errors import BadInput
from .config import Config
from .dimensions import Dimensions, FromGraph, constant, of, quantity, written
from .expressions import Below, Read, first_tensor
from .graph import (
    Activation,
    CompressedAttention,
    Compressor,
    EntryIndexer,
    Graph,
    HashRouter,
    HyperConnections,
    Layer,
    MoE,
    ResidualMix,
    Rope,
    Router,
    Score,
    Yarn,
    sequential,
)
from .shared import Builder, Source, check_rotary, check_top_k
from .weights import Role, Weight

NAME = "deepseek4"
GGUF_SQRT_SOFTPLUS = 4  # llama.cpp's expert_gating_func
STREAMS = 4  # what llama.cpp's kernels are written for
OVERLAPPING = 4  # entries of this ratio overlap and are picked by an indexer, those of 128 are not
RATIOS = {"sliding_attention": 0, "compressed_sparse_attention": OVERLAPPING, "heavily_compressed_attention": 128}
ROUTER_EPSILON = 1e-20
YARN_FAST, YARN_SLOW = 32.0, 1.0  # llama.cpp knows no other


def _residual(get: Callable[[HyperConnections], Any]) -> FromGraph:
    return lambda graph: get(graph.residual) if graph.residual else None


def _attentions(graph: Graph) -> list[CompressedAttention]:
    return [operation for operation in graph.operations() if isinstance(operation, CompressedAttention)]


def _indexer(graph: Graph) -> EntryIndexer:
    """The first one. Raises BadInput where llama.cpp finds none."""
    indexers = (attention.indexer for attention in _attentions(graph) if attention.indexer)
    indexer = next(indexers, None)
    if indexer is None:
        raise BadInput(f"no layer has compress ratio {OVERLAPPING}: llama.cpp cannot run such a model")
    return indexer


def _compressed_rope(graph: Graph) -> Rope:
    return _indexer(graph).rope


def _yarn(get: Callable[[Yarn], Any]) -> FromGraph:
    def find(graph: Graph) -> Any:
        yarn = _compressed_rope(graph).yarn
        return get(yarn) if yarn else None

    return find


def _attention(get: Callable[[CompressedAttention], Any]) -> FromGraph:
    return of(CompressedAttention, get)


def _moe(get: Callable[[MoE], Any]) -> FromGraph:
    return of(MoE, get)


@dataclass(frozen=True)
class Family(Dimensions):
    """`ratios` are those of each layer's compressed entries, 0 where there are none."""

    stream_width: int = written("embedding_length_out", lambda graph: graph.residual_size)
    layers: int = quantity("num_hidden_layers", "block_count", lambda graph: len(graph.layers))
    heads: int = quantity("num_attention_heads", "attention.head_count", _attention(lambda op: op.heads))
    key_value_heads: int = constant("attention.head_count_kv", 1)
    head_size: int = quantity(
        "head_dim", ("attention.key_length", "attention.value_length"), _attention(lambda op: op.head_size)
    )
    epsilon: float = quantity(
        "rms_norm_eps", "attention.layer_norm_rms_epsilon", lambda graph: graph.final_norm.epsilon
    )
    query_rank: int = quantity("q_lora_rank", "attention.q_lora_rank", _attention(lambda op: op.query_down.shape[0]))
    output_groups: int = quantity("o_groups", "attention.output_group_count", _attention(lambda op: op.groups))
    output_rank: int = quantity(
        "o_lora_rank", "attention.output_lora_rank", _attention(lambda op: op.output_down.shape[0] // op.groups)
    )
    window: int = quantity("sliding_window", "attention.sliding_window", _attention(lambda op: op.window))
    ratios: tuple[int, ...] = quantity(
        gguf="attention.compress_ratios",
        from_graph=lambda graph: [op.compressor.ratio if op.compressor else 0 for op in _attentions(graph)],
    )
    compressed_rope_base: float = quantity(
        gguf="attention.compress_rope_freq_base",
        from_graph=lambda graph: _compressed_rope(graph).base,
        default=160000.0,
    )
    index_heads: int = quantity("index_n_heads", "attention.indexer.head_count", lambda graph: _indexer(graph).heads)
    index_head_size: int = quantity(
        "index_head_dim", "attention.indexer.key_length", lambda graph: _indexer(graph).head_size
    )
    index_top_k: int = quantity("index_topk", "attention.indexer.top_k", lambda graph: _indexer(graph).top_k)
    rotary_size: int = quantity(gguf="rope.dimension_count", from_graph=lambda graph: _compressed_rope(graph).size)
    rope_base: float = quantity(
        gguf="rope.freq_base",
        from_graph=lambda graph: next((op.rope.base for op in _attentions(graph) if not op.compressor), 10000.0),
        default=10000.0,
    )
    experts: int = quantity(("n_routed_experts", "num_local_experts"), "expert_count", _moe(lambda moe: moe.experts))
    top_k: int = quantity("num_experts_per_tok", "expert_used_count", _moe(lambda moe: moe.router.top_k))
    expert_size: int = quantity(
        "moe_intermediate_size", "expert_feed_forward_length", _moe(lambda moe: moe.expert_size)
    )
    shared_count: int = quantity(
        "n_shared_experts",
        "expert_shared_count",
        _moe(lambda moe: moe.shared and moe.shared.up.shape[0] // moe.expert_size),
        default=1,
    )
    router_scale: float = quantity("routed_scaling_factor", "expert_weights_scale", _moe(lambda moe: moe.router.scale))
    normalized: bool = constant("expert_weights_norm", True)
    gating: int = constant("expert_gating_func", GGUF_SQRT_SOFTPLUS)
    clamp: float = quantity("swiglu_limit", "swiglu_clamp_exp", _moe(lambda moe: moe.clamp))
    hash_layers: int = quantity(
        gguf="hash_layer_count",
        from_graph=lambda graph: sum(
            isinstance(op, MoE) and isinstance(op.router, HashRouter) for op in graph.operations()
        ),
        default=0,
    )
    streams: int = constant("hyper_connection.count", STREAMS)
    sinkhorn_iterations: int = quantity(
        "hc_sinkhorn_iters", "hyper_connection.sinkhorn_iterations", _residual(lambda streams: streams.iterations)
    )
    stream_epsilon: float = quantity("hc_eps", "hyper_connection.epsilon", _residual(lambda streams: streams.epsilon))
    scaling: str = quantity(gguf="rope.scaling.type", from_graph=_yarn(lambda yarn: "yarn"), default="none")
    yarn_factor: float = quantity(gguf="rope.scaling.factor", from_graph=_yarn(lambda yarn: yarn.factor), default=1.0)
    yarn_context: int = quantity(
        gguf="rope.scaling.original_context_length", from_graph=_yarn(lambda yarn: yarn.original_context), default=0
    )

    @property
    def yarn(self) -> Yarn | None:
        if self.scaling != "yarn":
            return None
        return Yarn(self.yarn_factor, self.yarn_context, YARN_FAST, YARN_SLOW)


def check(d: Family, origin: str) -> None:
    if d.heads * d.head_size % d.output_groups:
        raise BadInput(f"{origin}: {d.heads} attention heads do not divide into {d.output_groups} output groups")
    check_top_k(origin, d.top_k, d.experts)
    check_rotary(origin, "qk_rope_head_dim", d.rotary_size, min(d.head_size, d.index_head_size))


def read_metadata(metadata: Config, name: str, vocabulary: int, drafts: int = 0) -> Family:
    """The quantities of a GGUF file's architecture, of whose blocks so many are no layers but drafts."""
    ratios, blocks = metadata.get(f"{name}.attention.compress_ratios"), metadata.integer(f"{name}.block_count")
    if not isinstance(ratios, list) or len(ratios) < blocks or set(ratios) - set(RATIOS.values()):
        raise BadInput(
            f"{metadata.origin}: {name}.attention.compress_ratios is {ratios!r}, expected 0, 4 or 128 for each of "
            f"{blocks} layers"
        )
    clamp, layers = _one_number(metadata, f"{name}.swiglu_clamp_exp"), blocks - drafts
    shared = f"{name}.swiglu_clamp_shexp"
    if metadata.get(shared) is not None and _one_number(metadata, shared) != clamp:
        raise BadInput(f"{metadata.origin}: {shared} is {metadata.get(shared)}, expected {clamp}, as all experts have")
    metadata.expect(f"{name}.rope.scaling.yarn_beta_fast", YARN_FAST)
    metadata.expect(f"{name}.rope.scaling.yarn_beta_slow", YARN_SLOW)
    given = {"vocabulary": vocabulary, "layers": layers, "ratios": tuple(ratios[:layers]), "clamp": clamp}
    dimensions = Family.from_gguf(metadata, name, **given)
    check(dimensions, metadata.origin)
    return dimensions


def _one_number(metadata: Config, key: str) -> float:
    """A number that may be stored once or once for each layer."""
    values = metadata.get(key)
    if not isinstance(values, list):
        return metadata.number(key)
    if len(set(values)) != 1 or isinstance(values[0], str):
        raise BadInput(f"{metadata.origin}: {key} is {values!r}, expected the same number for all layers")
    return float(values[0])


def build(d: Family, source: Source) -> Graph:
    """The model without its draft."""
    builder = BlockBuilder(d, source)
    layers = tuple(builder.layer(index, ratio) for index, ratio in enumerate(d.ratios))
    return replace(builder.graph(NAME, layers), residual=builder.residual())


class BlockBuilder(Builder):
    """Makes layers of DeepSeek V4, also those of its drafts."""

    def __init__(self, d: Family, source: Source) -> None:
        super().__init__(d, d.epsilon, source)
        self.d = d

    def mix(self, stem: str, coefficients: int, kinds: int) -> ResidualMix:
        return ResidualMix(
            function=self.weight(f"{stem}_fn.weight", Role.HYPER_CONNECTION, coefficients, STREAMS * self.hidden),
            base=self.weight(f"{stem}_base.weight", Role.HYPER_CONNECTION, coefficients),
            scale=self.weight(f"{stem}_scale.weight", Role.HYPER_CONNECTION, kinds),
        )

    def residual(self) -> HyperConnections:
        d = self.d
        return HyperConnections(
            multiplicity=STREAMS,
            iterations=d.sinkhorn_iterations,
            epsilon=d.stream_epsilon,
            norm_epsilon=d.epsilon,
            head=self.mix("output_hc", STREAMS, 1),
        )

    def layer(self, index: int, ratio: int) -> Layer:
        blk, hidden = f"blk.{index}", self.hidden
        coefficients = STREAMS * (2 + STREAMS)
        return Layer(
            index,
            (
                sequential(
                    self.norm(f"{blk}.attn_norm.weight", hidden),
                    self.compressed_attention(blk, ratio),
                    self.mix(f"{blk}.hc_attn", coefficients, 3),
                ),
                sequential(
                    self.norm(f"{blk}.ffn_norm.weight", hidden),
                    self.routed(blk, hashed=index < self.d.hash_layers),
                    self.mix(f"{blk}.hc_ffn", coefficients, 3),
                ),
            ),
        )

    def compressed_attention(self, blk: str, ratio: int) -> CompressedAttention:
        d = self.d
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
        d = self.d
        base, yarn = (d.compressed_rope_base, d.yarn) if compressed else (d.rope_base, None)
        return Rope(d.rotary_size, base, interleaved=True, last=True, yarn=yarn)

    def compressor(self, stem: str, role: Role, ratio: int, size: int) -> Compressor:
        overlaps = ratio == OVERLAPPING
        width, hidden = size * (2 if overlaps else 1), self.hidden
        return Compressor(
            ratio=ratio,
            overlaps=overlaps,
            value=self.weight(f"{stem}_kv.weight", role, width, hidden),
            gate=self.weight(f"{stem}_gate.weight", role, width, hidden),
            position=self.weight(f"{stem}_ape.weight", Role.COMPRESSOR_POSITION, ratio, width),
            norm=self.norm(f"{stem}_norm.weight", size),
            rope=self.rope(compressed=True),
        )

    def indexer(self, blk: str) -> EntryIndexer:
        d = self.d
        width = d.index_heads * d.index_head_size
        return EntryIndexer(
            heads=d.index_heads,
            head_size=d.index_head_size,
            top_k=d.index_top_k,
            query=self.weight(f"{blk}.indexer.attn_q_b.weight", Role.INDEXER, width, d.query_rank),
            head_weight=self.weight(f"{blk}.indexer.proj.weight", Role.INDEXER_HEADS, d.index_heads, d.hidden),
            rope=self.rope(compressed=True),
            compressor=self.compressor(f"{blk}.indexer_compressor", Role.INDEXER, OVERLAPPING, d.index_head_size),
        )

    def routed(self, blk: str, hashed: bool) -> MoE:
        d = self.d
        shape = (d.experts, d.expert_size, d.hidden)
        router = self.router(blk, hashed)
        return self.experts(blk, router, Activation.SWIGLU, shape, d.expert_size * d.shared_count, d.clamp)

    def router(self, blk: str, hashed: bool) -> Router | HashRouter:
        d = self.d
        weight = self.weight(f"{blk}.ffn_gate_inp.weight", Role.ROUTER, d.experts, d.hidden)
        if hashed:
            return HashRouter(
                weight,
                self.hash_table(f"{blk}.ffn_gate_tid2eid.weight"),
                Score.SQRT_SOFTPLUS,
                ROUTER_EPSILON,
                d.router_scale,
            )
        bias = self.weight(f"{blk}.exp_probs_b.bias", Role.ROUTER_BIAS, d.experts)
        return Router(weight, bias, Score.SQRT_SOFTPLUS, d.top_k, epsilon=ROUTER_EPSILON, scale=d.router_scale)

    def hash_table(self, name: str) -> Weight:
        """The experts of each token of the vocabulary."""
        shape = (self.d.vocabulary, self.d.top_k)
        stored = self._source(name, shape)
        if not isinstance(stored, Read) or stored.tensor.dtype not in ("I64", "I32"):
            tensor = first_tensor(stored)
            raise BadInput(f"{tensor.name} in {tensor.file} has dtype {tensor.dtype}, expected I64 or I32")
        return Weight(name, Role.HASH_TABLE, shape, Below(stored, self.d.experts))
