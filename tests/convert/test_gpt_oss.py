"""gpt-oss in llama.cpp and ONNX Runtime: the numbers of transformers, of every variant that each can run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import gpt_oss_checkpoints as gpt_oss
import llama
import pytest
from conversions import convert
from forward import random_tokens, relative_error, runner_logits
from gpt_oss_checkpoints import BEYOND_LLAMA, UNROUNDED, VARIANTS
from in_llama import assert_goes_on_alike, divergence, unquantized
from moecast.convert.plans.choose import plan_for
from moecast.convert.settings import Goal
from moecast.errors import BadInput
from moecast.runner.engines import OnnxModel
from moecast.sources.model import open_model
from onnx_models import cast, onnx_logits
from toy_models import logits_of

pytestmark = pytest.mark.numeric

TOKENS = random_tokens(1, 96)
ALL = VARIANTS | BEYOND_LLAMA | {"limits as they are": UNROUNDED}
UNQUANTIZED = 1e-8  # measured: at most 1e-13
ROUNDED = 3e-3  # llama.cpp rounds activations to 8 bits; measured: at most 6e-4


@pytest.mark.parametrize("overrides", VARIANTS.values(), ids=VARIANTS)
def test_unquantized_file_in_llama(overrides: dict[str, Any], tmp_path: Path) -> None:
    oracle = gpt_oss.gpt_oss_model(**overrides)
    path = unquantized(gpt_oss.save_gpt_oss(tmp_path / "model", oracle), tmp_path)
    theirs = llama.run_isolated(path, TOKENS[0].tolist())
    assert llama.mean_divergence(logits_of(oracle, TOKENS)[0].numpy(), theirs) < UNQUANTIZED


@pytest.mark.parametrize("overrides", VARIANTS.values(), ids=VARIANTS)
def test_file_read_back_is_the_same_model(overrides: dict[str, Any], tmp_path: Path) -> None:
    folder = gpt_oss.save_gpt_oss(tmp_path / "model", gpt_oss.gpt_oss_model(**overrides))
    source, written = open_model(folder), open_model(unquantized(folder, tmp_path))
    weights = [[(w.name, w.role, w.shape) for w in model.graph.weights()] for model in (source, written)]
    assert weights[0] == weights[1]
    for graph in (source.graph, written.graph):
        windows = [layer.operations[0].window for layer in graph.layers]
        each = 2 * 2 * 32 * 2  # keys and values, of 2 heads of 32 values of 2 bytes
        assert graph.state_bytes_per_token() == windows.count(None) * each
        assert graph.fixed_state_bytes() == windows.count(17) * 17 * each > 0
    assert relative_error(runner_logits(written, TOKENS), runner_logits(source, TOKENS)) < 1e-6


def test_limits_that_llama_rounds(tmp_path: Path) -> None:
    """The file means what llama.cpp makes of it, and one line says that this is not quite the model."""
    oracle = gpt_oss.gpt_oss_model(**UNROUNDED)
    folder = gpt_oss.save_gpt_oss(tmp_path / "model", oracle)
    result = convert(folder, tmp_path, "F32", calibration=None, verify=False)
    assert sum("llama.cpp rounds the limits of YaRN" in line for line in result.problems) == 1
    theirs = llama.run_isolated(result.files[0], TOKENS[0].tolist())
    assert 1e-5 < llama.mean_divergence(logits_of(oracle, TOKENS)[0].numpy(), theirs) < 1e-2
    assert divergence(result.files[0], TOKENS) < UNQUANTIZED
    gpt_oss.save_gpt_oss(tmp_path / "rounded", gpt_oss.gpt_oss_model())
    assert convert(tmp_path / "rounded", tmp_path / "out", "F32", calibration=None, verify=False).problems == ()


@pytest.mark.parametrize("quant", ["Q8_0", "Q4_K_M", "Q3_K_M", "IQ4_XS"])
def test_quantized_file_in_llama(quant: str, tmp_path: Path) -> None:
    """Widths that blocks of 256 do not divide are padded, biases too."""
    oracle = gpt_oss.gpt_oss_model(hidden_size=192, intermediate_size=160)
    folder = gpt_oss.save_gpt_oss(tmp_path / "model", oracle)
    result = convert(folder, tmp_path, quant, calibration=None, verify=False, padding=True)
    assert open_model(result.files[0]).graph.hidden_size == (192 if quant == "Q8_0" else 256)
    assert divergence(result.files[0], TOKENS) < ROUNDED


@pytest.fixture(scope="module")
def mxfp4(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A checkpoint with rows of 288, which no block of 256 divides, and what its codes stand for."""
    folder = tmp_path_factory.mktemp("mxfp4") / "m"
    return folder, gpt_oss.save_gpt_oss_mxfp4(folder, gpt_oss.gpt_oss_model(hidden_size=288, intermediate_size=288))


@pytest.mark.parametrize("quant", ["native", "MXFP4_MOE", "Q8_0", "Q4_K_M", "Q2_K"])
def test_mxfp4_is_kept_code_for_code(quant: str, mxfp4: tuple[Path, Any], tmp_path: Path) -> None:
    """Also where less was wanted: nothing that fits takes fewer bits."""
    folder, oracle = mxfp4
    path = convert(folder, tmp_path, quant, calibration=None, verify=False, padding=False).files[0]
    types = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors}
    experts = {f"blk.{n}.ffn_{kind}_exps.weight" for n in range(4) for kind in ("gate", "up", "down")}
    assert {name for name in types if types[name] == "MXFP4"} == experts
    if quant == "native":
        expected = logits_of(oracle, TOKENS)[0]
        assert relative_error(runner_logits(open_model(path), TOKENS)[0], expected) < 1e-5
    assert divergence(path, TOKENS) < ROUNDED


@pytest.mark.slow
def test_mxfp4_may_be_padded_where_that_is_smaller(tmp_path: Path) -> None:
    small = {"hidden_size": 480, "intermediate_size": 480, "num_hidden_layers": 2}
    gpt_oss.save_gpt_oss_mxfp4(tmp_path / "m", gpt_oss.gpt_oss_model(**small))
    for quant, padded in (("Q4_K_M", False), ("Q2_K", True)):
        result = convert(tmp_path / "m", tmp_path / quant, quant, calibration=None, verify=False)
        assert open_model(result.files[0]).graph.hidden_size == (512 if padded else 480)
        assert divergence(result.files[0], TOKENS) < ROUNDED


def test_text_goes_on_as_in_llama(tmp_path: Path) -> None:
    folder = gpt_oss.save_gpt_oss(tmp_path / "model", gpt_oss.gpt_oss_model())
    assert_goes_on_alike(folder, tmp_path)


def test_metadata(tmp_path: Path) -> None:
    folder = gpt_oss.save_gpt_oss(tmp_path / "model", gpt_oss.gpt_oss_model(**VARIANTS["other windows"]))
    fields = gguf.GGUFReader(unquantized(folder, tmp_path)).fields
    found = {key.removeprefix("gpt-oss."): fields[key].contents() for key in fields if key.startswith("gpt-oss.")}
    assert found.pop("attention.layer_norm_rms_epsilon") == pytest.approx(1e-5)
    assert found == {
        "context_length": 2048, "embedding_length": 256, "block_count": 4, "feed_forward_length": 256,
        "attention.head_count": 8, "attention.head_count_kv": 2, "attention.key_length": 32,
        "attention.value_length": 32, "rope.dimension_count": 32, "rope.freq_base": 1e4, "rope.scaling.type": "yarn",
        "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 512, "rope.scaling.yarn_beta_fast": 32.0,
        "rope.scaling.yarn_beta_slow": 1.0, "attention.sliding_window": 17,
        "attention.sliding_window_pattern": [True, True, False, True], "expert_count": 16, "expert_used_count": 4,
        "expert_feed_forward_length": 256,
    }  # fmt: skip


@pytest.mark.parametrize("overrides", BEYOND_LLAMA.values(), ids=BEYOND_LLAMA)
def test_what_llama_computes_otherwise_is_refused(overrides: dict[str, Any], tmp_path: Path) -> None:
    folder = gpt_oss.save_gpt_oss(tmp_path / "model", gpt_oss.gpt_oss_model(**overrides))
    (key,) = overrides
    with pytest.raises(BadInput, match=f"{key}.*, which llama.cpp does not do for gpt-oss: use --to onnx"):
        plan_for(open_model(folder), Goal("F32"))
    with pytest.raises(BadInput, match=key):
        unquantized(folder, tmp_path / "out")
    assert plan_for(open_model(folder), Goal("F32"), file_format="onnx").tensors


@pytest.mark.parametrize("overrides", ALL.values(), ids=ALL)
def test_onnx_is_transformers(overrides: dict[str, Any], tmp_path: Path) -> None:
    oracle = gpt_oss.gpt_oss_model(**overrides)
    folder = gpt_oss.save_gpt_oss(tmp_path / "model", oracle)
    settings = {"file_format": "onnx", "activations": "float32", "verify": False, "threads": 1}
    engine = OnnxModel(convert(folder, tmp_path, "F32", **settings).files[0].parent, threads=1)
    expected = logits_of(oracle, TOKENS)[0]
    assert relative_error(onnx_logits(engine, TOKENS[0]), expected) < 1e-5
    assert relative_error(onnx_logits(engine, TOKENS[0], pieces=7), expected) < 1e-5


def test_quantized_onnx_is_our_runner(tmp_path: Path) -> None:
    result = cast(gpt_oss.save_gpt_oss(tmp_path / "model", gpt_oss.gpt_oss_model()), tmp_path / "out")
    expected = runner_logits(open_model(result.gguf), TOKENS)[0]
    assert relative_error(onnx_logits(result.engine(), TOKENS[0]), expected) < 1e-5


def test_mxfp4_keeps_its_codes_in_onnx(tmp_path: Path) -> None:
    """In 8 bits, with which ONNX Runtime multiplies activations of 8 bits whatever is asked for; measured: 0.02."""
    oracle = gpt_oss.save_gpt_oss_mxfp4(tmp_path / "model", gpt_oss.gpt_oss_model(**UNROUNDED))
    result = cast(tmp_path / "model", tmp_path / "out", "Q8_0")
    experts = {tensor.type.name for tensor in result.plan.tensors if tensor.weight.experts is not None}
    assert experts == {"MXFP4"}
    assert relative_error(onnx_logits(result.engine(), TOKENS[0]), logits_of(oracle, TOKENS)[0]) < 0.06
