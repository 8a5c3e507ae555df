"""Unquantized files against those of llama.cpp's own converter: the same tensors, byte for byte, and the same keys."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import checkpoints
import cohere_checkpoints as cohere
import deepseek_checkpoints
import deepseek_v3_checkpoints as deepseek_v3
import deltanet_checkpoints as deltanet
import gemma4_checkpoints as gemma
import gguf
import gpt_oss_checkpoints as gpt_oss
import int4_packs
import minimax_m3_checkpoints as m3
import pytest
import qwen3_checkpoints as qwen3
import torch
from conversions import convert
from forward import random_tokens, runner_logits
from llama_converter import Converter, llama_converter
from moecast.sources.model import open_draft, open_model
from sparse_checkpoints import VARIANTS, sparse_model
from trained_examples import EXAMPLES

pytestmark = pytest.mark.whole

Save = Callable[[Path], object]


def published(family: str, **how: Any) -> Save:
    """With Gated DeltaNet, whose heads are put in another order, and a block for drafting."""
    return lambda folder: deltanet.save_published(folder, deltanet.model_of(family, linear_num_value_heads=6), **how)


def example(name: str) -> Save:
    """A trained checkpoint in the published format."""
    return lambda folder: checkpoints.copied(EXAMPLES / name, folder)


def sparse_attention(variant: str, **how: Any) -> Save:
    """As the Hub has it."""
    family, overrides = VARIANTS[variant]
    return lambda folder: deepseek_v3.save_published(folder, sparse_model(family, **overrides), **how)


def packed_qwen3(folder: Path, style: str) -> None:
    """In whole numbers of 4 bits, which both decode."""
    plain = qwen3.save_qwen3(folder.parent / "plain", qwen3.qwen3_model(hidden_size=128, moe_intermediate_size=96))
    int4_packs.repacked(plain, folder, folder.parent / "exact", style)


def deepseek_v3_as(encoding: str, variant: str) -> Save:
    """As the Hub has it, with blocks of FP8 that are cut off, or below other names with experts of 4 bits."""
    model = {"seed": 5, **deepseek_v3.VARIANTS[variant]}
    return lambda folder: deepseek_v3.save_published(folder, deepseek_v3.deepseek_model(**model), encoding)


CHECKPOINTS: dict[str, Save] = {
    "MiniMax": lambda folder: checkpoints.save_minimax(folder, checkpoints.minimax_model()),
    "MiniMax in FP8": example("minimax-m2-tiny"),
    "MiniMax M3": lambda folder: m3.save_published(folder, m3.minimax_m3_model(), flattened=True),
    "Nemotron": example("nemotron-3-tiny"),
    "Cohere2 in BF16": lambda folder: cohere.publish_cohere2(folder, cohere.cohere_model(False)),
    "Cohere2-MoE": lambda folder: cohere.save_cohere(folder, cohere.cohere_model(True)),
    "Cohere2-MoE as North": lambda folder: cohere.save_cohere(folder, cohere.cohere_model(True, **cohere.NORTH)),
    "Qwen3": lambda folder: qwen3.save_qwen3(folder, qwen3.qwen3_model()),
    "Qwen3 with YaRN": lambda folder: qwen3.save_qwen3(folder, qwen3.qwen3_model(**qwen3.VARIANTS["yarn"])),
    "Qwen3-Next": published("qwen3_next", fused=False),
    "Qwen3-Next in FP8": published("qwen3_next", fp8=True),
    "Qwen3.5": published("qwen3_5_moe", drafts="apart"),
    "Qwen3.6": published("qwen3_5_moe", drafts="fused"),
    "Qwen3.5 in FP8": published("qwen3_5_moe", fp8=True),
    "Qwen3.5 dense": published("qwen3_5"),
    "Qwen3 in FP8": lambda folder: qwen3.save_qwen3_fp8(folder, qwen3.qwen3_model()),
    "Qwen3 packed by GPTQ": lambda folder: packed_qwen3(folder, "gptq order"),
    "Qwen3 packed by compressed-tensors": lambda folder: packed_qwen3(folder, "compressed"),
    "Gemma 4 with experts": lambda folder: gemma.save_gemma(folder, gemma.gemma_model(**gemma.MIXTURE)),
    "Gemma 4 dense": lambda folder: gemma.publish_gemma(folder, gemma.gemma_model(**gemma.DENSE), gemma.DENSE),
    "Gemma 4 with per-layer embeddings": lambda folder: gemma.save_gemma(folder, gemma.gemma_model(**gemma.PER_LAYER)),
    "DeepSeek V3.2 in FP8": sparse_attention("DeepSeek V3.2", encoding="fp8", drafts=True),
    "GLM-5": lambda folder: deepseek_v3.save_deepseek(folder, sparse_model("glm_moe_dsa")),
    "GLM-5.2 with drafts": sparse_attention("GLM-5.2", encoding="bf16", drafts=True),
    "DeepSeek V3 in FP8": deepseek_v3_as("fp8", "V3"),
    "DeepSeek V3, odd": deepseek_v3_as("fp8", "odd widths"),
    "Kimi K2.5": deepseek_v3_as("int4", "Kimi"),
    "gpt-oss": lambda folder: gpt_oss.save_gpt_oss(folder, gpt_oss.gpt_oss_model()),
}
# Copies of the model's embedding and head beside a drafting block: engines take those of the model without.
REPEATED = ("nextn.embed_tokens.weight", "nextn.shared_head_head.weight")
# What sets decay and strength of linear attention: kept in float32, as what is smaller still.
ROUNDED_BY_THEM = ("ssm_ba.weight", "ssm_beta.weight", "ssm_alpha.weight")
# The lists of layers, which the converter takes from transformers' class, where layers have other names.
MISREAD = {"nemotron_h_moe.attention.head_count_kv", "nemotron_h_moe.feed_forward_length"}


@pytest.fixture(scope="module")
def converted() -> Iterator[Converter]:
    with llama_converter() as converter:
        yield converter


@pytest.mark.parametrize("file_type", [pytest.param("f32", marks=pytest.mark.slow), "bf16"])
@pytest.mark.parametrize("save", CHECKPOINTS.values(), ids=CHECKPOINTS)
def test_same_tensors_and_keys(save: Save, file_type: str, tmp_path: Path, converted: Converter) -> None:
    save(tmp_path / "model")
    written = converted(tmp_path / "model", tmp_path / "theirs.gguf", file_type)
    made = convert(tmp_path / "model", tmp_path, file_type, calibration=None, verify=False).files[0]
    theirs, ours = gguf.GGUFReader(written), gguf.GGUFReader(made)
    stored = {name: stored for name, stored in _separate(theirs).items() if not name.endswith(REPEATED)}
    assert {tensor.name for tensor in ours.tensors} == stored.keys()
    for tensor in ours.tensors:
        expected_type, shape, data = stored[tensor.name]
        if tensor.name.endswith(ROUNDED_BY_THEM) and file_type == "bf16":
            assert tensor.tensor_type == gguf.GGMLQuantizationType.F32
            continue
        assert (tensor.tensor_type, [*tensor.shape]) == (expected_type, shape), tensor.name
        assert tensor.data.tobytes() == data, tensor.name
    architecture = ours.fields["general.architecture"].contents()
    keys = [key for key in ours.fields.keys() & theirs.fields.keys() if key.startswith(f"{architecture}.")]
    assert len(keys) > 8
    for key in {*keys} - MISREAD:
        assert ours.fields[key].contents() == theirs.fields[key].contents(), key
    if MISREAD.isdisjoint(keys):
        graphs = [open_model(path).graph for path in (written, made)]
        assert [(w.name, w.shape) for w in graphs[0].weights()] == [(w.name, w.shape) for w in graphs[1].weights()]


def _separate(file: gguf.GGUFReader) -> dict[str, tuple[gguf.GGMLQuantizationType, list[int], bytes]]:
    """Type, shape and bytes of tensors; gate and up projections of experts that checkpoints have in one are apart."""
    found = {}
    for tensor in file.tensors:
        name, shape, parts = tensor.name, [*map(int, tensor.shape)], [tensor.data]
        names = [name]
        if "ffn_gate_up_exps" in name:
            names = [name.replace("gate_up", kind) for kind in ("gate", "up")]
            shape[1] //= 2
            parts = [tensor.data[:, : shape[1]], tensor.data[:, shape[1] :]]
        for one, part in zip(names, parts, strict=True):
            found[one] = (tensor.tensor_type, shape, part.tobytes())
    return found


@pytest.mark.parametrize("family", ["Qwen3-Next", "Qwen3.5"])
def test_gate_and_up_projection_in_one_tensor(family: str, tmp_path: Path, converted: Converter) -> None:
    """As the converter writes them if asked to."""
    CHECKPOINTS[family](tmp_path / "model")
    path = converted(tmp_path / "model", tmp_path / "fused.gguf", "f32", "--fuse-gate-up-exps")
    assert any("gate_up_exps" in tensor.name for tensor in gguf.GGUFReader(path).tensors)
    tokens = random_tokens(1, 40)
    found, expected = (runner_logits(open_model(source), tokens) for source in (path, tmp_path / "model"))
    assert torch.equal(found, expected)


def test_gpt_oss_keeps_the_same_codes(tmp_path: Path, converted: Converter) -> None:
    """Its converter has one form for MXFP4 whatever type is asked for; all else is BF16, or float32 where small."""
    folder = tmp_path / "model"
    gpt_oss.save_gpt_oss_mxfp4(folder, gpt_oss.gpt_oss_model(hidden_size=288, intermediate_size=96))
    theirs = gguf.GGUFReader(converted(folder, tmp_path / "theirs.gguf", "bf16"))
    ours = gguf.GGUFReader(convert(folder, tmp_path, "native", calibration=None, verify=False).files[0])
    stored = {tensor.name: tensor for tensor in theirs.tensors}
    assert {tensor.name for tensor in ours.tensors} == stored.keys()
    for tensor in ours.tensors:
        assert tensor.tensor_type == stored[tensor.name].tensor_type, tensor.name
        assert tensor.data.tobytes() == stored[tensor.name].data.tobytes(), tensor.name
    mxfp4 = [tensor for tensor in ours.tensors if tensor.tensor_type == gguf.GGMLQuantizationType.MXFP4]
    assert len(mxfp4) == 3 * 4


def test_deepseek_keeps_the_same_codes(tmp_path: Path, converted: Converter) -> None:
    """Its converter has one form for all files: MXFP4 experts, code for code; matrices of FP8 it rounds to Q8_0."""
    folder = EXAMPLES / "deepseek-v4-tiny"
    theirs = gguf.GGUFReader(converted(folder, tmp_path / "theirs.gguf", "bf16"))
    ours = gguf.GGUFReader(convert(folder, tmp_path, "native", calibration=None, verify=False).files[0])
    stored = {tensor.name: tensor for tensor in theirs.tensors}
    assert {tensor.name for tensor in ours.tensors} == stored.keys()
    alike = [tensor for tensor in ours.tensors if tensor.tensor_type == stored[tensor.name].tensor_type]
    for tensor in alike:
        assert tensor.data.tobytes() == stored[tensor.name].data.tobytes(), tensor.name
    assert sum(tensor.tensor_type == gguf.GGMLQuantizationType.MXFP4 for tensor in alike) == 9


@pytest.mark.parametrize("kind", ["prediction", "blocks"])
def test_drafts_of_deepseek(kind: str, tmp_path: Path, converted: Converter) -> None:
    """A file of their own with the same tensors and keys; what the converter rounds to Q8_0 is as it was. Read by us,
    theirs is the same draft."""
    folder = tmp_path / "model"
    deepseek_checkpoints.save_deepseek_hub(folder, deepseek_checkpoints.deepseek_model())
    if kind == "blocks":
        deepseek_checkpoints.add_blocks(folder)
        options = ("--dspark", "--target-model-dir", str(folder))
    else:
        deepseek_checkpoints.add_draft(folder)
        checkpoints.edit_config(folder, num_nextn_predict_layers=1)  # as the published one says
        options = ("--mtp",)
    written = converted(folder, tmp_path / "theirs.gguf", "bf16", *options)
    made = convert(folder, tmp_path / "ours.gguf", "native", calibration=None, verify=False, mtp=True)
    assert made.draft
    theirs, ours = gguf.GGUFReader(written), gguf.GGUFReader(made.draft)
    stored = {tensor.name: tensor for tensor in theirs.tensors}
    assert {tensor.name for tensor in ours.tensors} == stored.keys()
    assert all([*tensor.shape] == [*stored[tensor.name].shape] for tensor in ours.tensors)
    alike = [tensor for tensor in ours.tensors if tensor.tensor_type == stored[tensor.name].tensor_type]
    for tensor in alike:
        assert tensor.data.tobytes() == stored[tensor.name].data.tobytes(), tensor.name
    assert {"BF16", "F32", "MXFP4"} <= {tensor.tensor_type.name for tensor in alike}
    architecture = ours.fields["general.architecture"].contents()
    assert architecture == theirs.fields["general.architecture"].contents()
    keys = [key for key in ours.fields.keys() & theirs.fields.keys() if key.startswith(f"{architecture}.")]
    assert len(keys) > 25 and {key for key in ours.fields if key.startswith(f"{architecture}.")} == {*keys}
    for key in {*keys} - {f"{architecture}.swiglu_clamp_exp"}:  # one number for all blocks, or one each
        assert ours.fields[key].contents() == theirs.fields[key].contents(), key
    model = open_model(converted(folder, tmp_path / "model.gguf", "bf16"))
    graphs = [open_draft(path, model).graph for path in (written, made.draft)]
    assert [(w.name, w.shape) for w in graphs[0].weights()] == [(w.name, w.shape) for w in graphs[1].weights()]
    blocks = [graph.block and (graph.block.sources, graph.block.mask, graph.block.size) for graph in graphs]
    assert blocks == [((2, 3, 4), 510, 5) if kind == "blocks" else None] * 2
