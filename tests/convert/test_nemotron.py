"""Nemotron files in llama.cpp: every kind of layer, zero padding, NVFP4 as it is, multi-token prediction."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import checkpoints
import gguf
import llama
import modelopt
import nemotron_checkpoints as nemotron
import numpy as np
import pytest
import torch
from conversions import convert
from forward import runner_logits
from moecast.convert.gguf.metadata import gguf_metadata
from moecast.convert.gguf.writer import GGUFWriter
from moecast.convert.onepass import FileToWrite, run_pass
from moecast.errors import BadInput
from moecast.progress import NoProgress
from moecast.quant.planning.padding import pad
from moecast.quant.planning.plan import plan_tensors
from moecast.quant.planning.recipes import recipe_named
from moecast.runner import parity
from moecast.runner.settings import Evaluation
from moecast.sources.model import Model, open_model
from moecast.sources.storage import Storage
from nemotron_checkpoints import DENSE, GROUPED, LATENT, PARTLY_PADDED, WITH_DENSE_LAYER
from safetensors.torch import load_file
from torch import Tensor

pytestmark = pytest.mark.numeric

KINDS: dict[str, dict[str, Any]] = {
    "full": {},
    "latent": LATENT,
    "groups": LATENT | GROUPED,
    "dense": DENSE,
    "partly padded": PARTLY_PADDED,
    "every expert": LATENT | {"num_experts_per_tok": 16},
}
Make = Callable[..., Path]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """Checkpoint folders by kind, each built once."""
    root = tmp_path_factory.mktemp("nemotron")

    def make(kind: str, drafting: bool = False) -> Path:
        folder = root / f"{kind}{'-mtp' if drafting else ''}"
        if not folder.exists():
            model = nemotron.nemotron_model(**KINDS[kind])
            nemotron.save_nemotron(folder, model)
            if drafting:
                nemotron.add_drafting_block(folder, model)
        return folder

    return make


def divergence(path: Path, reference: Model | None = None) -> float:
    """Mean KL divergence at 96 positions, of llama.cpp on a file from our runner on it or on another model."""
    model = reference or open_model(path)
    tokens = torch.randint(0, 512, (1, 96), generator=torch.Generator().manual_seed(0))
    theirs = llama.run_isolated(path, tokens[0].tolist())
    return llama.mean_divergence(runner_logits(model, tokens)[0].numpy(), theirs)


def llama_perplexity(path: Path) -> float:
    with llama.Engine(path, context=128, threads=2) as engine:
        ids = engine.tokenize(checkpoints.TEXT.read_text(encoding="utf-8").removesuffix("\n"), add_special=True)
        return llama.perplexity(engine, ids[: 4 * 128], 128)[0]


@pytest.mark.parametrize("kind", ["full", "latent", "groups", "dense"])
def test_unquantized_file_in_llama(made: Make, kind: str, tmp_path: Path) -> None:
    """The runner equals transformers (tests/runner), so the checkpoint itself may be the reference."""
    path = convert(made(kind), tmp_path, "F32", calibration=None, verify=False).files[0]
    assert divergence(path, open_model(made(kind))) < 1e-8


@pytest.mark.parametrize("kind", ["every expert", "dense"])
def test_bfloat16_file_in_llama(made: Make, kind: str, tmp_path: Path) -> None:
    """llama.cpp rounds activations to BF16; with all experts chosen, none can be chosen differently for that."""
    assert divergence(convert(made(kind), tmp_path, "BF16", calibration=None, verify=False).files[0]) < 1e-5


@pytest.mark.parametrize("quant", ["Q8_0", "Q4_K_M", "Q3_K_M", "IQ4_XS"])
def test_quantized_file_in_llama(made: Make, quant: str, tmp_path: Path) -> None:
    """llama.cpp rounds activations to 8 bits; every width is padded where the blocks are of 256."""
    result = convert(made("groups"), tmp_path, quant, calibration=None, verify=False, padding=True)
    assert not any("instead of" in problem for problem in result.problems)
    assert any("128 to 256, 192 to 256, 320 to 512, 448 to 512" in p for p in result.problems) == (quant != "Q8_0")
    assert divergence(result.files[0]) < 3e-3


@pytest.mark.parametrize("quant", ["Q4_K_M", "Q3_K_M"])
def test_partly_padded_file_in_llama(made: Make, quant: str, tmp_path: Path) -> None:
    """The widths that make the file smaller are padded, the experts' own, which would make it larger, is not."""
    result = convert(
        made("partly padded"), tmp_path, quant, calibration=None, file=checkpoints.TEXT, context=128, chunks=4
    )
    assert any("which changes no result: 480 to 512; that makes the file" in problem for problem in result.problems)
    fields = gguf.GGUFReader(result.files[0]).fields
    keys = ("embedding_length", "expert_feed_forward_length", "expert_shared_feed_forward_length")
    assert [fields[f"nemotron_h_moe.{key}"].contents() for key in keys] == [512, 160, 512]
    assert divergence(result.files[0]) < 3e-3
    assert result.parity
    assert llama_perplexity(result.files[0]) == pytest.approx(result.parity.perplexity_candidate, rel=0.01)


def test_dense_layer_beside_experts_is_refused(tmp_path: Path) -> None:
    folder = nemotron.save_nemotron(tmp_path / "m", nemotron.nemotron_model(**WITH_DENSE_LAYER))
    with pytest.raises(BadInput, match="dense layers beside layers of experts"):
        convert(folder, tmp_path / "out", "F32", calibration=None, verify=False)


def test_metadata(made: Make, tmp_path: Path) -> None:
    fields = gguf.GGUFReader(convert(made("groups"), tmp_path, "F32", calibration=None, verify=False).files[0]).fields
    values = {key.removeprefix("nemotron_h_moe."): fields[key].contents() for key in fields}
    assert values["general.architecture"] == "nemotron_h_moe"
    assert values["attention.head_count_kv"] == [0, 0, 2, 0, 0, 0]
    assert values["feed_forward_length"] == [0, 320, 0, 0, 320, 320]
    assert (values["expert_group_count"], values["expert_group_used_count"]) == (4, 2)
    assert values["moe_latent_size"] == 128 and values["expert_weights_scale"] == 5.0
    assert values["ssm.inner_size"] == 512 and values["block_count"] == 6
    dense = gguf.GGUFReader(
        convert(made("dense"), tmp_path / "dense", "F32", calibration=None, verify=False).files[0]
    ).fields
    assert dense["general.architecture"].contents() == "nemotron_h"
    assert dense["nemotron_h.feed_forward_length"].contents() == [0, 224, 0, 0, 224]


@pytest.mark.whole
@pytest.mark.parametrize("kind", ["full", "groups", "dense"])
def test_padding_changes_no_result(made: Make, kind: str, tmp_path: Path) -> None:
    """The same weights in float32 with and without padding: llama.cpp and the runner cannot tell them apart."""
    model = open_model(made(kind))
    plain = convert(made(kind), tmp_path, "F32", calibration=None, verify=False).files[0]
    plan = plan_tensors(pad(model.graph, 256), recipe_named("F32"))
    assert all(
        t.weight.columns % 256 == 0 for t in plan.tensors if t.weight.name.endswith(("exps.weight", "in.weight"))
    )
    assert {t.weight.columns % 256 for t in plan.tensors if t.weight.name.endswith("exps.weight")} <= {0}
    padded = tmp_path / "padded.gguf"
    with GGUFWriter(padded, gguf_metadata(model, plan, "padded", None, {}, NoProgress()), plan.stored) as writer:
        run_pass(model, [FileToWrite(plan, writer)])
    assert divergence(padded, model) < 1e-8
    assert llama_perplexity(padded) == pytest.approx(llama_perplexity(plain), rel=1e-5)
    result = parity(plain, padded, Evaluation(checkpoints.TEXT, 64, 2))
    assert abs(result.mean_kld) < 1e-7 and max(result.layer_errors) < 1e-5


def test_no_padding_falls_back_loudly(made: Make, tmp_path: Path) -> None:
    result = convert(made("full"), tmp_path, "Q4_K_M", padding=False, calibration=None, verify=False)
    assert any("rows of 192, not a multiple of 256: stored as Q5_0 instead of Q4_K" in p for p in result.problems)
    assert divergence(result.files[0]) < 3e-3


@pytest.fixture(scope="module")
def nvfp4(made: Make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The mixture of the Super release."""
    folder = tmp_path_factory.mktemp("nvfp4") / "m"
    modelopt.rewrite(made("latent"), folder, modelopt.experts_in_nvfp4)
    return folder


def test_native_keeps_codes_and_scales(nvfp4: Path, tmp_path: Path) -> None:
    """gguf-py finds the checkpoint's bytes in the file, expert by expert, and the values are the checkpoint's."""
    path = convert(nvfp4, tmp_path, "native", calibration=None, verify=False).files[0]
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    source = load_file(nvfp4 / "model.safetensors")
    model, file = open_model(nvfp4), open_model(path)
    ours, theirs = ({w.name: w for w in m.graph.weights()} for m in (model, file))
    for name, module in (("ffn_up_exps", "up_proj"), ("ffn_down_exps", "down_proj")):
        tensor = stored[f"blk.4.{name}.weight"]
        assert tensor.tensor_type == gguf.GGMLQuantizationType.NVFP4
        for expert in range(16):
            prefix = f"backbone.layers.4.mixer.experts.{expert}.{module}"
            codes, scales = unpacked(torch.from_numpy(tensor.data[expert].copy()))
            expected = source[f"{prefix}.weight"]
            assert torch.equal(codes, torch.stack((expected & 15, expected >> 4), -1).flatten(1))
            assert torch.equal(scales, source[f"{prefix}.weight_scale"].view(torch.uint8))
            assert stored[f"blk.4.{name}.scale"].data[expert] == source[f"{prefix}.weight_scale_2"].numpy()
            weight = f"blk.4.{name}.weight"
            assert torch.equal(file.load(theirs[weight], expert), model.load(ours[weight], expert))
    assert divergence(path) < 3e-3


def unpacked(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Codes [rows, columns] and scales [rows, columns / 16] of ggml's NVFP4 rows."""
    blocks = rows.view(len(rows), -1, 36)
    groups = blocks[..., 4:].reshape(len(rows), -1, 4, 8)
    return torch.cat((groups & 15, groups >> 4), -1).reshape(len(rows), -1), blocks[..., :4].reshape(len(rows), -1)


def test_native_file_equals_its_checkpoint(nvfp4: Path, tmp_path: Path) -> None:
    """What is not NVFP4 is 16 bits as it was or FP8 in Q8_0."""
    result = convert(nvfp4, tmp_path, "native", context=64, chunks=2, file=checkpoints.TEXT)
    assert result.parity and result.parity.mean_kld < 1e-3
    types = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(result.files[0]).tensors}
    assert types["blk.0.ssm_in.weight"] == "Q8_0" and types["blk.2.attn_q.weight"] == "F32"
    assert {name for name in types if name.endswith(".scale")} == {
        f"blk.{layer}.ffn_{kind}_exps.scale" for layer in (1, 4, 5) for kind in ("up", "down")
    }


def test_nvfp4_where_the_engine_applies_no_scale(made: Make, tmp_path: Path) -> None:
    """llama.cpp ignores scales of latent projections: these are decoded and quantized; the others keep theirs."""
    modelopt.rewrite(made("latent"), tmp_path / "m", lambda m: "nvfp4_compressed" if "mixer." in m else None)
    path = convert(tmp_path / "m", tmp_path / "out", "native", calibration=None, verify=False).files[0]
    types = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors}
    assert types["blk.1.ffn_latent_down.weight"] == "Q8_0" and "blk.1.ffn_latent_down.scale" not in types
    assert types["blk.2.attn_q.weight"] == types["blk.0.ssm_in.weight"] == "NVFP4"
    assert types["blk.1.ffn_gate_inp.weight"] == "F32"
    assert divergence(path) < 3e-3


def test_quantized_checkpoint_to_other_types(nvfp4: Path, tmp_path: Path) -> None:
    path = convert(nvfp4, tmp_path, "F32", calibration=None, verify=False).files[0]
    assert divergence(path, open_model(nvfp4)) < 1e-8
    path = convert(nvfp4, tmp_path, "Q4_K_M", calibration=None, verify=False).files[0]
    assert divergence(path) < 3e-3


@pytest.mark.parametrize("value", [0x7F, 0xFF, 0x81])
def test_scale_that_is_not_one_is_named(nvfp4: Path, tmp_path: Path, value: int) -> None:
    folder = checkpoints.copied(nvfp4, tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    name = "backbone.layers.1.mixer.experts.2.up_proj.weight_scale"
    tensors[name].view(torch.uint8)[3, 1] = value
    modelopt.save_file(tensors, folder / "model.safetensors")
    with pytest.raises(BadInput, match=rf"{name} in .* holds NaN or a negative scale"):
        convert(folder, tmp_path / "out", "native", calibration=None, verify=False)
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.whole
def test_drafting_block_is_folded_in(made: Make, tmp_path: Path) -> None:
    """It loads, changes nothing, and comes back from the file as it was."""
    folder = made("latent", drafting=True)
    with_block = convert(folder, tmp_path / "with", "Q8_0", calibration=None, verify=False).files[0]
    without = convert(folder, tmp_path / "without", "Q8_0", mtp=False, calibration=None, verify=False).files[0]
    assert llama_perplexity(with_block) == llama_perplexity(without)
    names = {tensor.name for tensor in gguf.GGUFReader(with_block).tensors}
    added = names - {tensor.name for tensor in gguf.GGUFReader(without).tensors}
    assert len(added) == 18 and all(name.startswith("blk.6.") for name in added)
    fields = gguf.GGUFReader(with_block).fields
    assert fields["nemotron_h_moe.block_count"].contents() == 7
    assert fields["nemotron_h_moe.nextn_predict_layers"].contents() == 1
    assert fields["nemotron_h_moe.attention.head_count_kv"].contents() == [0, 0, 2, 0, 0, 0, 2]
    assert fields["nemotron_h_moe.feed_forward_length"].contents() == [0, 320, 0, 0, 320, 320, 320]
    exact = open_model(convert(folder, tmp_path / "exact", "F32", calibration=None, verify=False).files[0])
    model = open_model(folder)
    pairs = {w.name: w for w in exact.graph.weights()}
    for weight in model.graph.weights():
        if weight.name.startswith("blk.6."):
            expert = 3 if weight.experts else None
            assert torch.equal(model.load(weight, expert), exact.load(pairs[weight.name], expert))


def test_drafting_block_or_padding_of_the_hidden_size(made: Make, tmp_path: Path) -> None:
    folder = made("latent", drafting=True)
    unpadded = convert(folder, tmp_path / "unpadded", "Q4_K_M", calibration=None, verify=False)  # is smaller
    assert "nemotron_h_moe.nextn_predict_layers" in gguf.GGUFReader(unpadded.files[0]).fields
    result = convert(folder, tmp_path / "padded", "Q4_K_M", calibration=None, verify=False, padding=True)
    assert any("left out multi-token prediction" in problem for problem in result.problems)
    assert gguf.GGUFReader(result.files[0]).fields["nemotron_h_moe.embedding_length"].contents() == 256
    kept = convert(folder, tmp_path / "kept", "Q4_K_M", mtp=True, calibration=None, verify=False, padding=True)
    fields = gguf.GGUFReader(kept.files[0]).fields
    assert fields["nemotron_h_moe.embedding_length"].contents() == 192
    assert fields["nemotron_h_moe.expert_feed_forward_length"].contents() == 512
    assert divergence(kept.files[0]) < 3e-3
    with pytest.raises(BadInput, match="--mtp: this model has no blocks for multi-token prediction"):
        convert(made("latent"), tmp_path / "none", "Q4_K_M", mtp=True, calibration=None, verify=False)


@pytest.mark.parametrize("quant", ["Q4_K_M", "native"])
def test_no_stack_of_experts_is_ever_held(
    nvfp4: Path, quant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No read, by conversion or comparison, is larger than one expert or one piece of a plain matrix."""
    largest: dict[str, int] = {}
    read = Storage.read

    def watched(self: Storage, tensor: Any, start: int = 0, stop: int | None = None) -> Tensor:
        data = read(self, tensor, start, stop)
        largest[tensor.name] = max(largest.get(tensor.name, 0), data.numel())
        return data

    monkeypatch.setattr(Storage, "read", watched)
    path = convert(nvfp4, tmp_path, quant, calibration=None, context=64, chunks=2, file=checkpoints.TEXT).files[0]
    parity(nvfp4, path, Evaluation(checkpoints.TEXT, 64, 2))
    stacks = {name: size for name, size in largest.items() if name.endswith("_exps.weight")}
    whole = {t.name: t.n_bytes for t in gguf.GGUFReader(next(tmp_path.glob("*.gguf"))).tensors}
    assert len(stacks) == 6 and all(size * 16 == whole[name] for name, size in stacks.items())
    assert np.mean([".experts." in name for name in largest]) > 0.5
