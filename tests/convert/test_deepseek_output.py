"""DeepSeek V4 files in llama.cpp: our runner's log-probabilities over more tokens than all windows hold."""

from __future__ import annotations

import os
from pathlib import Path

import checkpoints
import deepseek_checkpoints
import gguf
import llama
import llama_library
import numpy as np
import pytest
import torch
from conftest import Checkpoint
from conversions import convert
from forward import runner_logits
from moecast.errors import BadInput
from moecast.sources.model import open_model
from safetensors.torch import load_file

pytestmark = pytest.mark.numeric

TOKENS = 400


@pytest.fixture(scope="module")
def flash(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """As the Hub has it: FP8 with E8M0 scales, MXFP4 experts."""
    folder = tmp_path_factory.mktemp("checkpoint") / "deepseek"
    model = deepseek_checkpoints.deepseek_model(seed=1)
    return Checkpoint(folder, deepseek_checkpoints.save_deepseek_hub(folder, model))


def _tokens() -> torch.Tensor:
    return torch.randint(0, 512, (1, TOKENS), generator=torch.Generator().manual_seed(0))


def _divergence_from_llama(path: Path) -> float:
    expected = llama.run_isolated(path, _tokens()[0].tolist())
    return float(llama.mean_divergence(runner_logits(open_model(path), _tokens())[0].numpy(), expected))


@pytest.mark.whole
def test_float32_file_equals_transformers(flash: Checkpoint, tmp_path: Path) -> None:
    path = convert(flash.folder, tmp_path, "F32", calibration=None, verify=False).files[0]
    with torch.no_grad():
        expected = flash.oracle(_tokens()).logits[0].numpy()
    assert llama.mean_divergence(expected, llama.run_isolated(path, _tokens()[0].tolist())) < 1e-9
    assert _divergence_from_llama(path) < 1e-9


@pytest.mark.whole
@pytest.mark.parametrize(
    "quant", ["native", "Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "IQ4_XS", "Q3_K_M", "Q2_K", "IQ3_XXS", "IQ2_XXS", "Q4_0"]
)
def test_quantized_file_in_llama(flash: Checkpoint, tmp_path: Path, quant: str) -> None:
    """llama.cpp rounds activations to 8 bits, which costs up to a few thousandths."""
    result = convert(flash.folder, tmp_path, quant, calibration=None, verify=False)
    assert result.problems == ()
    assert _divergence_from_llama(result.files[0]) < 7e-3


def test_native_is_the_checkpoint_bit_for_bit(flash: Checkpoint, tmp_path: Path) -> None:
    """gguf-py decodes every tensor to the numbers of the oracle; experts keep the very codes and scales."""
    path = convert(flash.folder, tmp_path, "native", calibration=None, verify=False).files[0]
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    state = flash.oracle.state_dict()
    for layer in range(5):
        gate_up = state[f"model.layers.{layer}.mlp.experts.gate_up_proj"].numpy()
        for name, expected in (("gate", gate_up[:, :256]), ("up", gate_up[:, 256:])):
            tensor = stored[f"blk.{layer}.ffn_{name}_exps.weight"]
            assert tensor.tensor_type.name == "MXFP4"
            assert np.array_equal(gguf.dequantize(tensor.data, tensor.tensor_type).reshape(expected.shape), expected)
        tensor = stored[f"blk.{layer}.attn_output_a.weight"]
        assert tensor.tensor_type.name == "BF16"
        expected = state[f"model.layers.{layer}.self_attn.o_a_proj.weight"].numpy()
        assert np.array_equal(gguf.dequantize(tensor.data, tensor.tensor_type), expected)
    checkpoint = {name: t for file in flash.folder.glob("*.safetensors") for name, t in load_file(file).items()}
    assert np.array_equal(stored["blk.1.ffn_gate_tid2eid.weight"].data, checkpoint["layers.1.ffn.gate.tid2eid"].numpy())
    assert _repaired(stored["blk.2.ffn_down_exps.weight"].data[3]) == (
        checkpoint["layers.2.ffn.experts.3.w2.weight"].numpy().tobytes(),
        checkpoint["layers.2.ffn.experts.3.w2.scale"].view(torch.uint8).numpy().tobytes(),
    )


def test_draft_makes_a_file_of_its_own(flash: Checkpoint, tmp_path: Path) -> None:
    """llama.cpp finds every tensor it wants and no other; the numbers are those of the checkpoint."""
    folder = checkpoints.copied(flash.folder, tmp_path / "with-draft")
    draft = deepseek_checkpoints.add_draft(folder)
    plain = convert(folder, tmp_path / "plain", "native", calibration=None, verify=False)
    assert len(plain.files) == 1 and "left out multi-token prediction" in plain.problems[0]
    model, path = convert(folder, tmp_path / "out", "native", mtp=True, calibration=None, verify=False).files
    assert model.read_bytes() == plain.files[0].read_bytes()
    assert path.name == "with-draft-NATIVE-mtp.gguf"
    library = llama_library.load_library()
    handle = library.llama_model_load_from_file(
        os.fsencode(path), llama_library.model_parameters(n_gpu_layers=0, load_mtp=True)
    )
    assert handle is not None, llama_library.failure("llama.cpp cannot load the draft")
    library.llama_model_free(handle)
    reader = gguf.GGUFReader(path)
    assert reader.fields["deepseek4.nextn_predict_layers"].contents() == 1
    assert reader.fields["deepseek4.block_count"].contents() == 6
    stored = {tensor.name: tensor for tensor in reader.tensors}
    assert {name for name in stored if name.startswith("blk.")} == {n for n in stored if n.startswith("blk.5.")}
    both = [deepseek_checkpoints.decode_fp8(draft, f"mtp.0.{name}") for name in ("e_proj", "h_proj")]
    projection = stored["blk.5.nextn.eh_proj.weight"]
    assert np.array_equal(gguf.dequantize(projection.data, projection.tensor_type), torch.cat(both, dim=1).numpy())
    assert np.array_equal(stored["output_hc_fn.weight"].data, draft["mtp.0.hc_head_fn"].numpy())
    norm = stored["blk.5.nextn.shared_head_norm.weight"].data
    assert np.array_equal(norm, draft["mtp.0.norm.weight"].float().numpy())
    with pytest.raises(BadInput, match="it is a draft that runs beside its model only"):
        open_model(path)


def _repaired(rows: np.ndarray) -> tuple[bytes, bytes]:
    """ggml's MXFP4 rows as the Hub's codes and scales."""
    blocks = rows.reshape(len(rows), -1, 17)
    columns = np.concatenate((blocks[..., 1:] & 15, blocks[..., 1:] >> 4), axis=-1)
    packed = columns[..., ::2] | columns[..., 1::2] << 4
    return packed.tobytes(), np.ascontiguousarray(blocks[..., 0]).tobytes()


@pytest.mark.parametrize("quant", ["Q8_0", "Q4_K_M", "Q2_K"])
def test_what_every_token_depends_on_is_spared(flash: Checkpoint, tmp_path: Path, quant: str) -> None:
    path = convert(flash.folder, tmp_path, quant, calibration=None, verify=False).files[0]
    types = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors}
    for name in ("hc_attn_fn", "hc_ffn_fn", "attn_sinks", "attn_compressor_ape", "indexer.proj", "ffn_gate_inp"):
        assert types[f"blk.1.{name}.weight"] == "F32"
    assert types["output_hc_fn.weight"] == "F32" and types["blk.3.exp_probs_b.bias"] == "F32"
    for name in ("attn_compressor_kv", "attn_compressor_gate", "indexer.attn_q_b", "indexer_compressor_kv"):
        assert types[f"blk.1.{name}.weight"] == "Q8_0"
    assert types["blk.1.ffn_gate_tid2eid.weight"] == "I32"
    assert types["blk.1.attn_output_a.weight"] not in {"Q4_0", "Q4_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS", "F16"}
