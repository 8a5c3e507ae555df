"""One pass against llama.cpp's chain: time, memory and disk for layers of MiniMax M2's real width.

    python benchmarks/one_pass.py --llama FOLDER [--layers 1] [--experts 32] [--quant Q4_K_M] [--threads 2]

A checkpoint of random FP8 weights is built: 3072 wide, experts of 1536, 48 heads, as many layers and experts as asked
for, with the tokenizer and vocabulary of the tiny example. Ours is one command. Theirs are llama-imatrix,
llama-quantize and llama-perplexity twice (FOLDER holds them), on a BF16 file that `moecast convert` writes, because
llama.cpp's converter refuses tokenizers that it does not know. Both calibrate and evaluate on the same chunks.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

EXAMPLES = Path(__file__).parent.parent / "examples"
SOURCE = EXAMPLES / "minimax-m2-tiny"
CALIBRATION, EVALUATION = (EXAMPLES / "text" / name for name in ("calibration.txt", "evaluation.txt"))
HIDDEN, EXPERT, HEADS, KEY_VALUE_HEADS, HEAD = 3072, 1536, 48, 8, 128
BLOCK = 128
CONVERT = [sys.executable, "-m", "moecast.cli", "convert"]
CONTEXT = 512


@dataclass(frozen=True)
class Cost:
    """What a step took: seconds of the clock and of the processor, bytes that it read and wrote, peak memory, and by
    how much the folder grew at its peak."""

    name: str
    seconds: float
    processor_seconds: float
    read: int
    written: int
    peak_rss: int
    peak_disk: int


def build(folder: Path, layers: int, experts: int) -> None:
    """A checkpoint as the Hub has it, one shard a layer."""
    folder.mkdir()
    config = json.loads((SOURCE / "config.json").read_text())
    vocabulary = config["vocab_size"]
    config |= {
        "hidden_size": HIDDEN,
        "intermediate_size": EXPERT,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KEY_VALUE_HEADS,
        "head_dim": HEAD,
        "rotary_dim": 64,
        "num_local_experts": experts,
        "num_experts_per_tok": 8,
        "attn_type_list": [1] * layers,
        "quantization_config": {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK]},
    }
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(SOURCE / name, folder / name)
    generator = torch.Generator().manual_seed(0)
    weight_map: dict[str, str] = {}

    def save(file: str, tensors: dict[str, torch.Tensor]) -> None:
        save_file(tensors, folder / file)
        weight_map.update(dict.fromkeys(tensors, file))

    def matrix(name: str, rows: int, columns: int, gain: float = 1.0) -> dict[str, torch.Tensor]:
        codes = (torch.randn(rows, columns, generator=generator) * 100).to(torch.float8_e4m3fn)
        scale = torch.full((-(-rows // BLOCK), -(-columns // BLOCK)), gain / 100 / columns**0.5)
        return {name: codes, f"{name}_scale_inv": scale}

    def ones(size: int) -> torch.Tensor:
        return torch.ones(size, dtype=torch.bfloat16)

    for layer in range(layers):
        stem = f"model.layers.{layer}"
        attention, moe = f"{stem}.self_attn", f"{stem}.block_sparse_moe"
        tensors = {
            f"{stem}.input_layernorm.weight": ones(HIDDEN),
            f"{stem}.post_attention_layernorm.weight": ones(HIDDEN),
            f"{attention}.q_norm.weight": ones(HEADS * HEAD),
            f"{attention}.k_norm.weight": ones(KEY_VALUE_HEADS * HEAD),
            f"{moe}.gate.weight": torch.randn(experts, HIDDEN, generator=generator) / HIDDEN**0.5,
            f"{moe}.e_score_correction_bias": torch.zeros(experts),
        }
        tensors |= matrix(f"{attention}.q_proj.weight", HEADS * HEAD, HIDDEN)
        tensors |= matrix(f"{attention}.k_proj.weight", KEY_VALUE_HEADS * HEAD, HIDDEN)
        tensors |= matrix(f"{attention}.v_proj.weight", KEY_VALUE_HEADS * HEAD, HIDDEN)
        tensors |= matrix(f"{attention}.o_proj.weight", HIDDEN, HEADS * HEAD, 0.25)
        for expert in range(experts):
            tensors |= matrix(f"{moe}.experts.{expert}.w1.weight", EXPERT, HIDDEN)
            tensors |= matrix(f"{moe}.experts.{expert}.w3.weight", EXPERT, HIDDEN)
            tensors |= matrix(f"{moe}.experts.{expert}.w2.weight", HIDDEN, EXPERT, 0.25)
        save(f"layer-{layer:05d}.safetensors", tensors)
    table = torch.randn(vocabulary, HIDDEN, generator=generator).bfloat16()
    ends = {"model.embed_tokens.weight": table, "model.norm.weight": ones(HIDDEN)}
    save("ends.safetensors", ends | {"lm_head.weight": table.flip(0) / HIDDEN**0.5})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def measure(name: str, command: list[str], folder: Path, threads: int) -> Cost:
    """Run a command, looking at its counters and at the folder many times a second."""
    before = _bytes_in(folder)
    started, moved, memory, disk = time.monotonic(), (0, 0), 0, 0
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    with tempfile.TemporaryFile("w+") as log, subprocess.Popen(command, stdout=log, stderr=log, env=environment) as run:
        while True:
            moved = _moved(run.pid) or moved
            memory = max(memory, _peak_memory(run.pid))
            disk = max(disk, _bytes_in(folder) - before)
            ended, status, usage = os.wait4(run.pid, os.WNOHANG)
            if ended:
                run.returncode = os.waitstatus_to_exitcode(status)
                break
            time.sleep(0.05)
        seconds = time.monotonic() - started
        if run.returncode:
            log.seek(0)
            sys.exit(f"{name} failed:\n{log.read()[-2000:]}")
    print(f"{name}: {seconds:.0f} s", file=sys.stderr, flush=True)
    return Cost(name, seconds, usage.ru_utime + usage.ru_stime, *moved, memory, disk)


def ours(source: Path, folder: Path, quant: str, chunks: int, threads: int) -> list[Cost]:
    command = [sys.executable, "-m", "moecast.cli", "convert", str(source), "-o", str(folder / "ours.gguf")]
    command += [
        "--quant",
        quant,
        "--calibration",
        str(folder / "calibration.txt"),
        "-f",
        str(EVALUATION),
        "--overwrite",
    ]
    command += ["--chunks", str(chunks), "--threads", str(threads), "--imatrix-out", str(folder / "ours-imatrix.gguf")]
    return [measure("moecast convert (all of it)", command, folder, threads)]


def theirs(source: Path, folder: Path, llama: Path, quant: str, chunks: int, threads: int) -> list[Cost]:
    full, imatrix, small, base = (
        str(folder / name) for name in ("bf16.gguf", "imatrix.gguf", "small.gguf", "base.kld")
    )
    count = str(threads)
    running = ["-t", count, "-c", str(CONTEXT), "-b", str(CONTEXT)]
    perplexity = [str(llama / "llama-perplexity"), "-f", str(EVALUATION), *running, "--chunks", str(chunks)]
    calibrate = [str(llama / "llama-imatrix"), "-m", full, "-f", str(folder / "calibration.txt"), "-o", imatrix]
    steps = {
        "BF16 file": [*CONVERT, str(source), "-o", full, "--quant", "BF16", "--no-verify", "--threads", count],
        "llama-imatrix": [*calibrate, *running],
        "llama-quantize": [str(llama / "llama-quantize"), "--imatrix", imatrix, full, small, quant, count],
        "llama-perplexity of BF16": [*perplexity, "-m", full, "--kl-divergence-base", base],
        "llama-perplexity --kl-divergence": [*perplexity, "-m", small, "--kl-divergence-base", base, "--kl-divergence"],
    }
    return [measure(name, command, folder, threads) for name, command in steps.items()]


def _moved(pid: int) -> tuple[int, int] | None:
    """Bytes that a process has asked to read and to write so far; what it maps is not among them."""
    try:
        lines = Path(f"/proc/{pid}/io").read_text().splitlines()
    except OSError:
        return None
    counters = dict(line.split(": ") for line in lines)
    return int(counters["rchar"]), int(counters["wchar"])


def _peak_memory(pid: int) -> int:
    """The largest resident memory of a process so far; what wait4 reports would count the parent that forked it."""
    try:
        _, _, found = Path(f"/proc/{pid}/status").read_text().partition("VmHWM:")
    except OSError:
        return 0
    return int(found.split()[0]) * 1024 if found else 0


def _bytes_in(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_blocks * 512
        except FileNotFoundError:
            continue
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llama", type=Path, required=True, help="folder with llama.cpp's tools")
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--experts", type=int, default=32)
    parser.add_argument("--quant", default="Q4_K_M")
    parser.add_argument("--chunks", type=int, default=8, help="chunks of 512 tokens to evaluate on")
    parser.add_argument("--calibration-bytes", type=int, default=12_000, help="how much of calibration.txt to use")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        build(folder / "source", options.layers, options.experts)
        text = CALIBRATION.read_text(encoding="utf-8")[: options.calibration_bytes]
        (folder / "calibration.txt").write_text(text, encoding="utf-8")
        common = (options.quant, options.chunks, options.threads)
        rows = ours(folder / "source", folder, *common)
        chain = theirs(folder / "source", folder, options.llama, *common)
    total = [
        sum(getattr(cost, field) for cost in chain) for field in ("seconds", "processor_seconds", "read", "written")
    ]
    highest, disk = max(cost.peak_rss for cost in chain), sum(cost.peak_disk for cost in chain)
    rows += [*chain, Cost("the chain together", *total, highest, disk)]
    print("| step | seconds | of the processor | GB read | GB written | peak memory, GB | disk, GB |")
    print("|---|---|---|---|---|---|---|")
    for cost in rows:
        sizes = " | ".join(f"{size / 1e9:.2f}" for size in (cost.read, cost.written, cost.peak_rss, cost.peak_disk))
        print(f"| {cost.name} | {cost.seconds:.1f} | {cost.processor_seconds:.1f} | {sizes} |")


if __name__ == "__main__":
    main()
