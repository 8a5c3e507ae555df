"""DeepSeek V3.2, and GLM-5 to 5.3: DeepSeek V3 with attention to the tokens that an indexer picks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from ..errors import BadInput
from .architecture import Architecture, refuse_unlike
from .config import Config
from .deepseek_v3 import HARMLESS, NAMES, LatentReader, read_config, read_metadata, unlike_epsilons
from .deepseek_v32_blocks import SparseFamily, build, check_indexers, first_indexer, picking
from .graph import Graph
from .shared import Source, expect_all

NAME = "deepseek32"
GLM_NAME = "glm-dsa"
_SMALLEST_HEAD = 64  # that llama.cpp turns by a Hadamard matrix, whose size is a power of two
_LONG_CONTEXT, _SKIPPED, _EVERY = 1_048_576, 3, 4  # llama.cpp's idea of files that do not say which layers pick
_TYPES = f"{GLM_NAME}.attention.indexer.types"
_ATTENTIONS = ("indexed_attention", "deepseek_sparse_attention")
_IMPLEMENTED: Mapping[str, Sequence[object]] = {"mlp_bias": [False], "moe_router_dtype": ["float32"]}
_NAMES = replace(
    NAMES,
    layer={
        **NAMES.layer,
        "indexer.attn_q_b.weight": ("self_attn.indexer.wq_b.weight",),
        "indexer.attn_k.weight": ("self_attn.indexer.wk.weight",),
        "indexer.k_norm.weight": ("self_attn.indexer.k_norm.weight",),
        "indexer.k_norm.bias": ("self_attn.indexer.k_norm.bias",),
        "indexer.proj.weight": ("self_attn.indexer.weights_proj.weight",),
    },
)
_OF_GLM = (
    "GLM's indexers norm their keys with an epsilon of 1e-6, llama.cpp with one of 0: it picks other tokens where keys "
    "are about as small as 0.001"
)


def _read_config(config: Config, drafts: bool) -> SparseFamily:
    config.expect("indexer_rope_interleave", False)
    picking = (True,) * config.integer("num_hidden_layers")
    return _quantities(config, drafts, index_interleaved=False, picking=picking)


def _read_glm_config(config: Config, drafts: bool) -> SparseFamily:
    config.expect("indexer_rope_interleave", True)
    config.get("index_share_for_mtp_iteration")  # of drafts
    return _quantities(config, drafts, index_interleaved=True, picking=_read_picking(config))


def _quantities(config: Config, drafts: bool, **own: Any) -> SparseFamily:
    expect_all(config, _IMPLEMENTED)
    _check_layers(config)
    d = read_config(SparseFamily, config, drafts, **own)
    config.expect("num_experts", d.experts)
    check_indexers(d, config.origin)
    return d


def _check_layers(config: Config) -> None:
    """Raises BadInput for other kinds of layers than those of whom `first_k_dense_replace` says which they are."""
    layers, dense = config.integer("num_hidden_layers"), config.integer("first_k_dense_replace", default=0)
    kinds = config.get("layer_types")
    if kinds is not None and kinds not in ([kind] * layers for kind in _ATTENTIONS):
        raise BadInput(f"{config.origin}: layer_types is not {' or '.join(_ATTENTIONS)} for each of {layers} layers")
    marked = config.marked("mlp_layer_types", layers, "dense", "sparse")
    if marked is not None and marked != tuple(layer < dense for layer in range(layers)):
        raise BadInput(
            f"{config.origin}: mlp_layer_types is not dense for the first {dense} layers (first_k_dense_replace) and "
            "sparse for the others: leave one of them out"
        )


def _read_picking(config: Config) -> tuple[bool, ...]:
    """From `indexer_types`, or from a pattern, or every so many layers behind the first ones."""
    layers = config.integer("num_hidden_layers")
    pattern, every = config.get("index_topk_pattern"), config.integer("index_topk_freq", default=1)
    skipped = config.integer("index_skip_topk_offset", default=0) if "index_skip_topk_offset" in config else 2
    listed = config.marked("indexer_types", layers, "full", "shared")
    if listed is not None:
        return listed
    if pattern is None:
        return _at_intervals(layers, skipped, every)
    letters = [{"full": "F", "shared": "S"}.get(entry, entry) for entry in pattern]
    if len(letters) != layers or {*letters} - {"F", "S"}:
        raise BadInput(
            f"{config.origin}: index_topk_pattern is {pattern!r}, expected F or S for each of {layers} layers"
        )
    return tuple(letter == "F" for letter in letters)


def _at_intervals(layers: int, skipped: int, every: int) -> tuple[bool, ...]:
    return tuple(max(layer - skipped + 1, 0) % every == 0 for layer in range(layers))


def _from_metadata(metadata: Config, vocabulary: int) -> SparseFamily:
    metadata.integer(f"{NAME}.expert_gating_func")  # llama.cpp does not load a file without
    d = read_metadata(SparseFamily, NAME, metadata, vocabulary, index_interleaved=False, picking=())
    return _checked(replace(d, picking=(True,) * d.layers), metadata)


def _from_glm_metadata(metadata: Config, vocabulary: int) -> SparseFamily:
    d = read_metadata(SparseFamily, GLM_NAME, metadata, vocabulary, index_interleaved=True, picking=())
    listed = metadata.get(_TYPES)
    if listed is None:
        long = d.context >= _LONG_CONTEXT
        listed = list(_at_intervals(d.layers, _SKIPPED, _EVERY) if long else (True,) * d.layers)
    if not isinstance(listed, list) or len(listed) < d.layers or {*map(type, listed)} - {bool}:
        raise BadInput(
            f"{metadata.origin}: {_TYPES} is {listed!r}, expected true or false for each of {d.layers} layers"
        )
    return _checked(replace(d, picking=tuple(listed[: d.layers])), metadata)


def _checked(d: SparseFamily, metadata: Config) -> SparseFamily:
    check_indexers(d, metadata.origin)
    return d


def _build_glm(name: str, d: SparseFamily, source: Source) -> Graph:
    return replace(build(name, d, source), notes=(_OF_GLM,))


def _gguf_metadata(graph: Graph) -> dict[str, Any]:
    """Raises BadInput for what llama.cpp would compute otherwise, or not load."""
    size = first_indexer(graph).head_size
    odd = {
        f"index heads of {size} (index_head_dim), no power of two from {_SMALLEST_HEAD} on": (
            size < _SMALLEST_HEAD or size.bit_count() > 1
        )
    }
    refuse_unlike(graph, odd | unlike_epsilons(graph))
    return SparseFamily.metadata(graph)


def _glm_metadata(graph: Graph) -> dict[str, Any]:
    return _gguf_metadata(graph) | {_TYPES: picking(graph)}


_DEEPSEEK_READER = LatentReader(NAME, _NAMES, _read_config, _from_metadata, build)
_GLM_READER = LatentReader(GLM_NAME, _NAMES, _read_glm_config, _from_glm_metadata, _build_glm)

DEEPSEEK = Architecture(
    name=NAME,
    model_types=("deepseek_v32",),
    pre_tokenizer="deepseek-v3",
    from_checkpoint=_DEEPSEEK_READER.from_checkpoint,
    from_gguf=_DEEPSEEK_READER.from_gguf,
    gguf_metadata=_gguf_metadata,
    harmless=HARMLESS,
)
GLM = Architecture(
    name=GLM_NAME,
    model_types=("glm_moe_dsa",),
    pre_tokenizer="glm4",
    from_checkpoint=_GLM_READER.from_checkpoint,
    from_gguf=_GLM_READER.from_gguf,
    gguf_metadata=_glm_metadata,
    harmless=HARMLESS,
)
