"""The one pass: what calibration finds, what it does to the bytes, and that neither depends on the memory given."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import checkpoints
import gguf
import numpy as np
import pytest
import torch
from conftest import Checkpoint
from conversions import convert
from moecast.convert.calibrate import write_imatrix
from moecast.convert.settings import Calibration
from moecast.errors import BadInput
from moecast.progress import NoProgress
from moecast.quant import quantize
from moecast.runner import parity
from moecast.runner.settings import Evaluation
from moecast.runner.stream import Stream, advance
from moecast.runner.weights import ModelWeights
from moecast.sources.imatrix import read_imatrix
from moecast.sources.model import Model, open_model
from safetensors.torch import load_file, save_file

DATA = Path(__file__).parent.parent / "data" / "imatrix"
TEXT = DATA / "text.txt"
CONTEXT, CHUNKS = 256, 8
FOLDERS = sorted(path.parent for path in checkpoints.EXAMPLES.glob("*/config.json"))
# The smallest budget above the floor puts most activations on disk; the largest none.
MEMORIES = ("floor", 1 << 40)


class Notes(NoProgress):
    """Keeps the lines."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def note(self, line: str) -> None:
        self.lines.append(line)


def _arrays(path: Path) -> dict[str, np.ndarray]:
    return {tensor.name: np.array(tensor.data) for tensor in gguf.GGUFReader(path).tensors}


@contextmanager
def _tensor(folder: Path, name: str) -> Iterator[torch.Tensor]:
    """A stored tensor, to be changed in place."""
    tensors = load_file(folder / "model.safetensors")
    yield tensors[name]
    save_file(tensors, folder / "model.safetensors")


def _floor(convert_with: object) -> int:
    """The least memory, as the refusal of less says it."""
    assert callable(convert_with)
    with pytest.raises(BadInput, match=r"the least that this model takes is \d") as refusal:
        convert_with(1 << 20)
    return int(float(str(refusal.value).split("takes is ")[1].split(" GB")[0]) * 1e9) + (20 << 20)


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_importance_is_that_of_llama_imatrix(folder: Path, tmp_path: Path) -> None:
    """The recorded files are llama-imatrix's, run on the example as a float32 GGUF and on the same text.

    That of Qwen is from the same callback of llama.cpp by way of ctypes, which gave MiniMax's to 6e-6.
    """
    result = write_imatrix(folder, tmp_path / "imatrix.gguf", Calibration(TEXT, CONTEXT, CHUNKS))
    assert result.tokens == CONTEXT * CHUNKS and result.unseen_experts == 0
    expected, found = _arrays(DATA / f"{folder.name}.gguf"), _arrays(tmp_path / "imatrix.gguf")
    missing = {name.split(".")[2] for name in expected.keys() - found.keys()}
    assert missing <= {"hc_attn_fn", "hc_ffn_fn", "ffn_gate_inp_shexp"} and found.keys() <= expected.keys()
    for name in found:
        if name.endswith(".counts"):
            sizes = (arrays[name.replace("counts", "in_sum2")].size for arrays in (expected, found))
            groups = next(sizes) // next(sizes)
            assert np.array_equal(found[name].flatten(), groups * expected[name].flatten())
        else:
            sums = (
                expected[name].reshape(-1, found[name].size).sum(axis=0)
            )  # what works in groups has one importance here
            assert np.allclose(found[name].flatten(), sums, rtol=1e-3, atol=0)


@pytest.mark.whole
@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_neither_memory_nor_conversion_changes_importance(folder: Path, tmp_path: Path) -> None:
    """To the bit: on disk or in memory, alone or while a file is written; and so is the file."""
    text = {"context": CONTEXT, "overwrite": True}
    alone = tmp_path / "alone.gguf"
    write_imatrix(folder, alone, Calibration(TEXT, CONTEXT), overwrite=True)
    outputs = []
    for number, memory in enumerate(MEMORIES):
        beside, output = tmp_path / f"beside-{number}.gguf", tmp_path / f"{number}.gguf"

        def run(memory: int, output: Path = output, beside: Path = beside) -> object:
            extra = {"calibration": TEXT, "save_to": beside, "memory": memory, "file": TEXT, "chunks": 2}
            return convert(folder, output, "IQ2_XS", **text, **extra).parity

        result = run(_floor(run) if isinstance(memory, str) else memory)
        assert beside.read_bytes() == alone.read_bytes()
        outputs.append((output.read_bytes(), result))
    assert outputs[0] == outputs[1]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "0.fingerprints.json", "0.gguf", "1.fingerprints.json", "1.gguf",
        "alone.gguf", "beside-0.gguf", "beside-1.gguf",
    ]  # fmt: skip


@pytest.mark.whole
@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_parity_is_that_of_the_file(folder: Path, tmp_path: Path) -> None:
    """The candidate ran on what was being written, padded rows and native types included."""
    for quant in ("Q3_K_M", "native"):
        text = {"file": TEXT, "context": CONTEXT, "chunks": 2}
        result = convert(folder, tmp_path, quant, calibration=TEXT, **text)
        found, expected = result.parity, parity(folder, result.files[0], Evaluation(TEXT, CONTEXT, 2))
        assert found is not None and expected.tokens == found.tokens
        for name in ("perplexity_reference", "perplexity_candidate", "mean_kld", "kld_999", "top1_agreement"):
            assert getattr(found, name) == pytest.approx(getattr(expected, name), rel=1e-4, abs=1e-6)
        assert found.layer_errors == pytest.approx(expected.layer_errors, rel=1e-3, abs=1e-6)


def test_bytes_are_weighed_by_what_was_seen(minimax_fp8: Checkpoint, tmp_path: Path) -> None:
    """Expert by expert: its own mean squares, drawn towards those of all tokens of the layer, or towards one value."""
    statistics = tmp_path / "imatrix.gguf"
    text = {"calibration": TEXT, "context": 64, "save_to": statistics, "verify": False}
    path = convert(minimax_fp8.folder, tmp_path / "out.gguf", "Q4_K_M", **text).files[0]
    model, arrays, stored = open_model(minimax_fp8.folder), _arrays(statistics), _arrays(path)
    for name in ("blk.0.ffn_up_exps.weight", "blk.1.ffn_down_exps.weight"):
        sums = torch.from_numpy(arrays[f"{name}.in_sum2"]).double()
        counts = torch.from_numpy(arrays[f"{name}.counts"]).double()
        order = counts.flatten().argsort(descending=True, stable=True).tolist()
        weight = next(weight for weight in model.graph.weights() if weight.name == name)
        type_name = next(t.tensor_type.name for t in gguf.GGUFReader(path).tensors if t.name == name)
        for expert in (order[0], order[7], order[-1]):
            own = sums[expert] / counts[expert]
            prior = own.mean().expand_as(own) if "down" in name else sums.sum(dim=0) / counts.sum()
            importance = (sums[expert] + 16 * prior) / (counts[expert] + 16)
            found, values = stored[name].reshape(16, -1)[expert], model.load(weight, expert)
            # The written sums are rounded to float32, which turns a tie now and then.
            assert (quantize(values, type_name, importance).numpy().flatten() != found).mean() < 0.006
        alone = quantize(values, type_name, sums[expert] / counts[expert]).numpy().flatten()
        assert (alone != found).mean() > 0.01


def test_expert_that_no_token_reached(minimax: Checkpoint, tmp_path: Path) -> None:
    """Its columns are weighed as the others' are on average, and it is written like them."""
    folder = checkpoints.copied(minimax.folder, tmp_path / "copy")
    with _tensor(folder, "model.layers.0.block_sparse_moe.e_score_correction_bias") as bias:
        bias[3] = -100
    notes = Notes()
    text = {"calibration": TEXT, "context": 64, "file": TEXT, "chunks": 2}
    result = convert(folder, tmp_path / "out.gguf", "IQ2_XXS", progress=notes, **text)
    first, second = (line for line in notes.lines if line.startswith("Layer "))
    assert "15 of 16 experts seen, fewest 0 tokens" in first and "IQ2_XXS" in first
    assert "16 of 16 experts seen" in second and "relative error" in second
    stored = _arrays(result.files[0])["blk.0.ffn_up_exps.weight"].reshape(16, -1)
    plain = convert(folder, tmp_path / "plain.gguf", "IQ2_XXS", calibration=None, verify=False).files[0]
    assert result.parity and np.isfinite(result.parity.mean_kld)
    assert not np.array_equal(stored[3], _arrays(plain)["blk.0.ffn_up_exps.weight"].reshape(16, -1)[3])


def test_first_offender_is_named(minimax: Checkpoint, tmp_path: Path) -> None:
    folder = checkpoints.copied(minimax.folder, tmp_path / "copy")
    with _tensor(folder, "model.layers.1.block_sparse_moe.experts.5.w2.weight") as matrix:
        matrix[7, 7] = float("nan")
    with pytest.raises(BadInput, match="layer 1, expert 5: the output is NaN or infinite"):
        convert(folder, tmp_path / "out.gguf", "Q4_K_M", calibration=TEXT, context=64)
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]


def test_streams_share_what_they_load(minimax: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two texts through one model: the same states as each alone, every piece decoded once a layer for both."""
    model = open_model(minimax.folder)
    texts = [torch.randint(0, 512, (2, 40), generator=torch.Generator().manual_seed(seed)) for seed in (0, 1)]
    alone = [Stream(model, text) for text in texts]
    weights = ModelWeights(model)
    together = [Stream(model, text, weights=weights) for text in texts]
    loaded: list[tuple[str, int | None]] = []
    load = Model.load
    for layer in model.graph.layers:
        for stream in alone:
            stream.advance(layer)
        monkeypatch.setattr(Model, "load", lambda *piece: loaded.append((piece[1].name, piece[2])) or load(*piece))
        advance(together, [layer, layer])
        monkeypatch.undo()
    assert len(loaded) == len(set(loaded)) > 2 * 3 * 12
    for own, shared in zip(alone, together, strict=True):
        for chunk in range(2):
            assert torch.allclose(own.hidden[chunk], shared.hidden[chunk], rtol=1e-5, atol=1e-6)


def test_importance_file_instead(minimax_fp8: Checkpoint, tmp_path: Path) -> None:
    """The matrix that one conversion wrote serves the next, without its calibration."""
    statistics = tmp_path / "imatrix.gguf"
    write_imatrix(minimax_fp8.folder, statistics, Calibration(TEXT, 64, 4))
    path = convert(minimax_fp8.folder, tmp_path / "out.gguf", "Q4_K_M", imatrix=statistics, verify=False).files[0]
    model, name = open_model(minimax_fp8.folder), "blk.0.ffn_up_exps.weight"
    weight = next(weight for weight in model.graph.weights() if weight.name == name)
    means = read_imatrix(statistics).of(name, weight.columns, 16)
    assert means is not None
    expected = quantize(model.load(weight, 2), "Q4_K", means[2])
    assert np.array_equal(_arrays(path)[name].reshape(16, -1)[2], expected.numpy().flatten())


def test_options_that_exclude_each_other(minimax: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="--imatrix-out needs calibration text"):
        convert(minimax.folder, tmp_path / "out.gguf", calibration=None, save_to=tmp_path / "imatrix.gguf")
    with pytest.raises(BadInput, match=r"nowhere\.txt cannot be read"):
        convert(minimax.folder, tmp_path / "out.gguf", calibration=tmp_path / "nowhere.txt")
    assert list(tmp_path.iterdir()) == []
