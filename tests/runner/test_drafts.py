"""What multi-token prediction drafts: llama.cpp's numbers, token after token, from the hidden states of the model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import deepseek_checkpoints
import deltanet_checkpoints as deltanet
import llama
import llama_drafts
import nemotron_checkpoints as nemotron
import pytest
import torch
from conversions import convert
from forward import random_tokens, relative_error
from moecast.runner.activations import Workspace
from moecast.runner.block_drafts import BlockDrafts, Features
from moecast.runner.drafts import MultiTokenPrediction, most_probable
from moecast.runner.stream import Stream
from moecast.runner.weights import ModelWeights
from moecast.sources.model import Model, open_draft, open_model
from torch import Tensor

pytestmark = pytest.mark.numeric

STEPS = 3
TOKENS = random_tokens(2, 100)  # more than DeepSeek's window
PLACES = [1, 40, 41, 99]


def _deltanet(family: str) -> Callable[[Path], object]:
    return lambda folder: deltanet.save_published(folder, deltanet.model_of(family))


def _nemotron(folder: Path) -> None:
    model = nemotron.nemotron_model(**nemotron.LATENT)
    nemotron.save_nemotron(folder, model)
    nemotron.add_drafting_block(folder, model)
    nemotron.edit(folder, num_nextn_predict_layers=1, mtp_hybrid_override_pattern="*E")


def _deepseek(folder: Path) -> None:
    deepseek_checkpoints.save_deepseek_hub(folder, deepseek_checkpoints.deepseek_model())
    deepseek_checkpoints.add_draft(folder)


def _blocks(folder: Path) -> None:
    deepseek_checkpoints.save_deepseek_hub(folder, deepseek_checkpoints.deepseek_model())
    deepseek_checkpoints.add_blocks(folder)


CHECKPOINTS: dict[str, Callable[[Path], object]] = {
    "Qwen3-Next": _deltanet("qwen3_next"),
    "Qwen3.5": _deltanet("qwen3_5_moe"),
    "Qwen3.5, dense": _deltanet("qwen3_5"),
    "Nemotron 3": _nemotron,
    "DeepSeek V4": _deepseek,
    "DeepSeek V4 with DSpark": _blocks,
}


@pytest.mark.parametrize("save", CHECKPOINTS.values(), ids=CHECKPOINTS)
def test_drafts_are_llamas(save: Callable[[Path], object], tmp_path: Path) -> None:
    """From a checkpoint and from its files, at all places of two texts at once."""
    save(tmp_path / "model")
    files = convert(tmp_path / "model", tmp_path, "F32", calibration=None, verify=False, mtp=True).files
    checkpoint, written = open_model(tmp_path / "model"), open_model(files[0])
    drafts = [
        _drafted(checkpoint, checkpoint.draft),
        _drafted(written, written.draft or open_draft(files[-1], written)),
    ]
    places = [(chunk, place) for chunk in range(len(TOKENS)) for place in range(len(PLACES))]
    texts = [TOKENS[chunk, : PLACES[place] + 1].tolist() for chunk, place in places]
    theirs = llama_drafts.run_isolated(files[0], files[-1], texts, STEPS)
    for (chunk, place), expected in zip(places, theirs, strict=True):
        for tokens, logits, confidence in drafts:
            assert tokens[chunk, place].tolist() == expected.tokens.tolist()
            assert confidence[chunk, place].tolist() == pytest.approx(expected.confidence.tolist(), abs=1e-5)
            assert llama.mean_divergence(logits[chunk, place].numpy(), expected.steps) < 1e-9


def _drafted(model: Model, draft: Model | None) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens [chunks, places, steps], logits of each [.., vocabulary], and how sure a draft of blocks is of each."""
    assert draft
    block, room, weights = draft.graph.block, Workspace(), ModelWeights(draft)
    stream, features = Stream(model, TOKENS), Features(block.sources if block else (), room)
    for layer in model.graph.layers:
        stream.advance(layer)
        features.passed(stream, layer)
    drafts: MultiTokenPrediction | BlockDrafts
    if block:
        drafts = BlockDrafts(draft, weights, stream, features, PLACES, room)
    else:
        drafts = MultiTokenPrediction(draft, weights, stream, PLACES, room)
    tokens, logits, sure = [], [], []
    for _ in range(STEPS):
        drafting, states = drafts.states()
        tokens.append(most_probable(drafting, states))
        logits.append(torch.stack([drafting.logits(own) for own in states]))
        sure.append(drafts.confidence() if isinstance(drafts, BlockDrafts) else torch.ones(tokens[-1].shape))
        drafts.take(tokens[-1])
    return torch.stack(tokens, dim=2), torch.stack(logits, dim=2), torch.stack(sure, dim=2)


def test_block_with_embedding_and_head_of_its_own(tmp_path: Path) -> None:
    """They are read where there are any: swapped for the model's they give what a model with them would."""
    _nemotron(tmp_path / "model")
    model = open_model(tmp_path / "model")
    (block,), graph = model.graph.predictions, model.graph
    other = replace(graph, embedding=graph.head, head=graph.embedding)
    model.graph = replace(graph, predictions=(replace(block, embedding=graph.head, head=graph.embedding),))
    own, swapped = _drafted(model, model.draft)[1], Model(model.path, model.architecture, other, model.tensors, {})
    assert relative_error(_drafted(model, swapped.draft)[1], own) == 0
    model.graph = graph
    assert relative_error(_drafted(model, model.draft)[1], own) > 0.1
