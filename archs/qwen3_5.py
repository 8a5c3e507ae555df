"""Qwen3.5 and 3.6: Gated DeltaNet, every fourth layer gated attention; mixtures (35B-A3B, 397B) and dense (27B)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from ..errors import BadInput
from .architecture import Architecture
from .config import Config
from .expressions import TensorInfo
from .graph import Graph
from .qwen_deltanet import quantities, read_checkpoint, read_gguf
from .qwen_deltanet_blocks import WITHOUT_DENSE, WITHOUT_EXPERTS, Family, gguf_metadata
from .shared import expect_all, rope_section, text_section

MIXTURE_NAME, DENSE_NAME = "qwen35moe", "qwen35"
_IMPLEMENTED: Mapping[str, Sequence[object]] = {
    "hidden_act": ["silu"],
    "attention_bias": [False],
    "attn_output_gate": [True],
    "output_gate_type": ["swish", "silu"],  # another name of the same
    "mlp_only_layers": [[]],
    "norm_topk_prob": [True],
    "mtp_use_dedicated_embeddings": [False],
    "mtp_num_hidden_layers": [0, 1],
    "mamba_ssm_dtype": ["float32"],
}
_HARMLESS = (
    *("vision_config", "image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id"),
    *("language_model_only", "tie_word_embeddings"),  # of what stands outside counts
    "partial_rotary_factor",  # repeats what the rotary settings say
)
_HARMLESS_METADATA = ("vocab_size", "feed_forward_length")
_SECTIONS = [11, 11, 10]


def _read_config(config: Config, drafts: bool, dense: bool) -> Family:
    text = text_section(config)
    expect_all(text, _IMPLEMENTED)
    rope = rope_section(text)
    rope.expect("mrope_interleaved", True)
    sections = _SECTIONS if rope.get("mrope_section") is None else rope.get("mrope_section")
    if not isinstance(sections, list) or len(sections) != 3 or not all(type(size) is int for size in sections):
        raise BadInput(f"{rope.origin}: mrope_section is {sections!r}, expected three whole numbers")
    absent = WITHOUT_EXPERTS if dense else WITHOUT_DENSE | {"normalized": True}
    return quantities(text, sections=tuple(sections), drafts=int(drafts), **absent)


def _mixture(config: Config, tensors: Sequence[TensorInfo]) -> Graph:
    return read_checkpoint(
        config, tensors, MIXTURE_NAME, lambda config, drafts: _read_config(config, drafts, dense=False), fused=False
    )


def _dense(config: Config, tensors: Sequence[TensorInfo]) -> Graph:
    return read_checkpoint(
        config, tensors, DENSE_NAME, lambda config, drafts: _read_config(config, drafts, dense=True), fused=False
    )


MIXTURE = Architecture(
    name=MIXTURE_NAME,
    model_types=("qwen3_5_moe", "qwen3_5_moe_text"),
    example="qwen3.5-tiny",
    pre_tokenizer="qwen35",
    from_checkpoint=_mixture,
    from_gguf=lambda metadata, tensors: read_gguf(metadata, tensors, MIXTURE_NAME, False, WITHOUT_DENSE),
    gguf_metadata=gguf_metadata,
    harmless=_HARMLESS,
    harmless_metadata=_HARMLESS_METADATA,
)
DENSE = replace(
    MIXTURE,
    name=DENSE_NAME,
    model_types=("qwen3_5", "qwen3_5_text"),
    example=None,
    from_checkpoint=_dense,
    from_gguf=lambda metadata, tensors: read_gguf(metadata, tensors, DENSE_NAME, False, WITHOUT_EXPERTS),
    harmless_metadata=("vocab_size",),
)
