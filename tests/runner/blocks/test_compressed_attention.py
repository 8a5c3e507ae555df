"""Compressor, indexer and the attention that uses them, against transformers' modules of DeepSeek V4."""

from __future__ import annotations

from typing import Any

import deepseek_checkpoints
import pytest
import torch
from block_weights import BlockWeights, causal_mask, in_pieces, modules_of, states
from deepseek_checkpoints import DEEPSEEK
from forward import relative_error
from moecast.archs.graph import CompressedAttention, Compressor, EntryIndexer, Rope, Yarn
from moecast.archs.weights import Role
from moecast.runner.blocks.compressed_attention import (
    CompressedAttentionMixer,
    CompressorMixer,
    CompressorState,
)
from moecast.runner.blocks.indexer import IndexerMixer, only
from torch import Tensor

pytestmark = pytest.mark.numeric

TOKENS = 400  # three entries of 128, a hundred of 4 of which the indexer leaves 16
LAYERS = {"window": 0, "overlapping": 1, "heavily compressed": 2}
ROPE = Rope(DEEPSEEK["qk_rope_head_dim"], DEEPSEEK["rope_theta"], interleaved=True, last=True)
YARN = Yarn(4, DEEPSEEK["rope_scaling"]["original_max_position_embeddings"], fast=32, slow=1)
COMPRESSED_ROPE = Rope(ROPE.size, DEEPSEEK["compress_rope_theta"], interleaved=True, last=True, yarn=YARN)


@pytest.fixture(scope="module")
def model() -> Any:
    return deepseek_checkpoints.deepseek_model()


@pytest.fixture(scope="module")
def inputs() -> Tensor:
    return states(TOKENS, DEEPSEEK["hidden_size"])


def _compressor(weights: BlockWeights, module: Any) -> Compressor:
    return Compressor(
        ratio=module.compress_rate,
        overlaps=module.compress_rate == 4,
        value=weights.add(module.kv_proj.weight),
        gate=weights.add(module.gate_proj.weight),
        position=weights.add(module.position_bias, Role.COMPRESSOR_POSITION),
        norm=weights.norm(module.kv_norm),
        rope=COMPRESSED_ROPE,
    )


def _indexer(weights: BlockWeights, module: Any) -> EntryIndexer:
    return EntryIndexer(
        heads=module.num_heads,
        head_size=module.head_dim,
        top_k=module.index_topk,
        query=weights.add(module.q_b_proj.weight),
        head_weight=weights.add(module.scorer.weights_proj.weight, Role.INDEXER_HEADS),
        rope=COMPRESSED_ROPE,
        compressor=_compressor(weights, module),
    )


def _attention(weights: BlockWeights, module: Any) -> CompressedAttention:
    compressor = module.compressor
    return CompressedAttention(
        heads=module.num_heads,
        head_size=module.head_dim,
        window=module.sliding_window,
        groups=module.o_a_proj.n_groups,
        query_down=weights.add(module.q_a_proj.weight),
        query_norm=weights.norm(module.q_a_norm),
        query_up=weights.add(module.q_b_proj.weight),
        key_value=weights.add(module.kv_proj.weight),
        key_value_norm=weights.norm(module.kv_norm),
        sink=weights.add(module.sinks, Role.ATTENTION_SINK),
        output_down=weights.add(module.o_a_proj.weight),
        output_up=weights.add(module.o_b_proj.weight),
        rope=COMPRESSED_ROPE if compressor else ROPE,
        compressor=_compressor(weights, compressor) if compressor else None,
        indexer=_indexer(weights, compressor.indexer) if hasattr(compressor, "indexer") else None,
    )


def _entries(mixer: CompressorMixer, inputs: Tensor, sizes: list[int]) -> CompressorState:
    memory = mixer.initial_state()
    for part in inputs.split(sizes):
        memory = mixer(part, memory)
    return memory


@pytest.mark.parametrize("sizes", [[TOKENS], [1, 2, 126, 3, 130, 138]], ids=["whole", "pieces"])
@pytest.mark.parametrize("kind", ["DeepseekV4CSACompressor", "DeepseekV4HCACompressor"])
def test_entries_are_those_of_transformers(model: Any, inputs: Tensor, kind: str, sizes: list[int]) -> None:
    module, weights = modules_of(model, kind)[0], BlockWeights()
    latent = torch.zeros(1, TOKENS, DEEPSEEK["q_lora_rank"])  # the indexer's, which says nothing of the entries
    with torch.no_grad():
        expected, _ = module(inputs[None], latent, torch.arange(TOKENS)[None], None, 0)
    found = _entries(CompressorMixer(_compressor(weights, module), weights), inputs, sizes).entries
    assert len(found) == TOKENS // module.compress_rate
    assert relative_error(found, expected[0, 0]) < 3e-6


def test_indexer_chooses_as_that_of_transformers(model: Any, inputs: Tensor) -> None:
    module, weights = modules_of(model, "DeepseekV4Indexer")[0], BlockWeights()
    positions, latent = torch.arange(TOKENS), states(TOKENS, DEEPSEEK["q_lora_rank"], seed=1)
    with torch.no_grad():
        chosen = module(inputs[None], latent[None], positions[None], None, 0)[0]
    indexer = _indexer(weights, module)
    keys = _entries(CompressorMixer(indexer.compressor, weights), inputs, [TOKENS]).entries
    complete = (positions[:, None] + 1) // module.compress_rate > torch.arange(len(keys))
    found = only(IndexerMixer(indexer, weights).best(inputs, latent, positions, keys, complete), complete)
    # Theirs are indices, -1 where there are fewer entries than it may choose.
    expected = torch.zeros(TOKENS, len(keys) + 1, dtype=torch.bool).scatter(1, chosen % (len(keys) + 1), True)
    assert torch.equal(found, expected[:, :-1])
    assert int(found[-1].sum()) == module.index_topk < len(keys)


@pytest.mark.parametrize("sizes", [[TOKENS], [1, 2, 126, 3, 130, 138], [TOKENS - 10, *[1] * 10]],
                         ids=["whole", "pieces", "steps"])  # fmt: skip
@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
def test_output_is_that_of_transformers(model: Any, inputs: Tensor, layer: int, sizes: list[int]) -> None:
    module, weights = model.model.layers[layer].self_attn, BlockWeights()
    positions = torch.arange(TOKENS)[None]
    turned = {kind: model.model.rotary_emb(inputs[None], positions, layer_type=kind) for kind in ("main", "compress")}
    with torch.no_grad():
        expected, _ = module(inputs[None], turned, positions, causal_mask(TOKENS, module.sliding_window))
    mixer = CompressedAttentionMixer(_attention(weights, module), weights)
    assert relative_error(in_pieces(mixer, inputs, sizes), expected[0]) < 1e-5
