"""What Qwen3-Next and Qwen3.5 have in common as files: names of tensors, the order of heads, layers, drafting block."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

from ..errors import BadInput
from .catalogue import Catalogue
from .config import Config
from .drafts import with_draft
from .expressions import Expression, NegativeExponential, OnePlus, Reshape, TensorInfo
from .graph import Graph
from .qwen_deltanet_blocks import INTERVAL, KEY_EPSILON, SECTIONS, Family, build, check
from .rearranged import ColumnRuns, RowRuns, Run
from .shared import (
    ATTENTION_NAMES,
    DENSE_NAMES,
    EXPERT_NAMES,
    CheckpointSource,
    Names,
    Source,
    catalogue_of,
    gguf_source,
    open_gguf,
    read_yarn,
    rope_section,
)
from .weights import check_shape

_PREFIXES = ("model.language_model.", "model.")  # beside a vision tower, and alone
_VISION = ("model.visual.", "visual.")
_DRAFTS = "mtp."
_FUSED = "ssm_in.weight"  # query, key, value and gate of each key head in turn


def _convolution(catalogue: Catalogue, name: str, shape: tuple[int, ...]) -> Reshape:
    return Reshape(catalogue.plain(name).tensor, shape)


def _decay(catalogue: Catalogue, name: str, shape: tuple[int, ...]) -> NegativeExponential:
    return NegativeExponential(catalogue.plain(name))


def _whole(*names: str) -> tuple[str, ...]:
    return tuple(prefix + name for name in names for prefix in _PREFIXES)


_ATTENTION_NAMES = {name: found for name, found in ATTENTION_NAMES.items() if name != "ffn_norm.weight"}
NAMES = Names(
    layers=_whole("layers.{}."),
    whole={
        "token_embd.weight": _whole("embed_tokens.weight"),
        "output_norm.weight": _whole("norm.weight"),
        "output.weight": ("lm_head.weight",),
    },
    layer=_ATTENTION_NAMES
    | DENSE_NAMES
    | {
        "post_attention_norm.weight": ("post_attention_layernorm.weight",),
        _FUSED: ("linear_attn.in_proj_qkvz.weight",),
        "attn_qkv.weight": ("linear_attn.in_proj_qkv.weight",),
        "attn_gate.weight": ("linear_attn.in_proj_z.weight",),
        "ssm_ba.weight": ("linear_attn.in_proj_ba.weight",),
        "ssm_beta.weight": ("linear_attn.in_proj_b.weight",),
        "ssm_alpha.weight": ("linear_attn.in_proj_a.weight",),
        "ssm_conv1d.weight": ("linear_attn.conv1d.weight",),
        "ssm_dt.bias": ("linear_attn.dt_bias",),
        "ssm_a": ("linear_attn.A_log",),
        "ssm_norm.weight": ("linear_attn.norm.weight",),
        "ssm_out.weight": ("linear_attn.out_proj.weight",),
        "ffn_gate_inp.weight": ("mlp.gate.weight",),
        "ffn_gate_inp_shexp.weight": ("mlp.shared_expert_gate.weight",),
        "ffn_gate_shexp.weight": ("mlp.shared_expert.gate_proj.weight",),
        "ffn_up_shexp.weight": ("mlp.shared_expert.up_proj.weight",),
        "ffn_down_shexp.weight": ("mlp.shared_expert.down_proj.weight",),
        "nextn.eh_proj.weight": ("fc.weight",),
        "nextn.enorm.weight": ("pre_fc_norm_embedding.weight",),
        "nextn.hnorm.weight": ("pre_fc_norm_hidden.weight",),
        "nextn.shared_head_norm.weight": ("norm.weight",),
    },
    experts=EXPERT_NAMES,
    special={"ssm_conv1d.weight": _convolution, "ssm_a": _decay},
)


def quantities(text: Config, **given: Any) -> Family:
    """Those of a configuration; what is `given` differs from family to family."""
    rope = rope_section(text)
    yarn = read_yarn(rope, text.integer("max_position_embeddings"))
    part = rope.number("partial_rotary_factor", default=text.number("partial_rotary_factor", default=0.25))
    return Family.from_config(
        text,
        recurrent=_recurrent_layers(text),
        key_epsilon=KEY_EPSILON,
        rotary_size=int(part * text.integer("head_dim")),
        rope_base=rope.number("rope_theta", default=text.number("rope_theta", default=1e4)),
        scaling="yarn" if yarn else "none",
        yarn_factor=yarn.factor if yarn else 1.0,
        yarn_context=yarn.original_context if yarn else 0,
        **given,
    )


def _recurrent_layers(config: Config) -> tuple[bool, ...]:
    """As they are listed, or all but every so many."""
    layers, interval = config.integer("num_hidden_layers"), config.integer("full_attention_interval", default=INTERVAL)
    listed = config.marked("layer_types", layers, "linear_attention", "full_attention")
    return listed or tuple(bool((layer + 1) % interval) for layer in range(layers))


def read_checkpoint(
    config: Config, tensors: Sequence[TensorInfo], name: str, read: Callable[[Config, bool], Family], fused: bool
) -> Graph:
    """The graph, with the drafting block as long as that is whole: it is not needed to run the model.

    Args:
        name: of GGUF's architecture.
        read: gives the quantities of a configuration, with a drafting block or without.
        fused: whether projections are, see `build`.
    """

    def graph(drafts: bool) -> Graph:
        catalogue = catalogue_of(config, tensors)
        d = read(config, drafts)
        check(d, config.origin)
        tied = config.flag("tie_word_embeddings", default=False)
        made = build(name, d, _checkpoint_source(CheckpointSource(catalogue, NAMES, tied), d, fused), fused)
        return replace(made, notes=(*_left_out(catalogue, drafts), *catalogue.finish()))

    return with_draft(any(tensor.name.startswith(_DRAFTS) for tensor in tensors), graph)


def _left_out(catalogue: Catalogue, drafts: bool) -> list[str]:
    """What is not of the language model, in a line each."""
    vision = sum(catalogue.ignore(prefix) for prefix in _VISION)
    notes = [f"{vision} tensors of the vision tower are left out: the model reads text alone"] if vision else []
    if not drafts:
        catalogue.ignore(_DRAFTS)
    return notes


def _checkpoint_source(source: CheckpointSource, d: Family, fused: bool) -> Source:
    """Finds the weights of a checkpoint in the form that engines want."""
    forms = _fused_forms(d) if fused else _tiled_forms(d)

    def stored(name: str, shape: tuple[int, ...]) -> Expression:
        layer, _, kind = name.removeprefix("blk.").partition(".")
        if layer != str(len(d.recurrent)):
            return source(name, shape)
        return source.in_layer(_DRAFTS if kind.startswith("nextn.") else f"{_DRAFTS}layers.0.", kind, shape)

    @cache
    def all_of_one(name: str, shape: tuple[int, ...]) -> Expression:
        """What is put in another order, of the shape that this presumes."""
        found = stored(name, shape)
        check_shape(found, shape)
        return found

    def find(name: str, shape: tuple[int, ...]) -> Expression:
        layer, _, kind = name.removeprefix("blk.").partition(".")
        if kind in forms:
            return forms[kind](
                all_of_one(f"blk.{layer}.{_FUSED}", _fused_shape(d)) if fused else all_of_one(name, shape)
            )
        found = stored(name, shape)
        zero_centered = name.endswith("norm.weight") and kind != "ssm_norm.weight"
        return OnePlus(found) if zero_centered else found

    return find


Forms = Mapping[str, Callable[[Expression], Expression]]  # by GGUF name within a layer


def _fused_forms(d: Family) -> Forms:
    """Rows are those of one key head after another: its query, its key, the values of its heads, their gates."""
    key, value = d.key_size, d.delta_heads // d.delta_key_heads * d.value_size
    ends = [0, key, 2 * key, 2 * key + value, 2 * key + 2 * value]

    def runs(part: int) -> list[Run]:
        starts = range(0, d.delta_key_heads * ends[-1], ends[-1])
        return [(start + ends[part], start + ends[part + 1]) for start in starts]

    return {
        "attn_qkv.weight": lambda source: RowRuns(source, (*runs(0), *runs(1), *runs(2))),
        "attn_gate.weight": lambda source: RowRuns(source, tuple(runs(3))),
    }


def _fused_shape(d: Family) -> tuple[int, int]:
    return 2 * (d.delta_key_heads * d.key_size + d.delta_heads * d.value_size), d.hidden


def _tiled_forms(d: Family) -> Forms:
    """The heads of a key head, which checkpoints have side by side, come `key heads` apart in llama.cpp."""
    times, keys = d.delta_heads // d.delta_key_heads, 2 * d.delta_key_heads * d.key_size
    order = [group * times + head for head in range(times) for group in range(d.delta_key_heads)]
    if order == sorted(order):
        return {}

    def heads(size: int, before: int = 0) -> tuple[Run, ...]:
        runs = ((before + head * size, before + (head + 1) * size) for head in order)
        return ((0, before), *runs) if before else tuple(runs)

    def values(source: Expression) -> RowRuns:
        return RowRuns(source, heads(d.value_size, keys))

    def scalars(source: Expression) -> RowRuns:
        return RowRuns(source, heads(1))

    return {
        "attn_qkv.weight": values,
        "ssm_conv1d.weight": values,
        "attn_gate.weight": lambda source: RowRuns(source, heads(d.value_size)),
        **dict.fromkeys(("ssm_beta.weight", "ssm_alpha.weight", "ssm_a", "ssm_dt.bias"), scalars),
        "ssm_out.weight": lambda source: ColumnRuns(source, heads(d.value_size)),
    }


def read_gguf(
    metadata: Config, tensors: Sequence[TensorInfo], name: str, fused: bool, absent: Mapping[str, Any]
) -> Graph:
    """The graph of a GGUF file; `absent` are the quantities that its architecture does not have."""
    catalogue, vocabulary = open_gguf(metadata, tensors)
    metadata.expect(f"{name}.rope.scaling.type", "none", "yarn")
    metadata.expect(f"{name}.nextn_predict_layers", 0, 1)
    drafts = metadata.integer(f"{name}.nextn_predict_layers", default=0)
    layers = metadata.integer(f"{name}.block_count") - drafts
    heads = metadata.integer(f"{name}.ssm.time_step_rank")
    d = Family.from_gguf(
        metadata,
        name,
        vocabulary=vocabulary,
        recurrent=_listed_layers(metadata, name, layers),
        key_epsilon=metadata.number(f"{name}.attention.layer_norm_rms_epsilon"),
        sections=() if fused else metadata.integers(f"{name}.rope.dimension_sections", SECTIONS)[:3],
        value_size=metadata.integer(f"{name}.ssm.inner_size") // heads,
        **{"normalized": True, **absent},
    )
    check(d, metadata.origin)
    graph = build(name, d, _gguf_source(catalogue, d), fused)
    catalogue.finish()
    return graph


def _gguf_source(catalogue: Catalogue, d: Family) -> Source:
    """Finds the weights of a GGUF file, also where projections are one tensor, as llama.cpp first had Qwen3-Next."""
    source, forms = gguf_source(catalogue), _fused_forms(d)

    def find(name: str, shape: tuple[int, ...]) -> Expression:
        block, _, kind = name.rpartition(".weight")[0].rpartition(".")
        whole = f"{block}.{_FUSED}"
        if f"{kind}.weight" not in forms or whole not in catalogue:
            return source(name, shape)
        found = source(whole, _fused_shape(d))
        check_shape(found, _fused_shape(d))
        return forms[f"{kind}.weight"](found)

    return find


def _listed_layers(metadata: Config, name: str, layers: int) -> tuple[bool, ...]:
    interval = metadata.integer(f"{name}.full_attention_interval", default=INTERVAL)
    listed = metadata.get(f"{name}.attention.recurrent_layers")
    if listed is None:
        return tuple(bool((layer + 1) % interval) for layer in range(layers))
    if not isinstance(listed, list) or len(listed) < layers or not all(type(entry) is bool for entry in listed):
        raise BadInput(
            f"{metadata.origin}: {name}.attention.recurrent_layers is {str(listed)[:60]}, expected true or false for "
            f"each of {layers} layers"
        )
    return tuple(listed[:layers])
