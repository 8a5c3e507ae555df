"""`moecast quantize`: what llama-quantize's users expect, with the same stock types, in llama.cpp."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import llama
import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from conftest import Checkpoint
from conversions import convert
from forward import runner_logits
from moecast.cli import main
from moecast.quant import quantize
from moecast.sources.model import open_model


@pytest.fixture(scope="module")
def full(minimax_fp8: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint as a float32 GGUF."""
    return convert(minimax_fp8.folder, tmp_path_factory.mktemp("full"), "F32", calibration=None, verify=False).files[0]


@pytest.fixture
def imatrix(full: Path, tmp_path: Path) -> Path:
    """Random statistics in llama-imatrix's GGUF form; expert 3 of layer 0 was never reached."""
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(tmp_path / "imatrix.gguf", "")
    writer.kv_data[0].clear()
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", ["made up"])
    writer.add_uint32("imatrix.chunk_count", 5)
    for tensor in gguf.GGUFReader(full).tensors:
        if tensor.name.startswith("blk.") and len(tensor.shape) > 1:
            columns, experts = int(tensor.shape[0]), int(tensor.shape[2]) if len(tensor.shape) > 2 else 1
            counts = np.full((experts, 1), 40, np.float32)
            sums = rng.lognormal(0, 2, (experts, columns)).astype(np.float32) * counts
            if tensor.name == "blk.0.ffn_up_exps.weight":
                counts[3], sums[3] = 0, 0
            writer.add_tensor(f"{tensor.name}.in_sum2", sums)
            writer.add_tensor(f"{tensor.name}.counts", counts)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tmp_path / "imatrix.gguf"


def _quantize(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["quantize", *(str(argument) for argument in arguments)])


def _tensors(path: Path) -> dict[str, gguf.ReaderTensor]:
    return {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}


def test_same_bytes_as_converting_directly(minimax_fp8: Checkpoint, full: Path, tmp_path: Path) -> None:
    direct = convert(minimax_fp8.folder, tmp_path, "Q4_K_M", calibration=None, verify=False).files[0]
    result = _quantize(full, tmp_path / "out.gguf", "--quant", "Q4_K_M", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["files"] == [str(tmp_path / "out.gguf")]
    expected, found = _tensors(direct), _tensors(tmp_path / "out.gguf")
    assert list(expected) == list(found)
    for name, tensor in expected.items():
        assert found[name].tensor_type == tensor.tensor_type
        assert np.array_equal(found[name].data, tensor.data)
    fields = gguf.GGUFReader(tmp_path / "out.gguf").fields
    for key in gguf.GGUFReader(direct).fields.keys() - {"GGUF.tensor_count", "GGUF.kv_count", "moecast.quant"}:
        assert fields[key].contents() == gguf.GGUFReader(direct).fields[key].contents()


def test_importance_reaches_every_expert(full: Path, imatrix: Path, tmp_path: Path) -> None:
    """Expert by expert the stored bytes are those of `quantize` with that expert's statistics."""
    result = _quantize(full, tmp_path / "out.gguf", "--quant", "Q4_K_M", "--imatrix", imatrix)
    assert result.exit_code == 0, result.output
    source, stored = _tensors(full), _tensors(tmp_path / "out.gguf")
    statistics = _tensors(imatrix)
    name = "blk.0.ffn_up_exps.weight"
    values = torch.from_numpy(source[name].data.reshape(16, 256, 256).copy())
    means = torch.from_numpy(statistics[f"{name}.in_sum2"].data / 40)
    for expert in (0, 3, 15):
        importance = None if expert == 3 else means[expert]
        expected = quantize(values[expert], "Q4_K", importance)
        assert np.array_equal(stored[name].data.reshape(16, 256, -1)[expert], expected.numpy())
    fields = gguf.GGUFReader(tmp_path / "out.gguf").fields
    assert fields["quantize.imatrix.file"].contents() == imatrix.name
    assert fields["quantize.imatrix.chunks_count"].contents() == 5
    model = open_model(tmp_path / "out.gguf")
    tokens = torch.arange(1, 97)[None]
    divergence = llama.mean_divergence(
        runner_logits(model, tokens)[0].numpy(), llama.run_isolated(tmp_path / "out.gguf", tokens[0].tolist())
    )
    assert divergence < 3e-3


def test_types_of_single_tensors(full: Path, tmp_path: Path) -> None:
    """The first expression that matches counts; routers and norms stay in float32 whatever it says."""
    overrides = ["--tensor-type", "blk\\.0\\.ffn_down=q8_0", "--tensor-type", "ffn=q6_k", "--tensor-type", ".*=q5_k"]
    result = _quantize(full, tmp_path / "out.gguf", "--quant", "Q4_K_M", *overrides)
    assert result.exit_code == 0, result.output
    types = {name: tensor.tensor_type.name for name, tensor in _tensors(tmp_path / "out.gguf").items()}
    assert types["blk.0.ffn_down_exps.weight"] == "Q8_0"
    assert types["blk.1.ffn_down_exps.weight"] == types["blk.0.ffn_up_exps.weight"] == "Q6_K"
    assert types["blk.0.attn_q.weight"] == types["token_embd.weight"] == "Q5_K"
    assert types["blk.0.ffn_gate_inp.weight"] == types["blk.0.ffn_norm.weight"] == "F32"


def test_second_rounding_must_be_allowed(full: Path, tmp_path: Path) -> None:
    eight, four = tmp_path / "eight.gguf", tmp_path / "four.gguf"
    assert _quantize(full, eight, "--quant", "Q8_0").exit_code == 0
    refused = _quantize(eight, four, "--quant", "Q4_K_M")
    assert refused.exit_code == 2 and "is Q8_0 already" in refused.stderr and not four.exists()
    assert _quantize(eight, four, "--quant", "Q4_K_M", "--allow-requantize").exit_code == 0
    assert _tensors(four)["blk.0.attn_q.weight"].tensor_type.name == "Q4_K"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tensor-type", "nothing_like_this=q8_0"], "'nothing_like_this' matches no tensor"),
        (["--tensor-type", "ffn_norm=q8_0"], "'ffn_norm' matches no tensor"),
        (["--tensor-type", "(=q8_0"], "'(' is not a regular expression"),
        (["--tensor-type", "attn_q=q9_9"], "Q9_9"),
        (["--tensor-type", "attn_q=i32"], "--tensor-type gives I32, which holds no weights"),
        (["--tensor-type", "attn_q"], "expected REGEX=TYPE"),
        (["--imatrix", "nowhere.gguf"], "nowhere.gguf: no such file"),
        (["--quant", "nothing"], "--quant is 'nothing'"),
    ],
)
def test_bad_options(full: Path, tmp_path: Path, options: list[str], message: str) -> None:
    result = _quantize(full, tmp_path / "out.gguf", *options)
    assert result.exit_code == 2 and message in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_checkpoint_folder_is_refused(minimax_fp8: Checkpoint, tmp_path: Path) -> None:
    result = _quantize(minimax_fp8.folder, tmp_path / "out.gguf")
    assert result.exit_code == 2 and "use `moecast convert`" in result.stderr


def test_dry_run_writes_nothing(full: Path, tmp_path: Path) -> None:
    result = _quantize(full, tmp_path / "out.gguf", "--dry-run", "--json", "--tensor-type", "attn_q=q8_0")
    planned = {tensor["name"]: tensor["type"] for tensor in json.loads(result.stdout)["tensors"]}
    assert planned["blk.0.attn_q.weight"] == "Q8_0"
    assert list(tmp_path.iterdir()) == []
