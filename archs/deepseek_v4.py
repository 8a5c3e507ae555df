"""DeepSeek V4 Flash and Pro, their Base and 0731 variants: hyper-connected compressed attention and routed experts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from ..errors import BadInput
from .architecture import Architecture
from .config import Config
from .deepseek_v4_blocks import NAME, RATIOS, STREAMS, Family, build, check, read_metadata
from .deepseek_v4_drafts import draft_from_gguf, draft_metadata, read_draft
from .deepseek_v4_names import NAMES
from .deepseek_v4_ropes import read_ropes
from .expressions import TensorInfo
from .graph import Graph
from .shared import CheckpointSource, catalogue_of, expect_all, gguf_source, open_gguf

_IMPLEMENTED: Mapping[str, Sequence[object]] = {
    "hidden_act": ["silu"],
    "scoring_func": ["sqrtsoftplus"],
    "topk_method": ["noaux_tc"],
    "norm_topk_prob": [True],
    "num_key_value_heads": [1],
    "attention_bias": [False],
    "mlp_bias": [False],
    "tie_word_embeddings": [False],
    "hc_mult": [STREAMS],
    "rope_interleave": [True],
    "compress_rate_csa": [RATIOS["compressed_sparse_attention"]],
    "compress_rate_hca": [RATIOS["heavily_compressed_attention"]],
}
# What the rotary embedding leaves of a head, and the settings of drafts, which a checkpoint may be without.
_HARMLESS = (
    *("qk_nope_head_dim", "qk_head_dim", "v_head_dim"),
    *("dspark_block_size", "dspark_markov_rank", "dspark_noise_token_id", "dspark_target_layer_ids"),
)


def _from_checkpoint(config: Config, tensors: Sequence[TensorInfo]) -> Graph:
    dimensions = _read_config(config)
    catalogue = catalogue_of(config, tensors)
    source = CheckpointSource(catalogue, NAMES)
    graph = build(dimensions, source)
    if any(tensor.name.startswith("mtp.") for tensor in tensors):
        try:
            graph = replace(graph, draft=read_draft(graph, dimensions, config, source, tensors))
        except BadInput as error:  # the model does without
            catalogue.ignore("mtp.")
            graph = replace(graph, notes=(f"multi-token prediction is left out: {error}",))
    return replace(graph, notes=(*graph.notes, *catalogue.finish()))


def _read_config(config: Config) -> Family:
    expect_all(config, _IMPLEMENTED)
    layers = config.integer("num_hidden_layers")
    dimensions = Family.from_config(
        config,
        ratios=_read_ratios(config, layers),
        hash_layers=_read_hash_layers(config, layers),
        **read_ropes(config),
    )
    check(dimensions, config.origin)
    return dimensions


def _read_ratios(config: Config, layers: int) -> tuple[int, ...]:
    """From `compress_ratios`, which may go on with the draft blocks', or from transformers' `layer_types`."""
    key = "layer_types" if "layer_types" in config else "compress_ratios"
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


def _from_gguf(metadata: Config, tensors: Sequence[TensorInfo]) -> Graph:
    if not any(tensor.name == "blk.0.attn_norm.weight" for tensor in tensors):
        raise BadInput(f"{metadata.origin} holds no first layer: it is a draft that runs beside its model only")
    catalogue, vocabulary = open_gguf(metadata, tensors)
    dimensions = read_metadata(metadata, NAME, vocabulary)
    graph = build(dimensions, gguf_source(catalogue))
    catalogue.finish()
    return graph


ARCHITECTURE = Architecture(
    name=NAME,
    model_types=("deepseek_v4",),
    example="deepseek-v4-tiny",
    pre_tokenizer="deepseek-v3",
    from_checkpoint=_from_checkpoint,
    from_gguf=_from_gguf,
    gguf_metadata=Family.metadata,
    draft_metadata=draft_metadata,
    draft_from_gguf=draft_from_gguf,
    harmless=_HARMLESS,
    harmless_metadata=("vocab_size", "nextn_predict_layers"),
)
