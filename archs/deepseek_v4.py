"""DeepSeek V4 Flash and Pro, their Base and 0731 variants: hyper-connected compressed attention and routed experts."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ..errors import BadInput
from .catalogue import Catalogue
from .config import Config
from .deepseek_v4_blocks import NAME, OVERLAPPING, STREAMS, Dimensions, build, build_draft, check
from .deepseek_v4_names import CheckpointSource
from .graph import CompressedAttention, Graph, HashRouter, MoE, Yarn
from .registry import Architecture
from .weights import Read, TensorInfo

GGUF_SQRT_SOFTPLUS = 4  # llama.cpp's expert_gating_func
RATIOS = {"sliding_attention": 0, "compressed_sparse_attention": OVERLAPPING, "heavily_compressed_attention": 128}
YARN_FAST, YARN_SLOW = 32.0, 1.0  # llama.cpp knows no other


def _from_checkpoint(config: Config, tensors: Sequence[TensorInfo]) -> Graph:
    dimensions = _read_config(config)
    catalogue = Catalogue(tensors, config.origin)
    source = CheckpointSource(catalogue, len(dimensions.ratios), dimensions.experts, dimensions.expert_size)
    graph = build(dimensions, source)
    if _draft_blocks(tensors) == 1 and "mtp.0.e_proj.weight" in catalogue:
        graph = replace(graph, draft=build_draft(graph, dimensions, source.draft))
    elif drafts := _draft_blocks(tensors):
        left = f"{catalogue.ignore('mtp.')} tensors of {drafts} draft blocks (mtp.*)"
        graph = replace(graph, notes=(f"{left} are left out: llama.cpp cannot run them",))
    catalogue.finish()
    return graph


def _draft_blocks(tensors: Sequence[TensorInfo]) -> int:
    """Counted by name, as configurations miscount them."""
    return len({match[1] for tensor in tensors if (match := re.match(r"mtp\.(\d+)\.", tensor.name))})


def _read_config(config: Config) -> Dimensions:
    config.expect("hidden_act", "silu")
    config.expect("scoring_func", "sqrtsoftplus")
    config.expect("topk_method", "noaux_tc")
    config.expect("norm_topk_prob", True)
    config.expect("num_key_value_heads", 1)
    config.expect("attention_bias", False)
    config.expect("mlp_bias", False)
    config.expect("tie_word_embeddings", False)
    config.expect("hc_mult", STREAMS)
    quantization = config.section("quantization_config")
    quantization.expect("weight_block_size", [128, 128])
    layers = config.integer("num_hidden_layers")
    head_size = config.integer("head_dim")
    expert_size = config.integer("moe_intermediate_size")
    ropes = config.section("rope_parameters")
    main, compressed = ropes.section("main"), ropes.section("compress")
    main.expect("rope_type", "default")
    partial = main.number("partial_rotary_factor", default=config.number("partial_rotary_factor", default=0.0))
    dimensions = Dimensions(
        vocabulary=config.integer("vocab_size"),
        hidden=config.integer("hidden_size"),
        context=config.integer("max_position_embeddings"),
        epsilon=config.number("rms_norm_eps"),
        ratios=_read_ratios(config, layers),
        hash_layers=_read_hash_layers(config, layers),
        heads=config.integer("num_attention_heads"),
        head_size=head_size,
        query_rank=config.integer("q_lora_rank"),
        output_groups=config.integer("o_groups"),
        output_rank=config.integer("o_lora_rank"),
        window=config.integer("sliding_window"),
        rotary_size=round(head_size * partial) if partial else config.integer("qk_rope_head_dim"),
        rope_base=main.number("rope_theta", default=config.number("rope_theta", default=10000.0)),
        compressed_rope_base=compressed.number(
            "rope_theta", default=config.number("compress_rope_theta", default=160000.0)
        ),
        yarn=_read_yarn(compressed if "rope_theta" in compressed else config.section("rope_scaling")),
        index_heads=config.integer("index_n_heads"),
        index_head_size=config.integer("index_head_dim"),
        index_top_k=config.integer("index_topk"),
        experts=config.integer("n_routed_experts", "num_local_experts"),
        top_k=config.integer("num_experts_per_tok"),
        expert_size=expert_size,
        shared_size=expert_size * config.integer("n_shared_experts", default=1),
        router_scale=config.number("routed_scaling_factor"),
        clamp=config.number("swiglu_limit"),
        sinkhorn_iterations=config.integer("hc_sinkhorn_iters"),
        stream_epsilon=config.number("hc_eps"),
    )
    check(dimensions, config.origin)
    return dimensions


def _read_ratios(config: Config, layers: int) -> tuple[int, ...]:
    """From `compress_ratios`, which may go on with the draft blocks', or from transformers' `layer_types`."""
    key = "compress_ratios" if "compress_ratios" in config else "layer_types"
    values = config.get(key)
    known: dict[Any, int] = RATIOS if key == "layer_types" else {ratio: ratio for ratio in RATIOS.values()}
    if not isinstance(values, list) or len(values) < layers:
        raise BadInput(f"{config.origin}: {key} is {values!r}, expected one entry for each of {layers} layers")
    for layer, value in enumerate(values[:layers]):
        if value not in list(known):  # a list can be asked for anything, a dictionary only for what it could hold
            wanted = ", ".join(str(choice) for choice in known)
            raise BadInput(f"{config.origin}: {key}[{layer}] is {value!r}, expected one of {wanted}")
    rates = config.section("compress_rates")
    for name, ratio in RATIOS.items():
        rates.expect(name, ratio)
    return tuple(known[value] for value in values[:layers])


def _read_hash_layers(config: Config, layers: int) -> int:
    """The number of leading layers that look their experts up."""
    kinds = config.get("mlp_layer_types")
    if kinds is None:
        count = config.get("num_hash_layers")
        if type(count) is not int or not 0 <= count <= layers:
            raise BadInput(f"{config.origin}: num_hash_layers is {count!r}, expected 0 to {layers}")
        return count
    count = kinds.count("hash_moe") if isinstance(kinds, list) else 0
    if kinds != ["hash_moe"] * count + ["moe"] * (layers - count):
        raise BadInput(
            f"{config.origin}: mlp_layer_types is {kinds!r}, expected hash_moe in the first layers and moe in the "
            f"others, {layers} in all"
        )
    return count


def _read_yarn(scaling: Config) -> Yarn | None:
    kind = scaling.text("rope_type", "type", default="default")
    if kind == "default":
        return None
    if kind != "yarn":
        raise BadInput(f"{scaling.origin}: rope type is {kind!r}, expected 'yarn' or 'default'")
    scaling.expect("beta_fast", YARN_FAST)
    scaling.expect("beta_slow", YARN_SLOW)
    scaling.expect("attention_factor", 1.0)
    original = scaling.integer("original_max_position_embeddings")
    return Yarn(scaling.number("factor"), original, YARN_FAST, YARN_SLOW)


def _from_gguf(metadata: Config, tensors: Sequence[TensorInfo]) -> Graph:
    catalogue = Catalogue(tensors, metadata.origin)
    if "blk.0.attn_norm.weight" not in catalogue:
        raise BadInput(f"{metadata.origin} holds no first layer: it is a draft that runs beside its model only")
    graph = build(_read_metadata(metadata, tensors), lambda name: Read(catalogue.take(name)))
    catalogue.finish()
    return graph


def _read_metadata(metadata: Config, tensors: Sequence[TensorInfo]) -> Dimensions:
    embedding = next((tensor for tensor in tensors if tensor.name == "token_embd.weight"), None)
    if embedding is None:
        raise BadInput(f"{metadata.origin}: tensor token_embd.weight is missing, the file is incomplete")

    def key(name: str) -> str:
        return f"{NAME}.{name}"

    metadata.expect(key("expert_gating_func"), GGUF_SQRT_SOFTPLUS)
    metadata.expect(key("hyper_connection.count"), STREAMS)
    layers, expert_size = metadata.integer(key("block_count")), metadata.integer(key("expert_feed_forward_length"))
    ratios = metadata.get(key("attention.compress_ratios"))
    if not isinstance(ratios, list) or len(ratios) < layers or set(ratios) - set(RATIOS.values()):
        raise BadInput(
            f"{metadata.origin}: {key('attention.compress_ratios')} is {ratios!r}, expected 0, 4 or 128 for each of "
            f"{layers} layers"
        )
    yarn = None
    if metadata.text(key("rope.scaling.type"), default="none") == "yarn":
        original = metadata.integer(key("rope.scaling.original_context_length"))
        yarn = Yarn(metadata.number(key("rope.scaling.factor")), original, YARN_FAST, YARN_SLOW)
    dimensions = Dimensions(
        vocabulary=embedding.shape[0],
        hidden=metadata.integer(key("embedding_length")),
        context=metadata.integer(key("context_length")),
        epsilon=metadata.number(key("attention.layer_norm_rms_epsilon")),
        ratios=tuple(ratios[:layers]),
        hash_layers=int(metadata.number(key("hash_layer_count"))),
        heads=metadata.integer(key("attention.head_count")),
        head_size=metadata.integer(key("attention.key_length")),
        query_rank=metadata.integer(key("attention.q_lora_rank")),
        output_groups=metadata.integer(key("attention.output_group_count")),
        output_rank=metadata.integer(key("attention.output_lora_rank")),
        window=metadata.integer(key("attention.sliding_window")),
        rotary_size=metadata.integer(key("rope.dimension_count")),
        rope_base=metadata.number(key("rope.freq_base")),
        compressed_rope_base=metadata.number(key("attention.compress_rope_freq_base")),
        yarn=yarn,
        index_heads=metadata.integer(key("attention.indexer.head_count")),
        index_head_size=metadata.integer(key("attention.indexer.key_length")),
        index_top_k=metadata.integer(key("attention.indexer.top_k")),
        experts=metadata.integer(key("expert_count")),
        top_k=metadata.integer(key("expert_used_count")),
        expert_size=expert_size,
        shared_size=expert_size * metadata.integer(key("expert_shared_count")),
        router_scale=metadata.number(key("expert_weights_scale")),
        clamp=_one_number(metadata, key("swiglu_clamp_exp")),
        sinkhorn_iterations=metadata.integer(key("hyper_connection.sinkhorn_iterations")),
        stream_epsilon=metadata.number(key("hyper_connection.epsilon")),
    )
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


def _gguf_metadata(graph: Graph) -> dict[str, Any]:
    operations = list(graph.operations())
    attentions = [operation for operation in operations if isinstance(operation, CompressedAttention)]
    moes = [operation for operation in operations if isinstance(operation, MoE)]
    indexer = next((attention.indexer for attention in attentions if attention.indexer), None)
    if indexer is None:
        raise BadInput(f"no layer has compress ratio {OVERLAPPING}: llama.cpp cannot run such a model")
    attention, experts, rope = attentions[0], moes[0], indexer.compressor.rope
    assert graph.residual and experts.shared and experts.clamp
    values: dict[str, Any] = {
        "context_length": graph.context_length,
        "embedding_length": graph.hidden_size,
        "embedding_length_out": graph.hidden_size * graph.residual.multiplicity,
        "block_count": len(graph.layers),
        "attention.head_count": attention.heads,
        "attention.head_count_kv": 1,
        "attention.key_length": attention.head_size,
        "attention.value_length": attention.head_size,
        "attention.layer_norm_rms_epsilon": graph.final_norm.epsilon,
        "attention.q_lora_rank": attention.query_down.shape[0],
        "attention.output_group_count": attention.groups,
        "attention.output_lora_rank": attention.output_down.shape[0] // attention.groups,
        "attention.sliding_window": attention.window,
        "attention.compress_ratios": [item.compressor.ratio if item.compressor else 0 for item in attentions],
        "attention.compress_rope_freq_base": rope.base,
        "attention.indexer.head_count": indexer.heads,
        "attention.indexer.key_length": indexer.head_size,
        "attention.indexer.top_k": indexer.top_k,
        "rope.dimension_count": rope.size,
        "rope.freq_base": next((item.rope.base for item in attentions if not item.compressor), 10000.0),
        "expert_count": experts.experts,
        "expert_used_count": experts.router.top_k,
        "expert_feed_forward_length": experts.expert_size,
        "expert_shared_count": experts.shared.up.shape[0] // experts.expert_size,
        "expert_weights_scale": experts.router.scale,
        "expert_weights_norm": True,
        "expert_gating_func": GGUF_SQRT_SOFTPLUS,
        "swiglu_clamp_exp": experts.clamp,
        "hash_layer_count": sum(isinstance(item.router, HashRouter) for item in moes),
        "hyper_connection.count": graph.residual.multiplicity,
        "hyper_connection.sinkhorn_iterations": graph.residual.iterations,
        "hyper_connection.epsilon": graph.residual.epsilon,
    }
    if rope.yarn:
        values |= {
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": rope.yarn.factor,
            "rope.scaling.original_context_length": rope.yarn.original_context,
        }
    return {f"{graph.architecture}.{key}": value for key, value in values.items()}


def _draft_metadata(graph: Graph) -> dict[str, Any]:
    """The model's keys, with one block more: llama.cpp reads a draft as the model whose layers are elsewhere."""
    assert graph.draft
    values, layers, drafts = _gguf_metadata(graph), len(graph.layers), len(graph.draft.predictions)
    ratios = values[f"{NAME}.attention.compress_ratios"] + [0] * drafts
    return values | {
        f"{NAME}.attention.compress_ratios": ratios,
        f"{NAME}.block_count": layers + drafts,
        f"{NAME}.nextn_predict_layers": drafts,
    }


ARCHITECTURE = Architecture(
    name=NAME,
    model_types=("deepseek_v4",),
    example="deepseek-v4-tiny",
    pre_tokenizer="deepseek-v3",
    from_checkpoint=_from_checkpoint,
    from_gguf=_from_gguf,
    gguf_metadata=_gguf_metadata,
    draft_metadata=_draft_metadata,
)
