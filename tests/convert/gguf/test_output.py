"""Converted files in llama.cpp: they load, and give the log-probabilities that our runner gives on the same file."""

from __future__ import annotations

from pathlib import Path

import checkpoints
import gguf
import llama
import numpy as np
import pytest
import torch
from conftest import Checkpoint
from conversions import convert
from forward import runner_logits
from moecast.quant import dequantize
from moecast.runner import parity, perplexity
from moecast.runner.settings import Evaluation
from moecast.sources.model import open_model

pytestmark = pytest.mark.numeric

EXACT = ("F32", "BF16", "F16")
QUANTIZED = ("Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q4_K_S", "Q3_K_M", "Q2_K", "IQ4_XS", "MXFP4_MOE")


def _tokens(count: int, vocabulary: int) -> torch.Tensor:
    return torch.randint(0, vocabulary, (1, count), generator=torch.Generator().manual_seed(0))


def _divergence_from_llama(path: Path) -> float:
    """Mean KL divergence between llama.cpp and our runner at 96 positions of the same file."""
    model = open_model(path)
    tokens = _tokens(96, model.graph.vocabulary_size)
    expected = llama.run_isolated(path, tokens[0].tolist())
    return float(llama.mean_divergence(runner_logits(model, tokens)[0].numpy(), expected))


@pytest.mark.parametrize("quant", EXACT)
def test_unquantized_file_in_llama(minimax_fp8: Checkpoint, tmp_path: Path, quant: str) -> None:
    result = convert(minimax_fp8.folder, tmp_path, quant, calibration=None, verify=False)
    assert _divergence_from_llama(result.files[0]) < 1e-5


@pytest.mark.parametrize("quant", QUANTIZED)
def test_quantized_file_in_llama(minimax_fp8: Checkpoint, tmp_path: Path, quant: str) -> None:
    """llama.cpp rounds activations to 8 bits, which costs up to a few thousandths."""
    result = convert(minimax_fp8.folder, tmp_path, quant, calibration=None, verify=False)
    assert result.problems == ()
    assert _divergence_from_llama(result.files[0]) < 3e-3


@pytest.mark.parametrize("quant", ["Q4_K_M", "IQ4_XS", "Q3_K_M"])
def test_rows_that_no_block_divides(minimax_odd: Checkpoint, tmp_path: Path, quant: str) -> None:
    """Fallback types, loudly: rows of 160 and 96 fit 32-element blocks only."""
    result = convert(minimax_odd.folder, tmp_path, quant, calibration=None, verify=False, padding=False)
    assert any("rows of 160, not a multiple of 256" in problem for problem in result.problems)
    assert _divergence_from_llama(result.files[0]) < 3e-3


def test_checkpoint_saved_by_transformers(minimax: Checkpoint, tmp_path: Path) -> None:
    """Its config has no scoring_func; files without the gating function abort in llama.cpp at the first token."""
    result = convert(minimax.folder, tmp_path, "F32", calibration=None, verify=False)
    tokens = _tokens(96, 512)
    with torch.no_grad():
        expected = minimax.oracle(tokens).logits[0].numpy()
    assert llama.mean_divergence(expected, llama.run_isolated(result.files[0], tokens[0].tolist())) < 1e-6


@pytest.mark.whole
def test_same_perplexity_everywhere(minimax_fp8: Checkpoint, tmp_path: Path) -> None:
    """transformers on the checkpoint, our runner on the checkpoint and on the file, llama.cpp on the file."""
    path = convert(minimax_fp8.folder, tmp_path, "F32", calibration=None, verify=False).files[0]
    model = open_model(minimax_fp8.folder)
    ours = perplexity(model, Evaluation(checkpoints.TEXT, 128, 4))
    from_file = perplexity(path, Evaluation(checkpoints.TEXT, 128, 4))
    with llama.Engine(path, context=128, threads=2) as engine:
        ids = engine.tokenize(checkpoints.TEXT.read_text(encoding="utf-8").removesuffix("\n"), add_special=True)
        theirs, count = llama.perplexity(engine, ids[: 4 * 128], 128)
    assert ids == model.tokenizer.encode(checkpoints.TEXT.read_text(encoding="utf-8").removesuffix("\n"))
    assert count == ours.tokens == 4 * 63
    losses = []
    for chunk in torch.tensor(ids[: 4 * 128]).view(4, 128):
        with torch.no_grad():
            logits = minimax_fp8.oracle(chunk[None]).logits[0]
        losses.append(torch.nn.functional.cross_entropy(logits[64:127], chunk[65:128]))
    oracle = float(torch.stack(losses).mean().exp())
    assert ours.perplexity == pytest.approx(oracle, rel=1e-5)
    assert from_file.perplexity == pytest.approx(oracle, rel=1e-5)
    assert theirs == pytest.approx(oracle, rel=1e-4)


def test_parity_equals_logits_of_both_models(minimax_fp8: Checkpoint, tmp_path: Path) -> None:
    """Streaming statistics against the textbook formulas on full float64 logits."""
    path = convert(minimax_fp8.folder, tmp_path, "Q4_K_M", calibration=None, verify=False).files[0]
    reference, candidate = open_model(minimax_fp8.folder), open_model(path)
    result = parity(reference, candidate, Evaluation(checkpoints.TEXT, 64, 5))
    ids = reference.tokenizer.encode(checkpoints.TEXT.read_text(encoding="utf-8").removesuffix("\n"))
    tokens = torch.tensor(ids[: 5 * 64]).view(5, 64)
    first, second = (runner_logits(m, tokens)[:, 32:63].double().log_softmax(-1) for m in (reference, candidate))
    kld = (first.exp() * (first - second)).sum(-1).flatten()
    right = tokens[:, 33:64, None]
    delta = (second.gather(2, right).exp() - first.gather(2, right).exp()).flatten()
    assert result.tokens == 5 * 31
    assert result.mean_kld == pytest.approx(float(kld.mean()), rel=1e-5)
    assert result.mean_kld_error == pytest.approx(float(kld.std() / len(kld) ** 0.5), rel=1e-4)
    assert result.kld_999 == pytest.approx(float(kld.quantile(0.999)), rel=1e-4)
    assert result.top1_agreement == pytest.approx(float((first.argmax(-1) == second.argmax(-1)).double().mean()))
    assert result.mean_delta_p == pytest.approx(float(delta.mean()), rel=1e-4)
    assert result.rms_delta_p == pytest.approx(float(delta.square().mean().sqrt()), rel=1e-4)
    assert result.perplexity_reference == pytest.approx(float((-first.gather(2, right)).mean().exp()), rel=1e-6)


def test_parity_of_a_model_with_itself_is_zero(minimax_odd: Checkpoint) -> None:
    result = parity(minimax_odd.folder, minimax_odd.folder, Evaluation(checkpoints.TEXT, 64, 2))
    assert result.mean_kld == 0 and result.kld_maximum == 0 and result.top1_agreement == 1


def test_split_files(minimax_fp8: Checkpoint, tmp_path: Path) -> None:
    """The same tensors whether split or not; llama.cpp follows the split names."""
    whole = convert(minimax_fp8.folder, tmp_path / "whole", "Q8_0", calibration=None, verify=False)
    split = convert(
        minimax_fp8.folder, tmp_path / "split", "Q8_0", calibration=None, verify=False, split_max_bytes=2_000_000
    )
    assert len(split.files) > 2
    assert split.files[0].name.endswith(f"-00001-of-{len(split.files):05d}.gguf")
    tokens = _tokens(32, 512)[0].tolist()
    assert np.array_equal(llama.run_isolated(split.files[0], tokens), llama.run_isolated(whole.files[0], tokens))
    once = {tensor.name: tensor.data.tobytes() for tensor in gguf.GGUFReader(whole.files[0]).tensors}
    parts = [tensor for file in split.files for tensor in gguf.GGUFReader(file).tensors]
    assert {tensor.name: tensor.data.tobytes() for tensor in parts} == once


def test_file_says_where_it_came_from(minimax_fp8: Checkpoint, tmp_path: Path) -> None:
    path = convert(
        minimax_fp8.folder, tmp_path, "Q4_K_M", calibration=None, verify=False, provenance={"revision": "abc"}
    ).files[0]
    fields = gguf.GGUFReader(path).fields
    values = {key: fields[key].contents() for key in fields if not key.startswith("tokenizer")}
    assert values["general.architecture"] == "minimax-m2"
    assert values["general.file_type"] == 15
    assert values["minimax-m2.expert_gating_func"] == 2
    assert values["minimax-m2.expert_used_count"] == 4
    assert values["moecast.quant"] == "Q4_K_M"
    assert values["moecast.source.revision"] == "abc"
    assert path.name == f"{minimax_fp8.folder.name}-Q4_K_M.gguf"


def test_stored_values_are_those_of_the_checkpoint(minimax_fp8: Checkpoint, tmp_path: Path) -> None:
    """FP8 with float32 scales is exact in F32; gguf-py reads what we wrote, expert by expert."""
    path = convert(minimax_fp8.folder, tmp_path, "F32", calibration=None, verify=False).files[0]
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    state = minimax_fp8.oracle.state_dict()
    gate_up = state["model.layers.1.mlp.experts.gate_up_proj"].numpy()
    assert np.array_equal(stored["blk.1.ffn_gate_exps.weight"].data.reshape(16, 256, 256), gate_up[:, :256])
    assert np.array_equal(stored["blk.1.ffn_up_exps.weight"].data.reshape(16, 256, 256), gate_up[:, 256:])
    down = state["model.layers.1.mlp.experts.down_proj"].numpy()
    assert np.array_equal(stored["blk.1.ffn_down_exps.weight"].data.reshape(16, 256, 256), down)
    quantized = convert(minimax_fp8.folder, tmp_path, "Q6_K", calibration=None, verify=False).files[0]
    tensor = next(t for t in gguf.GGUFReader(quantized).tensors if t.name == "blk.1.ffn_down_exps.weight")
    ours = dequantize(torch.from_numpy(tensor.data.reshape(-1, tensor.data.shape[-1]).copy()), "Q6_K")
    theirs = gguf.dequantize(tensor.data, tensor.tensor_type).reshape(ours.shape)
    assert np.array_equal(ours.numpy(), theirs)
