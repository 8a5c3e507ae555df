"""DeepSeek V4 Flash and Pro, their Base and 0731 variants: hyper-connected compressed attention and routed experts."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from ..errors import BadInput
from .architecture import Architecture
from .config import Config
from .deepseek_v4_blocks import NAME, OVERLAPPING, STREAMS, Family, build, build_draft, build_draft_alone, check
from .deepseek_v4_names import NAMES, draft_source
from .deepseek_v4_ropes import read_ropes
from .expressions import TensorInfo
from .graph import Graph
from .shared import CheckpointSource, catalogue_of, expect_all, gguf_source, open_gguf

RATIOS = {"sliding_attention": 0, "compressed_sparse_attention": OVERLAPPING, "heavily_compressed_attention": 128}
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
# What the rotary embedding leaves of a head, and the settings of drafts that no engine runs.
_HARMLESS = (
    *("qk_nope_head_dim", "qk_head_dim", "v_head_dim"),
    *("dspark_block_size", "dspark_markov_rank", "dspark_noise_token_id", "dspark_target_layer_ids"),
)


def _from_checkpoint(config: Config, tensors: Sequence[TensorInfo]) -> Graph:
    dimensions = _read_config(config)
    catalogue = catalogue_of(config, tensors)
    source = CheckpointSource(catalogue, NAMES)
    graph = build(dimensions, source)
    if _draft_blocks(tensors) == 1 and "mtp.0.e_proj.weight" in catalogue:
        try:
            graph = replace(graph, draft=build_draft(graph, dimensions, draft_source(source, dimensions.layers)))
        except BadInput as error:  # the model does without
            catalogue.ignore("mtp.")
            graph = replace(graph, notes=(f"multi-token prediction is left out: {error}",))
    elif drafts := _draft_blocks(tensors):
        left = f"{catalogue.ignore('mtp.')} tensors of {drafts} draft blocks (mtp.*)"
        graph = replace(graph, notes=(f"{left} are left out: llama.cpp cannot run them",))
    return replace(graph, notes=(*graph.notes, *catalogue.finish()))


def _draft_blocks(tensors: Sequence[TensorInfo]) -> int:
    """Counted by name, as configurations miscount them."""
    return len({match[1] for tensor in tensors if (match := re.match(r"mtp\.(\d+)\.", tensor.name))})


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
    """A model, or a draft, which is numbered on from a model's layers and has none itself."""
    catalogue, vocabulary = open_gguf(metadata, tensors)
    alone = "blk.0.attn_norm.weight" not in catalogue
    drafts = metadata.integer(f"{NAME}.nextn_predict_layers", default=0) if alone else 0
    ratios, blocks = metadata.get(f"{NAME}.attention.compress_ratios"), metadata.integer(f"{NAME}.block_count")
    if not isinstance(ratios, list) or len(ratios) < blocks or set(ratios) - set(RATIOS.values()):
        raise BadInput(
            f"{metadata.origin}: {NAME}.attention.compress_ratios is {ratios!r}, expected 0, 4 or 128 for each of "
            f"{blocks} layers"
        )
    layers, clamp = blocks - drafts, _one_number(metadata, f"{NAME}.swiglu_clamp_exp")
    dimensions = Family.from_gguf(
        metadata, NAME, vocabulary=vocabulary, layers=layers, ratios=tuple(ratios[:layers]), clamp=clamp
    )
    check(dimensions, metadata.origin)
    source = gguf_source(catalogue)
    if drafts:  # of a model, what repeats something is compared with its graph
        metadata.expect(f"{NAME}.embedding_length_out", STREAMS * dimensions.hidden)
        metadata.expect(f"{NAME}.attention.value_length", dimensions.head_size)
    graph = build_draft_alone(dimensions, source) if drafts else build(dimensions, source)
    catalogue.finish()
    return graph


def _one_number(metadata: Config, key: str) -> float:
    """A number that may be stored once or once for each layer."""
    values = metadata.get(key)
    if not isinstance(values, list):
        return metadata.number(key)
    if len(set(values)) != 1 or isinstance(values[0], str):
        raise BadInput(f"{metadata.origin}: {key} is {values!r}, expected the same number for all layers")
    return float(values[0])


def _draft_metadata(graph: Graph) -> dict[str, Any]:
    """The model's keys, with one block more: llama.cpp reads a draft as the model whose layers are elsewhere."""
    assert graph.draft
    values, layers, drafts = Family.metadata(graph), len(graph.layers), len(graph.draft.predictions)
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
    gguf_metadata=Family.metadata,
    draft_metadata=_draft_metadata,
    harmless=_HARMLESS,
    harmless_metadata=("vocab_size", "nextn_predict_layers"),
)
