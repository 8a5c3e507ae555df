"""Qwen3-Next and Qwen3.5 in the runner against transformers: every variant, in every naming scheme and encoding."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import deltanet_checkpoints as deltanet
import modelopt
import pytest
import torch
from deltanet_checkpoints import BEYOND_LLAMA, FAMILIES, VARIANTS
from forward import assert_same_logits, random_tokens, relative_error
from moecast.quant.planning.padding import pad
from moecast.sources.model import Model, open_model
from toy_models import logits_in_pieces, logits_of

pytestmark = pytest.mark.numeric

TOKENS = random_tokens(2, 100)  # more than a chunk, and no multiple of one
ALL = VARIANTS | BEYOND_LLAMA
MIXTURES = ("qwen3_next", "qwen3_5_moe")


@pytest.mark.parametrize("overrides", ALL.values(), ids=ALL)
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_transformers(family: str, overrides: dict[str, Any], tmp_path: Path) -> None:
    """Whole, in pieces, step by step, and with rows padded."""
    oracle = deltanet.model_of(family, **overrides)
    model = open_model(deltanet.save(tmp_path / "m", oracle))
    expected = logits_of(oracle, TOKENS)
    for sizes in ([100], [*[1] * 5, 66, 1, 1, 27]):  # the convolution sees four tokens, a chunk has 64
        assert relative_error(logits_in_pieces(model, TOKENS, sizes), expected) < 1e-5
    padded = Model(model.path, model.architecture, pad(model.graph, 192), (), {})
    assert padded.graph.hidden_size in (192, 384)
    assert_same_logits(padded, oracle, TOKENS)


def test_shares_as_they_are(tmp_path: Path) -> None:
    oracle = deltanet.model_of("qwen3_next", norm_topk_prob=False)
    assert_same_logits(open_model(deltanet.save(tmp_path / "m", oracle)), oracle, TOKENS)


@pytest.mark.parametrize("drafts", ["apart", "fused", None])
@pytest.mark.parametrize("fused", [True, False], ids=["experts fused", "experts apart"])
@pytest.mark.parametrize("family", FAMILIES)
def test_published_names(family: str, fused: bool, drafts: str | None, tmp_path: Path) -> None:
    oracle = deltanet.model_of(family)
    model = open_model(deltanet.save_published(tmp_path / "m", oracle, fused, drafts))
    assert_same_logits(model, oracle, TOKENS)
    assert len(model.graph.predictions) == (drafts is not None)
    vision = ["2 tensors of the vision tower are left out: the model reads text alone"]
    assert [*model.graph.notes] == (vision if family != "qwen3_next" else [])


@pytest.mark.parametrize("family", FAMILIES)
def test_in_memory_names(family: str, tmp_path: Path) -> None:
    oracle = deltanet.model_of(family)
    assert_same_logits(open_model(deltanet.save(tmp_path / "m", oracle, in_memory_names=True)), oracle, TOKENS)


@pytest.mark.parametrize("heads", [{}, {"linear_key_head_dim": 48, "linear_value_head_dim": 48}], ids=["whole", "cut"])
@pytest.mark.parametrize("family", FAMILIES)
def test_fp8_checkpoint(family: str, heads: dict[str, int], tmp_path: Path) -> None:
    """Heads are whole blocks of 128 rows or not; they are put in another order either way."""
    oracle = deltanet.model_of(family, seed=1, linear_num_value_heads=6, **heads)
    folder = deltanet.save_published(tmp_path / "m", oracle, fp8=True)
    assert_same_logits(open_model(folder), oracle, TOKENS)


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_checkpoint(family: str, tmp_path: Path) -> None:
    """Stored BF16 is exact in float32: the oracle computes in float32 with the rounded weights."""
    oracle = deltanet.model_of(family, seed=2)
    with torch.no_grad():
        for parameter in oracle.parameters():
            parameter.copy_(parameter.bfloat16())
    assert_same_logits(open_model(deltanet.save(tmp_path / "m", copy.deepcopy(oracle).bfloat16())), oracle, TOKENS)


@pytest.mark.parametrize("experts", ["nvfp4", "nvfp4_compressed"])
@pytest.mark.parametrize("family", FAMILIES)
def test_nvfp4_checkpoint(family: str, experts: Any, tmp_path: Path) -> None:
    """NVIDIA's mixture of Qwen3.6: experts, or dense layers, and the head in NVFP4, what mixes tokens in FP8."""
    import transformers

    def encoding(module: str) -> Any:
        if (".mlp." in module and module.endswith("_proj")) or module == "lm_head":
            return experts
        return "fp8" if module.endswith(("_proj", "in_proj_qkv", "in_proj_z", "in_proj_qkvz")) else None

    oracle = deltanet.model_of(family, seed=3, linear_num_value_heads=6)
    plain = deltanet.save(tmp_path / "plain", oracle)
    values = modelopt.rewrite(plain, tmp_path / "quantized", encoding)
    exact = modelopt.dequantized(plain, tmp_path / "exact", values)
    kind = getattr(transformers, type(oracle).__name__)
    assert_same_logits(
        open_model(tmp_path / "quantized"), kind.from_pretrained(exact, dtype=torch.float32).eval(), TOKENS
    )
