"""Peak memory depends neither on the number of layers nor on that of experts, and with --memory on no text's length."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import checkpoints
import pytest
import torch
from safetensors.torch import save_file

REQUIRED = {"model_type": "minimax_m2", "rms_norm_eps": 1e-6, "rope_theta": 5e6}
BASE = {"hidden_size": 512, "intermediate_size": 256, "num_hidden_layers": 4, "num_local_experts": 16}
EXPERT_BYTES = 3 * 512 * 256 * 2  # one expert in BF16
SLACK = 24 * 2**20  # the allocator's mood; four times either count adds 144 MiB of weights
CALIBRATION = Path(__file__).parent.parent / "data" / "imatrix" / "text.txt"


def _write(folder: Path, **overrides: int) -> Path:
    """BF16, one shard a layer, written without a model in memory."""
    config = checkpoints.MINIMAX | BASE | overrides
    folder.mkdir()
    names: dict[str, str] = {}
    generator = torch.Generator().manual_seed(0)
    hidden, size, wide = config["hidden_size"], config["intermediate_size"], 8 * 64

    def save(file: str, shapes: dict[str, tuple[int, ...]]) -> None:
        tensors = {
            name: (torch.randn(shape, generator=generator) / shape[-1] ** 0.5).bfloat16()
            for name, shape in shapes.items()
        }
        save_file(tensors, folder / file)
        names.update(dict.fromkeys(shapes, file))

    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        experts = f"{prefix}.block_sparse_moe.experts"
        shapes: dict[str, tuple[int, ...]] = {
            f"{prefix}.input_layernorm.weight": (hidden,),
            f"{prefix}.post_attention_layernorm.weight": (hidden,),
            f"{prefix}.self_attn.q_proj.weight": (wide, hidden),
            f"{prefix}.self_attn.k_proj.weight": (128, hidden),
            f"{prefix}.self_attn.v_proj.weight": (128, hidden),
            f"{prefix}.self_attn.o_proj.weight": (hidden, wide),
            f"{prefix}.self_attn.q_norm.weight": (wide,),
            f"{prefix}.self_attn.k_norm.weight": (128,),
            f"{prefix}.block_sparse_moe.gate.weight": (config["num_local_experts"], hidden),
            f"{prefix}.block_sparse_moe.e_score_correction_bias": (config["num_local_experts"],),
        }
        for expert in range(config["num_local_experts"]):
            shapes |= {f"{experts}.{expert}.{name}.weight": (size, hidden) for name in ("w1", "w3")}
            shapes[f"{experts}.{expert}.w2.weight"] = (hidden, size)
        save(f"layer-{layer}.safetensors", shapes)
    vocabulary = (config["vocab_size"], hidden)
    save(
        "rest.safetensors",
        {"model.embed_tokens.weight": vocabulary, "lm_head.weight": vocabulary, "model.norm.weight": (hidden,)},
    )
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    (folder / "config.json").write_text(json.dumps(config | REQUIRED))
    checkpoints.write_tokenizer(folder, config["vocab_size"])
    return folder


def _peak(folder: Path, output: Path) -> int:
    command = [sys.executable, "-m", "moecast.cli", "convert", str(folder), "-o", str(output), "--quant", "Q4_K_M"]
    options = ["--calibration", str(CALIBRATION), "-f", str(checkpoints.TEXT), "-c", "64", "--chunks", "4", "--json"]
    options.append("--error-feedback")
    result = subprocess.run([*command, *options], capture_output=True, text=True, check=True)
    return int(json.loads(result.stdout)["peak_rss_bytes"])


def _floor(run: subprocess.CompletedProcess[str]) -> int | None:
    """The bytes that --memory would have to be, where it is refused."""
    found = re.search(r"the least that this model takes is ([\d.]+) GB", run.stderr)
    return int(float(found[1]) * 1e9) if found else None


@pytest.fixture(scope="module")
def base_peak(tmp_path_factory: pytest.TempPathFactory) -> int:
    folder = tmp_path_factory.mktemp("memory")
    return _peak(_write(folder / "base"), folder / "out")


@pytest.mark.slow
@pytest.mark.parametrize("enlarged", ["num_hidden_layers", "num_local_experts"])
def test_peak_is_flat(base_peak: int, tmp_path: Path, enlarged: str) -> None:
    """Calibrating, converting and comparing: the peak stays where it was when 144 MiB of weights come on top."""
    assert (4 * 64 - 4 * 16) * EXPERT_BYTES == 144 * 2**20
    peak = _peak(_write(tmp_path / "larger", **{enlarged: 4 * BASE[enlarged]}), tmp_path / "out")
    assert peak < base_peak + SLACK


@pytest.mark.slow
def test_long_texts_go_to_disk(tmp_path: Path) -> None:
    """More activations than fit beside the interpreter and torch: the process stays below what it was given."""
    folder = _write(tmp_path / "model", num_hidden_layers=1, intermediate_size=32)
    arguments = ["imatrix", str(folder), "-o", str(tmp_path / "imatrix.gguf"), "-c", "128", "--json", "--memory"]
    command = [sys.executable, "-m", "moecast.cli", *arguments]
    refused = subprocess.run([*command, "100MB"], capture_output=True, text=True)
    floor = _floor(refused)
    assert refused.returncode == 2 and floor
    memory = floor + 20_000_000
    result = subprocess.run([*command, str(memory)], capture_output=True, text=True, check=True)
    measured = json.loads(result.stdout)
    activations = 3 * measured["tokens"] * 512 * 4  # the residual, what experts read and what they answer
    assert activations > memory / 2
    assert measured["peak_rss_bytes"] < memory


@pytest.mark.slow
def test_several_files_stay_within_memory(tmp_path: Path) -> None:
    """Each has streams, weights and a buffer of its own, which the bound counts."""
    folder = _write(tmp_path / "model", num_hidden_layers=2)
    options = ["--calibration", str(CALIBRATION), "-f", str(checkpoints.TEXT), "-c", "64", "--chunks", "12", "--json"]
    options += ["--calibration-chunks", "8", "-o", str(tmp_path)]
    command = [sys.executable, "-m", "moecast.cli", "convert", str(folder), *options, "--memory"]
    floors = []
    for recipes in ("Q4_K_M", "Q4_K_M,Q2_K,Q6_K,Q8_0,BF16"):
        quant = ["--quant", recipes]
        floors.append(_floor(subprocess.run([*command, "100MB", *quant], capture_output=True, text=True)))
    assert floors[0] and floors[1] and floors[1] > floors[0]
    memory = floors[1] + 20_000_000
    result = subprocess.run([*command, str(memory), *quant], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert [one["peak_rss_bytes"] < memory for one in json.loads(result.stdout)["conversions"]] == 5 * [True]


@pytest.mark.slow
def test_measuring_stays_within_memory(tmp_path: Path) -> None:
    """Probes and plans to compare are many lanes; what does not fit goes to disk, and the plan is the same."""
    folder, text = _write(tmp_path / "model", num_hidden_layers=2, intermediate_size=64), tmp_path / "text.txt"
    words = CALIBRATION.read_text(encoding="utf-8").split()
    text.write_text(" ".join(4 * (words + words[::-1] + words[::2])), encoding="utf-8")
    options = ["--calibration", str(text), "--size", "3MB", "--no-verify", "-c", "512", "--json"]
    command = [sys.executable, "-m", "moecast.cli", "convert", str(folder), *options]
    alone = [*command, "-o", str(tmp_path / "bounded.gguf"), "--no-measure", "--memory", "100MB"]
    floor = _floor(subprocess.run(alone, capture_output=True, text=True))
    assert floor
    memory, refusals = str(floor + 30_000_000), 0  # what measuring leaves in memory comes on top
    while refusals < 4:
        arguments = [*command, "-o", str(tmp_path / "bounded.gguf"), "--memory", memory]
        result = subprocess.run(arguments, capture_output=True, text=True)
        floor = _floor(result)
        if not floor:
            break
        memory, refusals = str(floor + 10_000_000), refusals + 1
        shutil.rmtree(tmp_path / ".bounded.gguf.plan.journal", ignore_errors=True)  # the last run measures too
    assert result.returncode == 0, result.stderr
    bounded = json.loads(result.stdout)
    assert bounded["peak_rss_bytes"] < int(memory)
    free = json.loads(subprocess.run([*command, "-o", tmp_path / "free.gguf"], capture_output=True, check=True).stdout)
    assert free["peak_rss_bytes"] > int(memory)
    assert (tmp_path / "bounded.gguf").read_bytes() == (tmp_path / "free.gguf").read_bytes()
