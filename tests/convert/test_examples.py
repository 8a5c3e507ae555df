"""The trained examples, whole road: converted, run by llama.cpp on real text, compared with the source."""

from __future__ import annotations

from pathlib import Path

import checkpoints
import llama
import pytest
import torch
from conversions import convert
from forward import runner_logits
from moecast.runner import parity
from moecast.runner.settings import Evaluation
from moecast.sources.model import open_model

FOLDERS = sorted(path.parent for path in checkpoints.EXAMPLES.glob("*/config.json"))
SLOW_BUT_FOR_ONE = [
    pytest.param(folder, marks=() if folder.name == "minimax-m2-tiny" else pytest.mark.slow, id=folder.name)
    for folder in FOLDERS
]
CONTEXT = 160


@pytest.mark.whole
@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
@pytest.mark.parametrize(("quant", "bound"), [("F32", 1e-5), ("BF16", 1e-3), ("Q8_0", 3e-3), ("Q4_K_M", 5e-3)])
def test_example_in_llama(folder: Path, tmp_path: Path, quant: str, bound: float) -> None:
    """The same log-probabilities from llama.cpp and our runner on the same file, up to llama.cpp's rounding.

    It rounds activations to BF16 before it multiplies with BF16 weights, and to 8 bits before quantized ones; a trained
    router has ties near enough for that to matter. The random checkpoints, which have none, hold BF16 to 1e-5.
    """
    path = convert(folder, tmp_path, quant, calibration=None, verify=False).files[0]
    model = open_model(path)
    ids = model.tokenizer.encode(checkpoints.TEXT.read_text(encoding="utf-8"))[:CONTEXT]
    ours = runner_logits(model, torch.tensor([ids]))[0].numpy()
    assert llama.mean_divergence(ours, llama.run_isolated(path, ids)) < bound


@pytest.mark.whole
@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_parity_that_convert_prints(folder: Path, tmp_path: Path) -> None:
    """Real text, a trained model: Q4_K_M costs a little, and says so."""
    result = convert(folder, tmp_path, "Q4_K_M", calibration=None, chunks=4).parity
    assert result is not None
    assert 1e-4 < result.mean_kld < 0.03 and result.top1_agreement > 0.9
    assert abs(result.perplexity_ratio - 1) < 0.03


@pytest.mark.whole
@pytest.mark.parametrize("folder", SLOW_BUT_FOR_ONE)
def test_error_feedback_brings_the_file_closer_to_its_source(folder: Path, tmp_path: Path) -> None:
    """Calibrated on other text of the book that the examples know; what the files hold is what convert compared."""
    text = tmp_path / "calibration.txt"
    text.write_text((checkpoints.EXAMPLES / "text" / text.name).read_text(encoding="utf-8")[:40_000], encoding="utf-8")
    how = {"padding": False, "calibration": text, "chunks": 6}
    nearest = convert(folder, tmp_path / "nearest", "IQ3_XXS", **how)
    fed_back = convert(folder, tmp_path / "fed back", "IQ3_XXS", error_feedback=True, **how)
    assert nearest.parity and fed_back.parity
    assert fed_back.bytes == nearest.bytes
    assert fed_back.parity.mean_kld < 0.92 * nearest.parity.mean_kld
    file = parity(folder, fed_back.files[0], Evaluation(chunks=6))
    assert file.mean_kld == pytest.approx(fed_back.parity.mean_kld, rel=1e-3)
