"""Blocks that remember more than keys and values, in ONNX Runtime: state spaces, delta rule, compressed attention."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import deepseek_checkpoints
import deltanet_checkpoints
import nemotron_checkpoints
import numpy as np
import onnxruntime
import pytest
import torch
from conversions import convert
from forward import relative_error, runner_logits
from moecast.runner.engines import OnnxModel, OnnxState
from moecast.sources.model import open_model
from onnx_models import Cast, cast, onnx_logits
from torch import Tensor

pytestmark = pytest.mark.numeric

EXACT = 1e-5
TOKENS = 400  # DeepSeek: three entries of 128, and a hundred of 4 of which the indexer leaves 16

NEMOTRON = {
    "experts": {},
    "latent": nemotron_checkpoints.LATENT,
    "grouped": nemotron_checkpoints.GROUPED,
    "dense": nemotron_checkpoints.DENSE,
}
CUTS = {
    "pieces": [0, 1, 63, 130, 131, 259, 300, TOKENS],
    "steps": [0, 3, 125, *range(126, 142)],  # across the end of a window of either ratio
}


@pytest.fixture(scope="module")
def deepseek(tmp_path_factory: pytest.TempPathFactory) -> Cast:
    folder = tmp_path_factory.mktemp("deepseek")
    return cast(
        deepseek_checkpoints.save_deepseek(folder / "hf", deepseek_checkpoints.deepseek_model()), folder / "out"
    )


@pytest.fixture(scope="module")
def nemotron(tmp_path_factory: pytest.TempPathFactory) -> Cast:
    folder = tmp_path_factory.mktemp("nemotron")
    return cast(
        nemotron_checkpoints.save_nemotron(folder / "hf", nemotron_checkpoints.nemotron_model()), folder / "out"
    )


@pytest.fixture(scope="module")
def deltanet(tmp_path_factory: pytest.TempPathFactory) -> Cast:
    folder = tmp_path_factory.mktemp("deltanet")
    model = deltanet_checkpoints.model_of("qwen3_5_moe", linear_num_value_heads=6)
    return cast(deltanet_checkpoints.save(folder / "hf", model), folder / "out")


def _in_full(checkpoint: Path) -> OnnxModel:
    """A checkpoint as ONNX, all of it in float32."""
    result = convert(checkpoint, checkpoint, "F32", file_format="onnx", activations="float32", verify=False, threads=1)
    return OnnxModel(result.files[0].parent, threads=1)


def _tokens(count: int = TOKENS, seed: int = 0) -> Tensor:
    return torch.randint(0, 512, (count,), generator=torch.Generator().manual_seed(seed))


def _in_pieces(model: OnnxModel, tokens: Tensor, cuts: list[int]) -> tuple[Tensor, OnnxState]:
    state, logits = model.initial_state(), []
    for start, stop in pairwise(cuts):
        values, state = model.advance(tokens[start:stop], state)
        logits.append(values)
    return torch.cat(logits), state


@pytest.mark.parametrize(
    "change", [*NEMOTRON.values(), nemotron_checkpoints.WITH_DENSE_LAYER], ids=[*NEMOTRON, "with dense layer"]
)
def test_nemotron_is_transformers(change: dict[str, Any], tmp_path: Path) -> None:
    oracle = nemotron_checkpoints.nemotron_model(**change)
    engine = _in_full(nemotron_checkpoints.save_nemotron(tmp_path / "hf", oracle))
    with torch.no_grad():
        expected = oracle(_tokens(200)[None]).logits[0]
    assert relative_error(onnx_logits(engine, _tokens(200)), expected) < EXACT


@pytest.mark.parametrize("change", NEMOTRON.values(), ids=NEMOTRON)
def test_quantized_nemotron_is_our_runner(change: dict[str, Any], tmp_path: Path) -> None:
    oracle = nemotron_checkpoints.nemotron_model(**change)
    result = cast(nemotron_checkpoints.save_nemotron(tmp_path / "hf", oracle), tmp_path / "out")
    expected = runner_logits(open_model(result.gguf), _tokens(200)[None])[0]
    assert relative_error(onnx_logits(result.engine(), _tokens(200)), expected) < EXACT


@pytest.mark.whole
def test_deepseek_is_transformers(tmp_path: Path) -> None:
    oracle = deepseek_checkpoints.deepseek_model()
    engine = _in_full(deepseek_checkpoints.save_deepseek(tmp_path / "hf", oracle))
    with torch.no_grad():
        expected = oracle(_tokens()[None]).logits[0]
    assert relative_error(onnx_logits(engine, _tokens()), expected) < EXACT


def test_quantized_deepseek_is_our_runner(deepseek: Cast) -> None:
    expected = runner_logits(open_model(deepseek.gguf), _tokens()[None])[0]
    assert relative_error(onnx_logits(deepseek.engine(), _tokens()), expected) < EXACT


@pytest.mark.parametrize("cuts", CUTS.values(), ids=CUTS)
@pytest.mark.parametrize("kind", ["nemotron", "deltanet", "deepseek"])
def test_pieces_equal_the_whole(kind: str, cuts: list[int], request: pytest.FixtureRequest) -> None:
    result: Cast = request.getfixturevalue(kind)
    tokens = _tokens()[: cuts[-1]]
    expected = runner_logits(open_model(result.gguf), tokens[None])[0]
    assert relative_error(_in_pieces(result.engine(), tokens, cuts)[0], expected) < EXACT


@pytest.mark.parametrize("kind", ["nemotron", "deltanet", "deepseek"])
def test_texts_of_a_batch_are_each_its_own(kind: str, request: pytest.FixtureRequest) -> None:
    result: Cast = request.getfixturevalue(kind)
    engine, texts = result.engine(), torch.stack([_tokens(150, seed=1), _tokens(150, seed=2)])
    session = onnxruntime.InferenceSession(str(result.folder / "model.onnx"), providers=["CPUExecutionProvider"])
    names = [port.name for port in session.get_inputs()]
    given = {name: np.repeat(value, 2, axis=0) for name, value in engine.initial_state().items() if name in names}
    given |= {"input_ids": texts.numpy(), "attention_mask": np.ones((2, 150), np.int64)}
    given |= {"position_ids": np.repeat(np.arange(150)[None], 2, axis=0)}
    logits = session.run(["logits"], {name: given[name] for name in names})[0]
    expected = torch.stack([onnx_logits(engine, text) for text in texts])
    assert relative_error(torch.from_numpy(logits), expected) < EXACT


@pytest.mark.whole
def test_equal_scores_choose_the_earliest_entries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Index heads that never match: all scores are zero, and torch.topk would choose any entries."""
    oracle = deepseek_checkpoints.deepseek_model()
    with torch.no_grad():
        for name, parameter in oracle.named_parameters():
            if "indexer.q_b_proj" in name:
                parameter.zero_()
    checkpoint = deepseek_checkpoints.save_deepseek(tmp_path / "hf", oracle)
    with torch.no_grad():
        arbitrary = oracle(_tokens()[None]).logits[0]
        monkeypatch.setattr(Tensor, "topk", _earliest_best)
        expected = oracle(_tokens()[None]).logits[0]
    assert relative_error(arbitrary, expected) > 1e-3
    assert relative_error(onnx_logits(_in_full(checkpoint), _tokens()), expected) < EXACT
    assert relative_error(runner_logits(open_model(checkpoint), _tokens()[None])[0], expected) < EXACT


def _earliest_best(scores: Tensor, count: int, dim: int) -> torch.return_types.topk:
    ranking = scores.sort(dim=dim, descending=True, stable=True)
    return torch.return_types.topk(part.narrow(dim, 0, count) for part in ranking)


def test_states_grow_by_compressed_entries_alone(deepseek: Cast) -> None:
    state = _in_pieces(deepseek.engine(), _tokens(), [0, 301, TOKENS])[1]
    lengths = {name: value.shape[1] for name, value in state.items() if name != "tokens"}
    assert lengths["past.0.window"] == lengths["past.1.window"] == 63
    assert lengths["past.1.compressor.entries"] == lengths["past.1.indexer.entries"] == TOKENS // 4
    assert lengths["past.2.compressor.entries"] == TOKENS // 128
    assert lengths["past.1.compressor.values"] == 4 + TOKENS % 4  # entries overlap, so a whole window waits
    assert lengths["past.2.compressor.values"] == lengths["past.2.compressor.gates"] == TOKENS % 128


@pytest.mark.parametrize(("kind", "channels", "heads"), [("nemotron", 768, 8), ("deltanet", 640, 6)])
def test_recurrent_states_keep_their_size(kind: str, channels: int, heads: int, request: pytest.FixtureRequest) -> None:
    engine = request.getfixturevalue(kind).engine()
    before, after = engine.initial_state(), _in_pieces(engine, _tokens(), [0, TOKENS])[1]
    assert before["past.0.conv"].shape == after["past.0.conv"].shape == (1, channels, 3)
    assert before["past.0.recurrent"].shape == after["past.0.recurrent"].shape == (1, heads, 64, 64)
    assert np.abs(after["past.0.recurrent"]).max() > 0 == np.abs(before["past.0.recurrent"]).max()
