"""What drafts tokens for DeepSeek V4: a block for multi-token prediction, or what the 0731 releases have (DSpark)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..errors import BadInput
from .catalogue import Catalogue
from .config import Config
from .deepseek_v4_blocks import NAME, STREAMS, BlockBuilder, Family, read_metadata
from .deepseek_v4_names import WHOLE_NAMES
from .expressions import Expression, TensorInfo
from .graph import BlockDraft, Graph, Prediction
from .shared import CheckpointSource, Source, gguf_source
from .weights import Role

BLOCKS = "dflash"  # GGUF's architecture of drafts that are blocks of tokens
_FIRST = {"fc.weight": "main_proj.weight", "enc.output_norm.weight": "main_norm.weight"}
_LAST = {
    "markov_w1.weight": "markov_head.markov_w1.weight",
    "markov_w2.weight": "markov_head.markov_w2.weight",
    "conf_proj.weight": "confidence_head.proj.weight",
}


@dataclass(frozen=True)
class _Blocks:
    """What tensors do not tell of a draft of blocks; `sources` are layers of the model, `rank` is the successors'."""

    sources: tuple[int, ...]
    mask: int
    size: int
    rank: int


def read_draft(
    model: Graph, d: Family, config: Config, source: CheckpointSource, tensors: Sequence[TensorInfo]
) -> Graph:
    """The draft beside a model in a checkpoint; configurations miscount its blocks, so tensors tell."""
    count = len({match[1] for tensor in tensors if (match := re.match(r"mtp\.(\d+)\.", tensor.name))})
    if "mtp.0.main_proj.weight" in source.catalogue:
        blocks = _Blocks(
            sources=_layers(config, "dspark_target_layer_ids", range(d.layers)),
            mask=config.integer("dspark_noise_token_id"),
            size=config.integer("dspark_block_size"),
            rank=config.integer("dspark_markov_rank"),
        )
        return _build_blocks(model, d, _checkpoint_source(source, 0, count), count, blocks)
    if count != 1:
        raise BadInput(f"{config.origin}: there are {count} draft blocks (mtp.*), expected 1, or mtp.0.main_proj")
    return _build_prediction(model, d, _checkpoint_source(source, d.layers, count))


def _layers(config: Config, key: str, expected: range) -> tuple[int, ...]:
    """Numbers of layers, however many."""
    listed = config.get(key)
    layers = config.integers(key, len(listed) if isinstance(listed, list) else 1)
    if not layers or not all(layer in expected for layer in layers):
        raise BadInput(f"{config.origin}: {key} is {listed}, expected layers from {expected[0]} to {expected[-1]}")
    return layers


def draft_from_gguf(metadata: Config, tensors: Sequence[TensorInfo], model: Graph) -> Graph:
    """A draft's file, of which embedding and head are the model's unless it has its own."""
    name, catalogue = metadata.text("general.architecture"), Catalogue(tensors, metadata.origin)
    if name not in (NAME, BLOCKS):
        raise BadInput(f"{metadata.origin}: general.architecture is {name}, expected {NAME} or {BLOCKS}: a draft's")
    drafts = metadata.integer(f"{name}.nextn_predict_layers", default=0)
    if name == NAME and not drafts:
        raise BadInput(
            f"{metadata.origin} holds layers and no draft: give the file that `convert --mtp` writes beside it"
        )
    d = read_metadata(metadata, name, model.vocabulary_size, drafts)
    if d.hidden != model.hidden_size:
        raise BadInput(f"{metadata.origin} drafts for a hidden size of {d.hidden}, the model's is {model.hidden_size}")
    metadata.expect(f"{name}.embedding_length_out", STREAMS * d.hidden)
    metadata.expect(f"{name}.attention.value_length", d.head_size)
    source = gguf_source(catalogue)
    if "token_embd.weight" in catalogue and "output.weight" in catalogue:
        whole = BlockBuilder(d, source).graph(name, ())
        model = replace(model, embedding=whole.embedding, final_norm=whole.final_norm, head=whole.head)
    if name == BLOCKS:
        draft = _build_blocks(model, d, source, d.layers, _blocks_of(metadata, tensors, len(model.layers)))
    else:
        draft = _build_prediction(model, d, source)
    catalogue.finish()
    return draft


def _blocks_of(metadata: Config, tensors: Sequence[TensorInfo], layers: int) -> _Blocks:
    """Of a file for a model of so many layers."""
    first = next((tensor for tensor in tensors if tensor.name == "markov_w1.weight"), None)
    if first is None:
        raise BadInput(f"{metadata.origin}: tensor markov_w1.weight is missing, the file is incomplete")
    inputs = _layers(metadata, f"{BLOCKS}.target_layers", range(1, layers + 1))
    return _Blocks(
        sources=tuple(layer - 1 for layer in inputs),
        mask=metadata.integer("tokenizer.ggml.mask_token_id"),
        size=metadata.integer(f"{BLOCKS}.block_size"),
        rank=first.shape[-1],
    )


def _checkpoint_source(source: CheckpointSource, first: int, blocks: int) -> Source:
    """Finds weights of blocks that are numbered from `first`."""
    whole = {name: f"mtp.{blocks - 1}.{found[0]}" for name, found in WHOLE_NAMES.items()}
    whole |= {name: f"mtp.0.{found}" for name, found in _FIRST.items()}
    whole |= {name: f"mtp.{blocks - 1}.{found}" for name, found in _LAST.items()}

    def find(name: str, shape: tuple[int, ...]) -> Expression:
        if name in whole:
            return source.take((whole[name],))
        _, block, kind = name.split(".", 2)
        return source.in_layer(f"mtp.{int(block) - first}.", kind, shape)

    return find


def _build_prediction(model: Graph, d: Family, source: Source) -> Graph:
    """The block for multi-token prediction, beside the model's embedding and head and the norm before that."""
    builder = BlockBuilder(d, source)
    nextn = f"blk.{d.layers}.nextn"
    prediction = Prediction(
        embedding_norm=builder.norm(f"{nextn}.enorm.weight", d.hidden),
        hidden_norm=builder.norm(f"{nextn}.hnorm.weight", d.hidden),
        projection=builder.weight(f"{nextn}.eh_proj.weight", Role.PREDICTION_INPUT, d.hidden, 2 * d.hidden),
        layer=builder.layer(d.layers, ratio=0),
        final_norm=builder.norm(f"{nextn}.shared_head_norm.weight", d.hidden),
        of_residual=True,
    )
    return replace(model, layers=(), predictions=(prediction,), residual=builder.residual(), draft=None)


def _build_blocks(model: Graph, d: Family, source: Source, count: int, blocks: _Blocks) -> Graph:
    """Layers with a window alone and routers that learned, which share embedding and head with the model."""
    builder = BlockBuilder(replace(d, layers=count, ratios=(0,) * count, hash_layers=0), source)
    successors = (d.vocabulary, blocks.rank)
    if blocks.mask >= d.vocabulary:
        raise BadInput(f"a draft's mask is token {blocks.mask}, expected one of the {d.vocabulary} of the vocabulary")
    return replace(
        model,
        architecture=BLOCKS,
        layers=tuple(builder.layer(index, ratio=0) for index in range(count)),
        final_norm=builder.norm("output_norm.weight", d.hidden),
        residual=builder.residual(),
        draft=None,
        notes=(),
        block=BlockDraft(
            sources=blocks.sources,
            mask=blocks.mask,
            size=blocks.size,
            projection=builder.weight("fc.weight", Role.PREDICTION_INPUT, d.hidden, len(blocks.sources) * d.hidden),
            norm=builder.norm("enc.output_norm.weight", d.hidden),
            before=builder.weight("markov_w1.weight", Role.SUCCESSOR, *successors),
            after=builder.weight("markov_w2.weight", Role.SUCCESSOR, *successors),
            confidence=builder.weight("conf_proj.weight", Role.CONFIDENCE, 1, d.hidden + blocks.rank),
        ),
    )


def draft_metadata(graph: Graph) -> dict[str, Any]:
    """The model's keys, with the draft's blocks in place of its layers, or after them: llama.cpp reads a block for
    multi-token prediction as a model whose other layers are elsewhere."""
    assert graph.draft
    values, block = Family.metadata(graph), graph.draft.block
    if block is None:
        drafts = len(graph.draft.predictions)
        return values | {
            f"{NAME}.attention.compress_ratios": values[f"{NAME}.attention.compress_ratios"] + [0] * drafts,
            f"{NAME}.block_count": len(graph.layers) + drafts,
            f"{NAME}.nextn_predict_layers": drafts,
        }
    del values[f"{NAME}.embedding_length_out"]
    count = len(graph.draft.layers)
    return {key.replace(NAME, BLOCKS, 1): value for key, value in values.items()} | {
        "general.architecture": BLOCKS,
        f"{BLOCKS}.attention.compress_ratios": [0] * count,
        f"{BLOCKS}.block_count": count,
        f"{BLOCKS}.hash_layer_count": 0,
        f"{BLOCKS}.block_size": block.size,
        f"{BLOCKS}.target_layers": [layer + 1 for layer in block.sources],
        "tokenizer.ggml.mask_token_id": block.mask,
    }
