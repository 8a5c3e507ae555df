"""Layers as wide as MiniMax M2's: exporting and running them takes the memory of an expert, not of a model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import checkpoints
import pytest
import torch
from moecast.convert.onnx.prepack import prepack
from moecast.progress import NoProgress
from moecast.quant.planning.file_formats import plan_format
from moecast.quant.planning.onnx_plan import OnnxPlan
from moecast.sources.model import open_model
from safetensors.torch import save_file

LAYERS, EXPERTS, HIDDEN, SIZE, HEADS, KEY_VALUE_HEADS, HEAD = 4, 4, 3072, 1536, 48, 8, 128
LIMIT = 2 * 10**9

CONFIG = checkpoints.MINIMAX | {
    "model_type": "minimax_m2", "hidden_size": HIDDEN, "intermediate_size": SIZE, "num_hidden_layers": LAYERS,
    "num_local_experts": EXPERTS, "num_experts_per_tok": 2, "rms_norm_eps": 1e-6, "rope_theta": 5e6,
    "num_attention_heads": HEADS, "num_key_value_heads": KEY_VALUE_HEADS, "head_dim": HEAD, "rotary_dim": 64,
}  # fmt: skip

# What a process has of its own after loading a model and running some tokens, beside what it had before.
RUN = """
import sys, torch
from moecast.runner.engines import OnnxModel
from pathlib import Path

def own_memory():
    return int(Path("/proc/self/status").read_text().partition("RssAnon:")[2].split()[0]) * 1024

torch.set_num_threads(1)
before = own_memory()
model = OnnxModel(Path(sys.argv[1]), low_memory=sys.argv[2] == "mapped", threads=1)
logits, _ = model.advance(torch.arange(4), model.initial_state())
assert torch.isfinite(logits).all()
print(own_memory() - before)
"""


def _matrix(rows: int, columns: int) -> torch.Tensor:
    return (torch.randn(rows, columns) * columns**-0.5).bfloat16()


def _write(folder: Path) -> Path:
    """A shard for every layer, BF16; all experts of a layer have the numbers of one."""
    torch.manual_seed(0)
    folder.mkdir()
    names: dict[str, str] = {}

    def save(file: str, tensors: dict[str, torch.Tensor]) -> None:
        save_file(tensors, folder / file)
        names.update(dict.fromkeys(tensors, file))

    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}"
        tensors = {
            f"{prefix}.input_layernorm.weight": torch.ones(HIDDEN),
            f"{prefix}.post_attention_layernorm.weight": torch.ones(HIDDEN),
            f"{prefix}.self_attn.q_proj.weight": _matrix(HEADS * HEAD, HIDDEN),
            f"{prefix}.self_attn.k_proj.weight": _matrix(KEY_VALUE_HEADS * HEAD, HIDDEN),
            f"{prefix}.self_attn.v_proj.weight": _matrix(KEY_VALUE_HEADS * HEAD, HIDDEN),
            f"{prefix}.self_attn.o_proj.weight": _matrix(HIDDEN, HEADS * HEAD),
            f"{prefix}.self_attn.q_norm.weight": torch.ones(HEADS * HEAD),
            f"{prefix}.self_attn.k_norm.weight": torch.ones(KEY_VALUE_HEADS * HEAD),
            f"{prefix}.block_sparse_moe.gate.weight": _matrix(EXPERTS, HIDDEN),
            f"{prefix}.block_sparse_moe.e_score_correction_bias": torch.zeros(EXPERTS),
        }
        projections = {"w1": _matrix(SIZE, HIDDEN), "w2": _matrix(HIDDEN, SIZE), "w3": _matrix(SIZE, HIDDEN)}
        for expert in range(EXPERTS):
            experts = f"{prefix}.block_sparse_moe.experts.{expert}"
            tensors |= {f"{experts}.{name}.weight": matrix.clone() for name, matrix in projections.items()}
        save(f"layer-{layer}.safetensors", tensors)
    words = (CONFIG["vocab_size"], HIDDEN)
    save(
        "rest.safetensors",
        {
            "model.embed_tokens.weight": _matrix(*words),
            "lm_head.weight": _matrix(*words),
            "model.norm.weight": torch.ones(HIDDEN),
        },
    )
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    (folder / "config.json").write_text(json.dumps(CONFIG))
    checkpoints.write_tokenizer(folder, CONFIG["vocab_size"])
    return folder


def _own_memory(folder: Path, how: str) -> int:
    run = subprocess.run([sys.executable, "-c", RUN, folder, how], capture_output=True, text=True, check=True)
    return int(run.stdout)


@pytest.mark.slow
def test_wide_layers(tmp_path: Path) -> None:
    source = _write(tmp_path / "wide")
    plan = plan_format("onnx", open_model(source).graph, "Q4_0")
    assert isinstance(plan, OnnxPlan) and plan.bytes > 200 * 10**6
    command = [sys.executable, "-m", "moecast.cli", "convert", source, "--to", "onnx", "-o", tmp_path / "out", "--json"]
    options = ["-f", checkpoints.TEXT, "-c", "16", "--chunks", "1", "--threads", "1", "--no-calibration"]
    result = json.loads(subprocess.run([*command, *options], capture_output=True, text=True, check=True).stdout)
    assert result["peak_rss_bytes"] < LIMIT
    assert result["parity"]["mean_kld"] < 0.5
    folder = Path(result["files"][0]).parent
    assert {name: (folder / name).stat().st_size for name in plan.files} == plan.files
    copied = _own_memory(folder, "copied")
    assert copied - _own_memory(folder, "mapped") > plan.bytes / 2
    prepack(folder, NoProgress())
    assert copied - _own_memory(folder, "copied") > plan.bytes / 2
