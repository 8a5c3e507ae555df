"""Qwen3-Next (80B-A3B, Coder-Next): Gated DeltaNet with fused projections, every fourth layer gated attention."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from .architecture import Architecture
from .config import Config
from .expressions import TensorInfo
from .graph import Graph
from .qwen_deltanet import quantities, read_checkpoint, read_gguf
from .qwen_deltanet_blocks import WITHOUT_DENSE, Family, gguf_metadata
from .shared import expect_all

NAME = "qwen3next"
_IMPLEMENTED: Mapping[str, Sequence[object]] = {
    "hidden_act": ["silu"],
    "attention_bias": [False],
    "use_sliding_window": [False],
    "decoder_sparse_step": [1],
    "mlp_only_layers": [[]],
}
_HARMLESS = (
    "intermediate_size",  # of dense layers, which there are none of
    "tie_word_embeddings",
)
_HARMLESS_METADATA = ("vocab_size", "feed_forward_length")


def _read_config(config: Config, drafts: bool) -> Family:
    expect_all(config, _IMPLEMENTED)
    return quantities(config, sections=(), drafts=int(drafts), **WITHOUT_DENSE)


def _from_checkpoint(config: Config, tensors: Sequence[TensorInfo]) -> Graph:
    return read_checkpoint(config, tensors, NAME, _read_config, fused=True)


def _from_gguf(metadata: Config, tensors: Sequence[TensorInfo]) -> Graph:
    return read_gguf(metadata, tensors, NAME, fused=True, absent=WITHOUT_DENSE)


ARCHITECTURE = Architecture(
    name=NAME,
    model_types=("qwen3_next",),
    pre_tokenizer="qwen2",
    from_checkpoint=_from_checkpoint,
    from_gguf=_from_gguf,
    gguf_metadata=gguf_metadata,
    harmless=_HARMLESS,
    harmless_metadata=_HARMLESS_METADATA,
)
