"""The complete tensor lists of published Qwen3-Next and Qwen3.5 checkpoints: names, shapes and dtypes, no numbers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from math import prod
from typing import Any

import real_models
from moecast.archs.expressions import TensorInfo
from real_qwen3 import ENCODINGS

_BYTES = {"F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "U8": 1, "I32": 4}
_Stored = Iterator[tuple[str, tuple[int, ...], str]]


@dataclass(frozen=True)
class Release:
    """One published checkpoint: its configuration in tests/data, and in which encoding it holds what.

    `experts` and those of the drafting block may be "fused" into one tensor. `scalars` is the dtype of decays and of
    the norm of heads.
    """

    config: str
    mixers: str = "BF16"
    experts: str = "BF16"
    shared: str = "BF16"
    head: str = "BF16"
    scalars: str = "BF16"
    drafts: str = "BF16"
    draft_mixers: str = "BF16"


_FP8 = {"mixers": "FP8", "experts": "FP8", "shared": "FP8", "drafts": "FP8", "draft_mixers": "FP8"}
RELEASES = {
    "Qwen3-Next": Release("qwen3-next-80b-a3b"),
    "Qwen3-Next FP8": Release("qwen3-next-80b-a3b", **_FP8),
    "Qwen3.5-27B": Release("qwen3.5-27b", scalars="F32"),
    "Qwen3.5-35B-A3B": Release("qwen3.5-35b-a3b", experts="fused", scalars="F32"),
    "Qwen3.5-35B-A3B GPTQ": Release("qwen3.5-35b-a3b", experts="GPTQ", scalars="F32"),
    "Qwen3.5-122B-A10B": Release("qwen3.5-122b-a10b", experts="fused", scalars="F32"),
    "Qwen3.5-397B-A17B": Release("qwen3.5-397b-a17b", experts="fused", scalars="F32"),
    "Qwen3.5-397B-A17B NVFP4": Release("qwen3.5-397b-a17b", experts="NVFP4", scalars="F32"),
    "Qwen3.6-35B-A3B": Release("qwen3.5-35b-a3b", experts="fused", drafts="fused"),
    "Qwen3.6-35B-A3B FP8": Release("qwen3.5-35b-a3b", **_FP8),
    "Qwen3.6-35B-A3B NVFP4": Release(
        "qwen3.6-35b-a3b-nvfp4", mixers="FP8 whole", experts="NVFP4", shared="NVFP4", head="NVFP4"
    ),
    "Qwen3.6-27B NVFP4": Release("qwen3.6-27b-nvfp4", mixers="FP8 whole", shared="NVFP4", head="NVFP4"),
}


def _fp8_whole(module: str, rows: int, columns: int) -> _Stored:
    """ModelOpt's, with one scale for all."""
    yield f"{module}.weight", (rows, columns), "F8_E4M3"
    yield f"{module}.weight_scale", (), "F32"
    yield f"{module}.input_scale", (), "F32"


_ENCODINGS = ENCODINGS | {"FP8 whole": _fp8_whole}


@cache
def tensors(name: str) -> tuple[TensorInfo, ...]:
    release = RELEASES[name]
    config = real_models.config(release.config)._values
    return tuple(
        TensorInfo(tensor, dtype, shape, "hub", 0, prod(shape) * _BYTES[dtype])
        for tensor, shape, dtype in _stored(release, config)
    )


def _stored(release: Release, config: Any) -> _Stored:
    text, prefix = config, "model."
    if "text_config" in config:
        text, prefix = config["text_config"], "model.language_model."
        yield from _vision(config["vision_config"])
    hidden, layers = text["hidden_size"], text["num_hidden_layers"]
    yield f"{prefix}embed_tokens.weight", (text["vocab_size"], hidden), "BF16"
    yield f"{prefix}norm.weight", (hidden,), "BF16"
    yield from _ENCODINGS[release.head]("lm_head", text["vocab_size"], hidden)
    for layer in range(layers):
        blk = f"{prefix}layers.{layer}"
        if (layer + 1) % text["full_attention_interval"]:
            yield from _delta_net(f"{blk}.linear_attn", text, release)
        else:
            yield from _attention(f"{blk}.self_attn", text, release.mixers)
        yield from _rest(blk, text, release.experts, release.shared)
    yield from _attention("mtp.layers.0.self_attn", text, release.draft_mixers)
    shared = release.drafts if release.drafts != "fused" else "BF16"
    yield from _rest("mtp.layers.0", text, release.drafts, shared)
    for norm in ("norm", "pre_fc_norm_embedding", "pre_fc_norm_hidden"):
        yield f"mtp.{norm}.weight", (hidden,), "BF16"
    yield "mtp.fc.weight", (hidden, 2 * hidden), "BF16"


def _attention(module: str, text: Any, encoding: str) -> _Stored:
    hidden, size = text["hidden_size"], text["head_dim"]
    queries, keys = text["num_attention_heads"] * size, text["num_key_value_heads"] * size
    shapes = {"q": (2 * queries, hidden), "k": (keys, hidden), "v": (keys, hidden), "o": (hidden, queries)}
    for name, shape in shapes.items():
        yield from _ENCODINGS[encoding](f"{module}.{name}_proj", *shape)
    for name in ("q", "k"):
        yield f"{module}.{name}_norm.weight", (size,), "BF16"


def _delta_net(module: str, text: Any, release: Release) -> _Stored:
    hidden, heads, encoded = text["hidden_size"], text["linear_num_value_heads"], _ENCODINGS[release.mixers]
    keys = text["linear_num_key_heads"] * text["linear_key_head_dim"]
    values = heads * text["linear_value_head_dim"]
    yield f"{module}.A_log", (heads,), release.scalars
    yield f"{module}.dt_bias", (heads,), "BF16"
    yield f"{module}.conv1d.weight", (2 * keys + values, 1, text["linear_conv_kernel_dim"]), "BF16"
    yield f"{module}.norm.weight", (text["linear_value_head_dim"],), release.scalars
    yield from encoded(f"{module}.out_proj", hidden, values)
    if text["model_type"] == "qwen3_next":
        yield from encoded(f"{module}.in_proj_qkvz", 2 * keys + 2 * values, hidden)
        yield f"{module}.in_proj_ba.weight", (2 * heads, hidden), "BF16"
        return
    yield from encoded(f"{module}.in_proj_qkv", 2 * keys + values, hidden)
    yield from encoded(f"{module}.in_proj_z", values, hidden)
    for name in ("a", "b"):
        yield f"{module}.in_proj_{name}.weight", (heads, hidden), "BF16"


def _rest(blk: str, text: Any, experts: str, shared: str) -> _Stored:
    """Norms, and experts or a dense layer."""
    hidden, count = text["hidden_size"], text.get("num_experts", 0)
    for norm in ("input_layernorm", "post_attention_layernorm"):
        yield f"{blk}.{norm}.weight", (hidden,), "BF16"
    if not count:
        yield from _swiglu(f"{blk}.mlp", hidden, text["intermediate_size"], shared)
        return
    size = text["moe_intermediate_size"]
    yield f"{blk}.mlp.gate.weight", (count, hidden), "BF16"
    yield f"{blk}.mlp.shared_expert_gate.weight", (1, hidden), "BF16"
    yield from _swiglu(f"{blk}.mlp.shared_expert", hidden, text["shared_expert_intermediate_size"], shared)
    if experts == "fused":
        yield f"{blk}.mlp.experts.gate_up_proj", (count, 2 * size, hidden), "BF16"
        yield f"{blk}.mlp.experts.down_proj", (count, hidden, size), "BF16"
        return
    for expert in range(count):
        yield from _swiglu(f"{blk}.mlp.experts.{expert}", hidden, size, experts)


def _swiglu(module: str, hidden: int, size: int, encoding: str) -> _Stored:
    for name, rows, columns in (("gate", size, hidden), ("up", size, hidden), ("down", hidden, size)):
        yield from _ENCODINGS[encoding](f"{module}.{name}_proj", rows, columns)


def _vision(vision: Any) -> _Stored:
    hidden, inner, patch = vision["hidden_size"], vision["intermediate_size"], vision["patch_size"]
    merged = hidden * vision["spatial_merge_size"] ** 2
    first = (hidden, vision["in_channels"], vision["temporal_patch_size"], patch, patch)
    shapes: dict[str, tuple[int, ...]] = {"patch_embed.proj": first, "merger.norm": (hidden,)}
    shapes |= {"merger.linear_fc1": (merged, merged), "merger.linear_fc2": (vision["out_hidden_size"], merged)}
    for block in range(vision["depth"]):
        shapes |= {f"blocks.{block}.{norm}": (hidden,) for norm in ("norm1", "norm2")}
        shapes |= {f"blocks.{block}.attn.qkv": (3 * hidden, hidden), f"blocks.{block}.attn.proj": (hidden, hidden)}
        shapes |= {f"blocks.{block}.mlp.linear_fc1": (inner, hidden), f"blocks.{block}.mlp.linear_fc2": (hidden, inner)}
    yield "model.visual.pos_embed.weight", (vision["num_position_embeddings"], hidden), "BF16"
    for name, shape in shapes.items():
        yield f"model.visual.{name}.weight", shape, "BF16"
        yield f"model.visual.{name}.bias", shape[:1], "BF16"
