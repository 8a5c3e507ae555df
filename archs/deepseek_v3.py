"""DeepSeek V3, V3.1 and R1, and Kimi K2 to K2.6: latent attention, group-limited sigmoid routing, drafting block."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any, Generic, TypeVar

from .architecture import Architecture, refuse_unlike
from .catalogue import Catalogue
from .config import Config
from .deepseek_v3_blocks import LATENT_EPSILON, Family, build, check
from .deepseek_v3_ropes import read_mscaled_yarn, yarn_from_gguf
from .dimensions import first
from .drafts import with_draft
from .expressions import Expression, Rows, Stack, TensorInfo, Transposed
from .graph import Graph, LatentAttention
from .llama_options import start_options
from .shared import (
    DENSE_NAMES,
    EXPERT_NAMES,
    CheckpointSource,
    Names,
    Source,
    catalogue_of,
    expect_all,
    gguf_source,
    open_gguf,
    rope_section,
    text_section,
)
from .weights import check_shape

NAME = "deepseek2"
_LARGEST_EPSILON = 1e-5  # that llama.cpp's norms of latents may have in place of 1e-6: nobody sees a difference
_LITE, _LITE_WITH_WORDS = (26, 27), (48, 128_256)  # layers, and words, by which llama.cpp knows DeepSeek V2 Lite
IMPLEMENTED: Mapping[str, Sequence[object]] = {
    "hidden_act": ["silu"],
    "scoring_func": ["sigmoid"],
    "topk_method": ["noaux_tc"],
    "attention_bias": [False],
    "moe_layer_freq": [1],
    "rope_interleave": [True],
}
HARMLESS = (
    *("head_dim", "qk_head_dim"),  # which repeat the widths of what is rotated, and of all
    *("num_mtp_layers", "tie_word_embeddings"),  # of what stands outside of the language model, the head is its own
    *("vision_config", "ignore_index", "media_placeholder_token_id", "use_unified_vision_chunk", "video_placeholder"),
    *("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id"),
    *("projection_hidden_size", "projection_layer_norm_eps"),
)
_PREFIXES = ("model.", "language_model.model.", "model.language_model.")
_PICTURES = ("vision_tower.", "mm_projector.", "model.vision_tower.", "model.mm_projector.")
NAMES = Names(
    layers=tuple(f"{prefix}layers.{{}}." for prefix in _PREFIXES),
    whole={
        "token_embd.weight": tuple(f"{prefix}embed_tokens.weight" for prefix in _PREFIXES),
        "output_norm.weight": tuple(f"{prefix}norm.weight" for prefix in _PREFIXES),
        "output.weight": ("lm_head.weight", "language_model.lm_head.weight"),
    },
    layer=DENSE_NAMES
    | {
        "attn_norm.weight": ("input_layernorm.weight",),
        "attn_q.weight": ("self_attn.q_proj.weight",),
        "attn_q_a.weight": ("self_attn.q_a_proj.weight",),
        "attn_q_a_norm.weight": ("self_attn.q_a_layernorm.weight",),
        "attn_q_b.weight": ("self_attn.q_b_proj.weight",),
        "attn_kv_a_mqa.weight": ("self_attn.kv_a_proj_with_mqa.weight",),
        "attn_kv_a_norm.weight": ("self_attn.kv_a_layernorm.weight",),
        "attn_kv_b.weight": ("self_attn.kv_b_proj.weight",),
        "attn_output.weight": ("self_attn.o_proj.weight",),
        "ffn_norm.weight": ("post_attention_layernorm.weight",),
        "ffn_gate_inp.weight": ("mlp.gate.weight",),
        "exp_probs_b.bias": ("mlp.gate.e_score_correction_bias",),
        "ffn_gate_shexp.weight": ("mlp.shared_experts.gate_proj.weight",),
        "ffn_up_shexp.weight": ("mlp.shared_experts.up_proj.weight",),
        "ffn_down_shexp.weight": ("mlp.shared_experts.down_proj.weight",),
        "nextn.enorm.weight": ("enorm.weight",),
        "nextn.hnorm.weight": ("hnorm.weight",),
        "nextn.eh_proj.weight": ("eh_proj.weight",),
        "nextn.shared_head_norm.weight": ("shared_head.norm.weight",),
    },
    experts=EXPERT_NAMES,
)


F = TypeVar("F", bound=Family)


@dataclass(frozen=True)
class LatentReader(Generic[F]):
    """Reads the checkpoints and the GGUF files of a family with latent attention.

    Attributes:
        architecture: `general.architecture` of its GGUF files.
        names: what its tensors are called.
        quantities: those of the language model's configuration, with or without a block for drafts.
        from_metadata: those of GGUF metadata, but for the words of the vocabulary, which are given.
        build: makes the graph.
    """

    architecture: str
    names: Names
    quantities: Callable[[Config, bool], F]
    from_metadata: Callable[[Config, int], F]
    build: Callable[[str, F, Source], Graph]

    def from_checkpoint(self, config: Config, tensors: Sequence[TensorInfo]) -> Graph:
        layers = text_section(config).integer("num_hidden_layers")
        drafts = [tensor.name for tensor in tensors if tensor.name.endswith(".eh_proj.weight")]
        there = len(drafts) == 1 and drafts[0].endswith(f"layers.{layers}.eh_proj.weight")
        return with_draft(there, partial(self._read_checkpoint, config, tensors))

    def from_gguf(self, metadata: Config, tensors: Sequence[TensorInfo]) -> Graph:
        catalogue, vocabulary = open_gguf(metadata, tensors)
        d = self.from_metadata(metadata, vocabulary)
        check(d, metadata.origin)
        graph = self.build(self.architecture, d, gguf_source(catalogue))
        for repeated in ("embed_tokens.", "shared_head_head."):  # which are the model's too
            catalogue.ignore(f"blk.{d.layers}.nextn.{repeated}")
        catalogue.finish()
        return graph

    def _read_checkpoint(self, config: Config, tensors: Sequence[TensorInfo], drafts: bool) -> Graph:
        """The language model of a checkpoint, whatever else it holds."""
        text = text_section(config)
        d = self.quantities(text, drafts)
        catalogue = catalogue_of(text if "quantization_config" in text else config, tensors)
        pictures = sum(map(catalogue.ignore, _PICTURES))
        found = CheckpointSource(catalogue, self.names, text.flag("tie_word_embeddings", default=False))
        graph = self.build(self.architecture, d, latent_source(found, d))
        notes = [f"left out the vision tower, {pictures} tensors: text alone is understood"] if pictures else []
        notes += [*_draft_notes(catalogue, d), *start_notes(graph), *catalogue.finish()]
        return replace(graph, notes=(*notes, *graph.notes))


def _draft_notes(catalogue: Catalogue, d: Family) -> list[str]:
    """What is left out behind the last layer: repetitions of embedding and head, or the whole."""
    blocks = [f"{prefix}layers.{d.layers}." for prefix in _PREFIXES]
    repeated = ("embed_tokens.", "shared_head.head.") if d.drafts else ("",)
    left = sum(catalogue.ignore(block + ending) for block in blocks for ending in repeated)
    if not left:
        return []
    if d.drafts:
        return ["the drafting block's embedding and head are left out: they repeat the model's"]
    return [f"{left} tensors of a drafting block (layer {d.layers}) are left out"]


def read_config(kind: type[F], config: Config, drafts: bool, **more: Any) -> F:
    """The quantities of a configuration of such a family, those that are its own given."""
    expect_all(config, IMPLEMENTED)
    heads, rope = config.integer("num_attention_heads"), rope_section(config)
    config.expect("num_key_value_heads", heads)
    d = kind.from_config(
        config,
        drafts=int(drafts),
        head_size=config.integer("qk_nope_head_dim") + config.integer("qk_rope_head_dim"),
        latent_epsilon=LATENT_EPSILON,
        rope_base=rope.number("rope_theta", default=config.number("rope_theta", default=1e4)),
        yarn=read_mscaled_yarn(rope),
        groups=config.integer("n_group"),
        groups_used=config.integer("topk_group"),
        router_scale=config.number("routed_scaling_factor"),
        normalized=config.flag("norm_topk_prob", default=True),
        **more,
    )
    check(d, config.origin)
    return d


def _read_config(config: Config, drafts: bool) -> Family:
    return read_config(Family, config, drafts)


def latent_source(source: Source, d: Family) -> Source:
    """Finds weights where one projection gives a head's key, then its value, of the latent: these apart, and the
    key's transposed."""
    key_size = d.head_size - d.rotary_size
    both_sizes = key_size + d.value_size

    @cache
    def both(name: str) -> Expression:
        found = source(name, (d.heads * both_sizes, d.latent_size))
        check_shape(found, (d.heads * both_sizes, d.latent_size))
        return found

    def find(name: str, shape: tuple[int, ...]) -> Expression:
        block, _, kind = name.rpartition(".attn_")
        if kind not in ("k_b.weight", "v_b.weight"):
            return source(name, shape)
        rows, starts = both(f"{block}.attn_kv_b.weight"), range(0, d.heads * both_sizes, both_sizes)
        if kind == "k_b.weight":
            return Stack(tuple(Transposed(Rows(rows, start, start + key_size)) for start in starts))
        return Stack(tuple(Rows(rows, start + key_size, start + both_sizes) for start in starts))

    return find


def start_notes(graph: Graph) -> list[str]:
    """What llama.cpp has to be told at every start, because it reads it from no file."""
    options = " ".join(start_options(graph))
    if not options:
        return []
    return [f"llama.cpp reads YaRN's limits from no file: start it with {options}, or long texts come out wrong"]


def read_metadata(kind: type[F], name: str, metadata: Config, vocabulary: int, **more: Any) -> F:
    """The quantities of the metadata of such a family's file, those that are its own given."""
    metadata.expect(f"{name}.nextn_predict_layers", 0, 1)
    drafts = metadata.integer(f"{name}.nextn_predict_layers", default=0)
    return kind.from_gguf(
        metadata,
        name,
        vocabulary=vocabulary,
        layers=metadata.integer(f"{name}.block_count") - drafts,
        latent_epsilon=metadata.number(f"{name}.attention.layer_norm_rms_epsilon"),
        yarn=yarn_from_gguf(metadata, name),
        **more,
    )


def _read_metadata(metadata: Config, vocabulary: int) -> Family:
    metadata.integer(f"{NAME}.expert_gating_func")  # without which llama.cpp takes softmax, as DeepSeek V2 has it
    return read_metadata(Family, NAME, metadata, vocabulary)


def unlike_epsilons(graph: Graph) -> dict[str, object]:
    """That llama.cpp has one epsilon for all norms, where that is to be seen."""
    attention, epsilon = first(graph, LatentAttention), graph.final_norm.epsilon
    latent = attention.key_value_norm.epsilon if attention else epsilon
    named = f"norms with an epsilon of {epsilon:g} (rms_norm_eps), but 1e-6 for latents"
    return {named: epsilon != latent and epsilon > _LARGEST_EPSILON}


def _gguf_metadata(graph: Graph) -> dict[str, Any]:
    """Raises BadInput for what llama.cpp would compute otherwise, or not load."""
    attention, layers = first(graph, LatentAttention), len(graph.layers)
    assert attention
    lite = layers in _LITE or (layers, graph.vocabulary_size) == _LITE_WITH_WORDS
    lite_queries = {f"{layers} layers and latent queries (q_lora_rank)": lite and attention.query_down}
    refuse_unlike(graph, lite_queries | unlike_epsilons(graph))
    return Family.metadata(graph)


_READER = LatentReader(NAME, NAMES, _read_config, _read_metadata, build)

ARCHITECTURE = Architecture(
    name=NAME,
    model_types=("deepseek_v3", "kimi_k2", "kimi_k25"),
    pre_tokenizer="deepseek-v3",
    from_checkpoint=_READER.from_checkpoint,
    from_gguf=_READER.from_gguf,
    gguf_metadata=_gguf_metadata,
    harmless=HARMLESS,
)
