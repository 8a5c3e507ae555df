"""Products in BF16: how far they are from float32, and what they leave alone."""

from __future__ import annotations

from pathlib import Path

import checkpoints
import pytest
import torch
from conversions import convert
from forward import relative_error
from moecast.archs.graph import MoE
from moecast.errors import BadInput
from moecast.progress import NoProgress
from moecast.runner import parity, perplexity
from moecast.runner.settings import Compute, Evaluation
from moecast.runner.weights import ModelWeights, multiply
from moecast.sources.model import open_model

pytestmark = pytest.mark.numeric

FOLDERS = sorted(path.parent for path in checkpoints.EXAMPLES.glob("*/config.json"))
TEXT = Path(__file__).parent.parent / "data" / "imatrix" / "text.txt"
CHUNKS = {"file": TEXT, "context": 256, "chunks": 4}
EVALUATION, BF16 = Evaluation(TEXT, 256, 4), Compute("bfloat16")


class Stopping(NoProgress):
    def note(self, line: str) -> None:
        if line.startswith("Layer 0"):
            raise KeyboardInterrupt


def test_sums_are_those_of_float32() -> None:
    """Four thousand summands lose no more than the result's own rounding, in stacks of matrices too."""
    generator = torch.Generator().manual_seed(0)
    states, matrices = torch.rand(3, 40, 4096, generator=generator), torch.rand(3, 24, 4096, generator=generator)
    found = multiply(states, matrices, torch.bfloat16)
    exact = states.bfloat16().double() @ matrices.bfloat16().double().mT
    assert found.dtype == torch.float32
    assert float(((found - exact).abs() / exact).max()) <= 2**-8
    assert not torch.allclose(found, multiply(states, matrices), rtol=1e-5)


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_routers_stay_in_float32(folder: Path) -> None:
    model = open_model(folder)
    exact, rounded = ModelWeights(model), ModelWeights(model, torch.bfloat16)
    moe = next(operation for operation in model.graph.operations() if isinstance(operation, MoE))
    states = torch.randn(8, moe.router.weight.columns, generator=torch.Generator().manual_seed(0))
    assert torch.equal(exact.project(states, moe.router.weight), rounded.project(states, moe.router.weight))
    states = torch.randn(8, moe.up.columns, generator=torch.Generator().manual_seed(1))
    expected, found = exact.project(states, moe.up, 3), rounded.project(states, moe.up, 3)
    assert 1e-4 < relative_error(found, expected) < 1e-2


@pytest.mark.parametrize("quant", ["Q3_K_M", "IQ2_XXS", "BF16"])
def test_factors_are_rounded_once(quant: str, tmp_path: Path) -> None:
    """Matrices that come in BF16 without a detour are those that the detour gives."""
    file = convert(FOLDERS[0], tmp_path, quant, calibration=None, verify=False).files[0]
    model, direct = open_model(file), 0
    weights = ModelWeights(model, torch.bfloat16)
    for weight in model.graph.weights():
        if len(weight.shape) > 1 and not weight.role.keep_f32:
            expert = 3 if weight.experts else None
            factor = weights.matmul_operand(weight, expert)
            direct += factor.dtype == torch.bfloat16
            assert torch.equal(factor.bfloat16(), model.load(weight, expert).bfloat16())
    assert direct > 10


@pytest.mark.whole
@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_results_differ_by_rounding(folder: Path, tmp_path: Path) -> None:
    """What a coarse file costs is found either way; `convert` and `parity` say the same."""
    exact, rounded = perplexity(folder, EVALUATION), perplexity(folder, EVALUATION, BF16)
    assert (exact.compute_dtype, rounded.compute_dtype) == ("float32", "bfloat16")
    assert rounded.perplexity != exact.perplexity
    assert rounded.perplexity == pytest.approx(exact.perplexity, rel=3e-3)
    made = convert(folder, tmp_path, "Q2_K", calibration=TEXT, **CHUNKS, compute_dtype="bfloat16")
    found = parity(folder, made.files[0], EVALUATION, BF16)
    assert made.parity is not None and made.parity.compute_dtype == "bfloat16"
    assert made.parity.mean_kld == pytest.approx(found.mean_kld, rel=2e-3)  # padding changes what is rounded
    assert found.mean_kld == pytest.approx(parity(folder, made.files[0], EVALUATION).mean_kld, rel=0.05)


def test_resuming_with_other_products(tmp_path: Path) -> None:
    """What is half done in float32 does not go on in BF16."""
    arguments = {"calibration": TEXT, "context": 256, "verify": False}
    output = tmp_path / "out.gguf"

    with pytest.raises(KeyboardInterrupt):
        convert(FOLDERS[0], output, "Q2_K", **arguments, progress=Stopping())
    with pytest.raises(BadInput, match="compute dtype"):
        convert(FOLDERS[0], output, "Q2_K", **arguments, compute_dtype="bfloat16")
    convert(FOLDERS[0], output, "Q2_K", **arguments)
    assert output.exists()
