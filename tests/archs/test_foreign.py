"""Checkpoints of other tools: read by their shapes, or refused with what they are; drafts never block a model."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import real_models
from moecast.archs import minimax_m2, nemotron_h
from moecast.archs.config import Config
from moecast.archs.encodings import BlockScaled, Scaled
from moecast.archs.expressions import TensorInfo
from moecast.archs.weights import Role
from moecast.errors import BadInput
from moecast.sources.checkpoint import read_header, read_tensors

EXAMPLES = Path(__file__).parents[2] / "examples"
Tensors = list[TensorInfo]


def minimax() -> tuple[Config, Tensors]:
    folder = EXAMPLES / "minimax-m2-tiny"
    return Config(json.loads((folder / "config.json").read_text()), "config.json"), list(read_tensors(folder))


def added(*endings: str, dtype: str = "F32", instead: bool = False) -> Callable[[Tensors], Tensors]:
    """Tensors beside every matrix of attention, or instead of it."""

    def change(tensors: Tensors) -> Tensors:
        found = [t for t in tensors if t.name.endswith("_proj.weight")]
        kept = [t for t in tensors if not (instead and "_proj.weight" in t.name)]
        return kept + [
            TensorInfo(f"{t.name.removesuffix('.weight')}.{ending}", dtype, (4,), t.file, 0, 16)
            for t in found
            for ending in endings
        ]

    return change


def below(prefix: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: [replace(tensor, name=prefix + tensor.name) for tensor in tensors]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (added("qweight", "qzeros", "scales", dtype="I32", instead=True), "neither GPTQ nor AWQ packed"),
        (added("weight.absmax"), "bitsandbytes"),
        (added("SCB"), "bitsandbytes"),
        (added("weight_packed", "weight_shape", dtype="I32", instead=True), "weight_packed .* expected I32 in 2 dimen"),
        (added("scales", "biases"), "MLX"),
        (added("lora_A.weight", "lora_B.weight", instead=True), "adapter"),
        (lambda tensors: [t for t in added("lora_A.weight")(tensors) if "lora" in t.name], "adapter"),
        (below("language_model."), "all names begin with 'language_model.'"),
        (below("_orig_mod."), "all names begin with '_orig_mod.'"),
        (below("base_model.model."), "all names begin with 'base_model.model.'"),
        (lambda tensors: [t for t in tensors if "q_proj" not in t.name], "is missing: the checkpoint is incomplete"),
    ],
)  # fmt: skip
def test_what_stands_there_instead_is_said(change: Callable[[Tensors], Tensors], message: str) -> None:
    config, tensors = minimax()
    with pytest.raises(BadInput, match=message) as error:
        minimax_m2.ARCHITECTURE.from_checkpoint(config, change([t for t in tensors if "scale_inv" not in t.name]))
    assert "\n" not in str(error.value) and len(str(error.value)) < 300


def test_pointers_of_git_lfs_are_recognized(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n")
    with pytest.raises(BadInput, match="Git LFS pointer"):
        list(read_header(path))


@pytest.mark.parametrize("ending", ["weight_scale", "weight_scale_inv", "scale"])
@pytest.mark.parametrize(
    ("shape", "kind"),
    [((3, 2), BlockScaled), ((), Scaled), ((1,), Scaled), ((384,), Scaled), ((384, 1), Scaled), ((2, 3), None)],
)
def test_float8_is_what_the_shapes_say(ending: str, shape: tuple[int, ...], kind: type | None) -> None:
    config, tensors = minimax()
    name = "model.layers.0.self_attn.q_proj.weight"  # [384, 256]
    old = next(t for t in tensors if t.name == f"{name}_scale_inv")
    new = replace(old, name=f"{name.removesuffix('weight')}{ending}", shape=shape)
    changed = [new if t is old else t for t in tensors]
    if kind is None:
        with pytest.raises(BadInput, match=rf"{ending} in .* has shape \[2, 3\], expected \[3, 2\]"):
            minimax_m2.ARCHITECTURE.from_checkpoint(config, changed)
        return
    graph = minimax_m2.ARCHITECTURE.from_checkpoint(config, changed)
    assert type(next(w for w in graph.weights() if w.role is Role.ATTENTION_Q).source) is kind


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.rotary_emb.inv_freq",
        "model.layers.0.self_attn.attn.k_scale",
        "model.layers.1.self_attn.kv_scale",
        "model.layers.0.self_attn.k_proj.output_scale",
        "model.layers.1.self_attn.attn.v_zero_point",
        "lm_head.weight_scale",
    ],
)
def test_known_leftovers_are_noted(name: str) -> None:
    config, tensors = minimax()
    extra = TensorInfo(name, "F32", (1,), "x", 0, 4)
    graph = minimax_m2.ARCHITECTURE.from_checkpoint(config, [*tensors, extra])
    assert graph.notes == (f"{name} are not used: no weight depends on them",)


def nemotron_with_draft(experts: int) -> tuple[Config, Tensors]:
    """The example with copies of its layers as a drafting block."""
    folder = EXAMPLES / "nemotron-3-tiny"
    values, tensors = json.loads((folder / "config.json").read_text()), list(read_tensors(folder))
    kinds, hidden = values["hybrid_override_pattern"], values["hidden_size"]
    draft = []
    for layer, kind in enumerate("*E"):
        begin = f"backbone.layers.{kinds.index(kind)}."
        draft += [
            replace(t, name=f"mtp.layers.{layer}.{t.name.removeprefix(begin)}")
            for t in tensors
            if t.name.startswith(begin)
        ]
    norms = ("0.enorm", "0.hnorm", "1.final_layernorm")
    draft += [TensorInfo(f"mtp.layers.{n}.weight", "BF16", (hidden,), "x", 0, 2 * hidden) for n in norms]
    draft.append(TensorInfo("mtp.layers.0.eh_proj.weight", "BF16", (hidden, 2 * hidden), "x", 0, 4 * hidden**2))
    draft = [t for t in draft if ".experts." not in t.name or int(t.name.split(".experts.")[1].split(".")[0]) < experts]
    values |= {"num_nextn_predict_layers": 1, "mtp_hybrid_override_pattern": "*E"}
    return Config(values, "config.json"), tensors + draft


def test_damaged_drafts_are_left_out() -> None:
    config, tensors = nemotron_with_draft(99)
    whole = nemotron_h.MIXTURE.from_checkpoint(config, tensors)
    assert len(whole.predictions) == 1 and not whole.notes
    config, tensors = nemotron_with_draft(7)
    without = nemotron_h.MIXTURE.from_checkpoint(config, tensors)
    assert not without.predictions and without.layers == whole.layers
    assert "multi-token prediction is left out" in without.notes[0] and "experts.7." in without.notes[0]
    other = Config(dict(config._values) | {"mtp_hybrid_override_pattern": "*M"}, "config.json")
    assert "drafting block" in nemotron_h.MIXTURE.from_checkpoint(other, tensors).notes[0]
    fewer = [t for t in tensors if t.name != "backbone.norm_f.weight"]
    with pytest.raises(BadInput, match=r"backbone\.norm_f\.weight is missing"):
        nemotron_h.MIXTURE.from_checkpoint(config, fewer)


def test_published_configurations_need_no_leftovers() -> None:
    graph = minimax_m2.ARCHITECTURE.from_checkpoint(real_models.config("minimax-m2.7"), real_models.minimax_m2())
    assert graph.notes == ()
