"""gpt-oss in the runner against transformers: every variant, in every form that experts are stored in."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import gpt_oss_checkpoints as gpt_oss
import pytest
import torch
from checkpoints import edit_config
from forward import assert_same_logits, random_tokens, relative_error, runner_logits
from gpt_oss_checkpoints import BEYOND_LLAMA, UNROUNDED, VARIANTS
from moecast.quant.planning.padding import pad
from moecast.sources.model import Model, open_model
from toy_models import STEPS_AND_PIECES, logits_in_pieces, logits_of

pytestmark = pytest.mark.numeric

TOKENS = random_tokens(3, 80)
ALL = VARIANTS | BEYOND_LLAMA | {"limits as they are": UNROUNDED}


@pytest.mark.parametrize("overrides", ALL.values(), ids=ALL)
def test_logits_equal_transformers(overrides: dict[str, Any], tmp_path: Path) -> None:
    oracle = gpt_oss.gpt_oss_model(**overrides)
    assert_same_logits(open_model(gpt_oss.save_gpt_oss(tmp_path / "m", oracle)), oracle, TOKENS)


def test_limits_of_yarn_make_a_difference(tmp_path: Path) -> None:
    """The published ones are not rounded; rounded, they are another model."""
    folder = gpt_oss.save_gpt_oss(tmp_path / "m", gpt_oss.gpt_oss_model(**UNROUNDED))
    error = relative_error(runner_logits(open_model(folder), TOKENS), logits_of(gpt_oss.gpt_oss_model(), TOKENS))
    assert error > 1e-3


def test_nothing_said_of_rotary_embeddings(tmp_path: Path) -> None:
    """Then it is YaRN, as of the published models."""
    from transformers import GptOssConfig

    default = GptOssConfig().rope_parameters
    assert default["rope_theta"] == 150_000 and default["truncate"] is False
    oracle = gpt_oss.gpt_oss_model(rope_parameters=default)
    folder = gpt_oss.without_rope(gpt_oss.save_gpt_oss(tmp_path / "m", oracle))
    assert_same_logits(open_model(folder), oracle, TOKENS)


@pytest.mark.parametrize("said", [{"rope_parameters": {}}, {"rope_parameters": {"rope_theta": 1e4}},
                                  {"rope_scaling": {"rope_theta": 1e4}}])  # fmt: skip
def test_a_section_of_rotary_settings_without_a_type(said: dict[str, Any], tmp_path: Path) -> None:
    """Then it is none, whatever the published models have."""
    from transformers import GptOssConfig, GptOssForCausalLM

    stored = gpt_oss.gpt_oss_model()
    folder = gpt_oss.without_rope(gpt_oss.save_gpt_oss(tmp_path / "m", stored))
    edit_config(folder, **said)
    oracle = GptOssForCausalLM(GptOssConfig(**{**gpt_oss.GPT_OSS, "rope_parameters": None, **said})).eval()
    oracle.load_state_dict(stored.state_dict())
    assert_same_logits(open_model(folder), oracle, TOKENS)


@pytest.mark.parametrize("overrides", [UNROUNDED, VARIANTS["odd widths"]], ids=["published", "odd widths"])
def test_mxfp4_checkpoint(overrides: dict[str, Any], tmp_path: Path) -> None:
    """transformers' own decoding is the oracle; the floats that it saves under the names of codes are the same."""
    oracle = gpt_oss.save_gpt_oss_mxfp4(tmp_path / "m", gpt_oss.gpt_oss_model(seed=1, **overrides))
    assert_same_logits(open_model(tmp_path / "m"), oracle, TOKENS)
    assert_same_logits(open_model(gpt_oss.save_gpt_oss_dequantized(tmp_path / "floats", oracle)), oracle, TOKENS)


def test_bfloat16_checkpoint(tmp_path: Path) -> None:
    """Stored BF16 is exact in float32: the oracle computes in float32 with the rounded weights."""
    oracle = gpt_oss.gpt_oss_model(seed=2)
    with torch.no_grad():
        for parameter in oracle.parameters():
            parameter.copy_(parameter.bfloat16())
    folder = gpt_oss.save_gpt_oss(tmp_path / "m", copy.deepcopy(oracle).bfloat16())
    assert_same_logits(open_model(folder), oracle, TOKENS)


@pytest.mark.parametrize("overrides", ALL.values(), ids=ALL)
def test_steps_and_pieces_of_a_text(overrides: dict[str, Any], tmp_path: Path) -> None:
    oracle = gpt_oss.gpt_oss_model(**overrides)
    model = open_model(gpt_oss.save_gpt_oss(tmp_path / "m", oracle))
    assert relative_error(logits_in_pieces(model, TOKENS, STEPS_AND_PIECES), logits_of(oracle, TOKENS)) < 1e-5


@pytest.mark.parametrize("mxfp4", [False, True], ids=["floats", "MXFP4"])
@pytest.mark.parametrize("overrides", ALL.values(), ids=ALL)
def test_padding_changes_no_result(overrides: dict[str, Any], mxfp4: bool, tmp_path: Path) -> None:
    oracle = gpt_oss.gpt_oss_model(**overrides | {"hidden_size": 224, "intermediate_size": 96})
    if mxfp4 and "rope_parameters" in overrides:
        pytest.skip("as without the other form of rotary embeddings")
    save = gpt_oss.save_gpt_oss_mxfp4 if mxfp4 else gpt_oss.save_gpt_oss
    saved = save(tmp_path / "m", oracle)
    model = open_model(tmp_path / "m")
    padded = Model(model.path, model.architecture, pad(model.graph, 128), (), {})
    assert padded.graph.hidden_size == 256 and padded.graph.layers[0].operations[1].expert_size == 128
    assert_same_logits(padded, saved if mxfp4 else oracle, TOKENS)
