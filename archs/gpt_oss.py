"""gpt-oss (20b, 120b): attention with sinks, every other layer in a window, then experts with biases of their own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from ..errors import BadInput
from .architecture import Architecture, refuse_unlike
from .catalogue import Catalogue
from .config import Config
from .dimensions import Dimensions, first, of, of_rope, of_yarn, quantity, written
from .encodings import Mxfp4
from .expressions import Columns, Expression, Rows, TensorInfo, Transposed
from .graph import Activation, Attention, Graph, Layer, MoE, Rope, Router, Score, Yarn, sequential
from .shared import (
    ATTENTION_BIAS_NAMES,
    ATTENTION_NAMES,
    WHOLE_NAMES,
    Builder,
    Names,
    Source,
    check_heads,
    check_rotary,
    check_top_k,
    expect_all,
    gguf_source,
    open_gguf,
    read_checkpoint,
    read_yarn,
    rope_section,
    yarn_of,
)
from .weights import Role

NAME = "gpt-oss"
_ROPE_BASE = 150_000.0
_CLAMP = 7.0  # the only one that llama.cpp has
_PATTERN = "attention.sliding_window_pattern"
_UNROUNDED = (
    "llama.cpp rounds the limits of YaRN, which this model does not, and no GGUF key can say so: a KL divergence of "
    "about 0.001 there, none in ONNX"
)
# What transformers takes where a configuration says nothing of rotary embeddings.
_ROPE: Mapping[str, Any] = {
    "rope_type": "yarn",
    "factor": 32.0,
    "original_max_position_embeddings": 4096,
    "truncate": False,
}


def _windows(graph: Graph) -> list[bool]:
    """Of each layer whether it looks through a window."""
    return [op.window is not None for op in graph.operations() if isinstance(op, Attention)]


def _by_turns(layers: int) -> list[bool]:
    return [layer % 2 == 0 for layer in range(layers)]


def _pattern(graph: Graph) -> list[bool] | None:
    windows = _windows(graph)
    return None if windows == _by_turns(len(windows)) else windows


def _window(graph: Graph) -> int | None:
    return next((op.window for op in graph.operations() if isinstance(op, Attention) and op.window), None)


@dataclass(frozen=True)
class _Dimensions(Dimensions):
    """`windowed` layers see `window` tokens, the others all; YaRN's limits are `rounded` or not."""

    layers: int = quantity("num_hidden_layers", "block_count", lambda graph: len(graph.layers))
    inner_size: int = written("feed_forward_length", of(MoE, lambda moe: moe.expert_size))
    heads: int = quantity("num_attention_heads", "attention.head_count", of(Attention, lambda op: op.heads))
    key_value_heads: int = quantity(
        "num_key_value_heads", "attention.head_count_kv", of(Attention, lambda op: op.key_value_heads)
    )
    head_size: int = quantity(
        "head_dim", ("attention.key_length", "attention.value_length"), of(Attention, lambda op: op.head_size)
    )
    epsilon: float = quantity(
        "rms_norm_eps", "attention.layer_norm_rms_epsilon", lambda graph: graph.final_norm.epsilon, default=1e-5
    )
    rotary_size: int = written("rope.dimension_count", of_rope(lambda rope: rope.size))
    rope_base: float = quantity(gguf="rope.freq_base", from_graph=of_rope(lambda rope: rope.base))
    scaling: str = quantity(gguf="rope.scaling.type", from_graph=of_yarn(lambda yarn: "yarn"), default="none")
    yarn_factor: float = quantity(gguf="rope.scaling.factor", from_graph=of_yarn(lambda yarn: yarn.factor), default=1.0)
    yarn_context: int = quantity(
        gguf="rope.scaling.original_context_length", from_graph=of_yarn(lambda yarn: yarn.original_context), default=0
    )
    yarn_fast: float = written("rope.scaling.yarn_beta_fast", of_yarn(lambda yarn: yarn.fast))
    yarn_slow: float = written("rope.scaling.yarn_beta_slow", of_yarn(lambda yarn: yarn.slow))
    window: int = quantity(gguf="attention.sliding_window", from_graph=_window)
    pattern: Sequence[bool] = written(_PATTERN, _pattern)
    experts: int = quantity(("num_local_experts", "num_experts"), "expert_count", of(MoE, lambda moe: moe.experts))
    top_k: int = quantity(
        ("num_experts_per_tok", "experts_per_token"), "expert_used_count", of(MoE, lambda moe: moe.router.top_k)
    )
    expert_size: int = quantity("intermediate_size", "expert_feed_forward_length", of(MoE, lambda moe: moe.expert_size))
    clamp: float = quantity("swiglu_limit", default=_CLAMP)
    rounded: bool = quantity()
    windowed: Sequence[bool] = quantity()


_IMPLEMENTED: Mapping[str, Sequence[object]] = {
    "attention_bias": [True],
    "hidden_act": ["silu"],
    "swiglu_alpha": [1.702],
}
_HARMLESS = ("sliding_window",)  # read where a layer looks through one
_HARMLESS_METADATA = ("vocab_size",)  # the embedding says it


def _matrices(catalogue: Catalogue, name: str, shape: tuple[int, ...]) -> Expression:
    """A stack of matrices: floating point numbers are stored transposed, MXFP4 as it is used."""
    stored = catalogue.fused(name)
    return stored if isinstance(stored, Mxfp4) else Transposed(stored)


def _by_turns_with(catalogue: Catalogue, name: str, shape: tuple[int, ...], start: int) -> Expression:
    """Of gate and up projection, whose rows are stored by turns, the one that begins there."""
    stored = catalogue.fused(name)
    return (
        Rows(stored, start, stored.shape[-2], 2) if isinstance(stored, Mxfp4) else Transposed(Columns(stored, start, 2))
    )


def _bias_by_turns_with(catalogue: Catalogue, name: str, shape: tuple[int, ...], start: int) -> Expression:
    return Columns(catalogue.fused(name), start, 2)


_GATE_UP, _DOWN = (
    tuple(f"mlp.experts.{kind}_proj{ending}" for ending in ("_blocks", "")) for kind in ("gate_up", "down")
)
_NAMES = Names(
    layers=("model.layers.{}.",),
    whole=WHOLE_NAMES,
    layer=ATTENTION_NAMES
    | ATTENTION_BIAS_NAMES
    | {
        "attn_sinks.weight": ("self_attn.sinks",),
        "post_attention_norm.weight": ("post_attention_layernorm.weight",),
        "ffn_gate_inp.weight": ("mlp.router.weight",),
        "ffn_gate_inp.bias": ("mlp.router.bias",),
        "ffn_gate_exps.weight": _GATE_UP,
        "ffn_gate_exps.bias": ("mlp.experts.gate_up_proj_bias",),
        "ffn_up_exps.weight": _GATE_UP,
        "ffn_up_exps.bias": ("mlp.experts.gate_up_proj_bias",),
        "ffn_down_exps.weight": _DOWN,
        "ffn_down_exps.bias": ("mlp.experts.down_proj_bias",),
    },
    experts={},
    special={
        "ffn_gate_exps.weight": partial(_by_turns_with, start=0),
        "ffn_gate_exps.bias": partial(_bias_by_turns_with, start=0),
        "ffn_up_exps.weight": partial(_by_turns_with, start=1),
        "ffn_up_exps.bias": partial(_bias_by_turns_with, start=1),
        "ffn_down_exps.weight": _matrices,
    },
)


def _from_checkpoint(config: Config, tensors: Sequence[TensorInfo]) -> Graph:
    dimensions = _read_config(config)
    graph = read_checkpoint(config, tensors, _NAMES, partial(_build, dimensions))
    return graph if dimensions.rounded else replace(graph, notes=(_UNROUNDED, *graph.notes))


def _read_config(config: Config) -> _Dimensions:
    expect_all(config, _IMPLEMENTED)
    rope, windowed = rope_section(config), _read_kinds(config)
    yarn = _read_yarn(config, rope)
    if yarn:
        config.expect("initial_context_length", yarn.original_context)
    dimensions = _Dimensions.from_config(
        config,
        rope_base=rope.number("rope_theta", default=config.number("rope_theta", default=_ROPE_BASE)),
        scaling="yarn" if yarn else "none",
        yarn_factor=yarn.factor if yarn else 1.0,
        yarn_context=yarn.original_context if yarn else 0,
        rounded=yarn.rounded if yarn else True,
        window=config.integer("sliding_window") if any(windowed) else 0,
        windowed=windowed,
    )
    _check(dimensions, config.origin)
    return dimensions


def _read_yarn(config: Config, rope: Config) -> Yarn | None:
    silent = config.get("rope_parameters") is None and not rope.keys()
    said = Config(_ROPE, config.origin) if silent else rope
    return read_yarn(said, config.integer("max_position_embeddings"), rounded=(True, False))


def _read_kinds(config: Config) -> tuple[bool, ...]:
    """Which layers look through a window: those that are listed, by default every other one from the first on."""
    layers = config.integer("num_hidden_layers")
    return config.marked("layer_types", layers, "sliding_attention", "full_attention") or tuple(_by_turns(layers))


def _from_gguf(metadata: Config, tensors: Sequence[TensorInfo]) -> Graph:
    catalogue, vocabulary = open_gguf(metadata, tensors)
    metadata.expect(f"{NAME}.rope.scaling.type", "none", "yarn")
    windowed = _read_pattern(metadata)
    # llama.cpp always rounds YaRN's limits.
    dimensions = _Dimensions.from_gguf(
        metadata, NAME, vocabulary=vocabulary, clamp=_CLAMP, rounded=True, windowed=windowed
    )
    _check(dimensions, metadata.origin)
    graph = _build(dimensions, gguf_source(catalogue))
    catalogue.finish()
    return graph


def _read_pattern(metadata: Config) -> tuple[bool, ...]:
    """As llama.cpp reads it: a list, or after how many layers one has no window."""
    layers, pattern = metadata.integer(f"{NAME}.block_count"), metadata.get(f"{NAME}.{_PATTERN}")
    if isinstance(pattern, list) and len(pattern) == layers:
        return tuple(map(bool, pattern))
    period = 2 if pattern is None else pattern
    if type(period) is not int or period < 0:
        raise BadInput(f"{metadata.origin}: {NAME}.{_PATTERN} is {pattern!r}, expected true or false for each layer")
    return tuple(period == 0 or layer % period < period - 1 for layer in range(layers))


def _check(d: _Dimensions, origin: str) -> None:
    check_heads(origin, d.heads, d.key_value_heads)
    check_top_k(origin, d.top_k, d.experts)
    check_rotary(origin, "head_dim", d.head_size, d.head_size)


def _build(d: _Dimensions, source: Source) -> Graph:
    builder = Builder(d, d.epsilon, source)
    yarn = replace(yarn_of(d.yarn_factor, d.yarn_context), rounded=d.rounded) if d.scaling == "yarn" else None
    rope = Rope(d.head_size, d.rope_base, yarn=yarn)

    def attention(blk: str, windowed: bool) -> Attention:
        plain = builder.attention(blk, d.heads, d.key_value_heads, d.head_size, rope)
        sink = builder.weight(f"{blk}.attn_sinks.weight", Role.ATTENTION_SINK, d.heads)
        return replace(builder.biased(blk, plain), sink=sink, window=d.window if windowed else None)

    def experts(blk: str) -> MoE:
        weight = builder.weight(f"{blk}.ffn_gate_inp.weight", Role.ROUTER, d.experts, d.hidden)
        bias = builder.weight(f"{blk}.ffn_gate_inp.bias", Role.ROUTER_BIAS, d.experts)
        router = Router(weight, None, Score.SOFTMAX, d.top_k, logit_bias=bias)
        shape = (d.experts, d.expert_size, d.hidden)
        return builder.biased_experts(blk, builder.experts(blk, router, Activation.SWIGLU_OAI, shape, clamp=d.clamp))

    def layer(index: int) -> Layer:
        blk = f"blk.{index}"
        mixed = sequential(builder.norm(f"{blk}.attn_norm.weight", d.hidden), attention(blk, d.windowed[index]))
        norm = builder.norm(f"{blk}.post_attention_norm.weight", d.hidden)
        return Layer(index, (mixed, sequential(norm, experts(blk))))

    return builder.graph(NAME, tuple(layer(index) for index in range(d.layers)))


def _gguf_metadata(graph: Graph) -> dict[str, Any]:
    """Raises BadInput for what llama.cpp would compute otherwise, or not load."""
    experts = first(graph, MoE)
    assert experts
    unlike = {
        f"a swiglu_limit other than {_CLAMP:g}": experts.clamp != _CLAMP,
        "no layer with a sliding window (layer_types)": not any(_windows(graph)),
    }
    refuse_unlike(graph, unlike)
    return _Dimensions.metadata(graph)


ARCHITECTURE = Architecture(
    name=NAME,
    model_types=("gpt_oss",),
    pre_tokenizer="gpt-4o",
    from_checkpoint=_from_checkpoint,
    from_gguf=_from_gguf,
    gguf_metadata=_gguf_metadata,
    harmless=_HARMLESS,
    harmless_metadata=_HARMLESS_METADATA,
)
