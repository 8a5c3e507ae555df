"""What commands show of a result: tables of a fixed width, the line that serves a file, the same facts as JSON."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import checkpoints
import cohere_checkpoints as cohere
import deepseek_checkpoints
import deltanet_checkpoints
import minimax_m3_checkpoints as m3
import pytest
from click.testing import CliRunner, Result
from moecast.cli import main
from moecast.commands.console import human_bytes

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(autouse=True)
def _among_examples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(EXAMPLES)
    monkeypatch.setenv("COLUMNS", "80")
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)


def _run(*arguments: object) -> Result:
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result


def _rows(table: str) -> list[list[str]]:
    """The cells of a table's rows, its header left out."""
    lines = (line.strip(" │").split("│") for line in table.splitlines() if line.startswith("│"))
    return [[cell.strip() for cell in line] for line in lines]


INSPECTED = """\
minimax-m2-tiny
┌─────────────────────────┬─────────────────────────────────────────────┐
│ Architecture            │                                  minimax-m2 │
│ Parameters              │                        4.2 M (1.6 M active) │
│ Layers                  │                   2: 2 x Attention, 2 x MoE │
│ Hidden size, vocabulary │                                   256, 1024 │
│ Stored                  │ F8_E4M3 3.5 MiB, BF16 1.0 MiB, F32 33.0 KiB │
│ KV cache per token      │                           1.0 KiB (16 bits) │
└─────────────────────────┴─────────────────────────────────────────────┘
"""


def test_inspect_as_a_table() -> None:
    shown = _run("inspect", "minimax-m2-tiny").stdout
    assert "".join(f"{line.rstrip()}\n" for line in shown.splitlines()) == INSPECTED


def test_inspect_tells_the_state_that_does_not_grow() -> None:
    """Of two Mamba-2 layers of 512 channels, in float32: 64 numbers of each, and three inputs of the convolution."""
    rows = {row[0]: row[1] for row in _rows(_run("inspect", "nemotron-3-tiny").stdout)}
    assert rows["State of any text"] == f"{2 * 4 * (512 * 64 + 3 * (512 + 2 * 128)) / 1024} KiB"


def test_tables_keep_to_the_width(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cells break into lines, and nothing of them is lost."""
    monkeypatch.setenv("COLUMNS", "60")
    shown = _run("inspect", "minimax-m2-tiny").stdout
    assert max(len(line) for line in shown.splitlines()) <= 60
    assert "".join(shown.split()).count("33.0") == 1 and len(_rows(shown)) > len(_rows(INSPECTED))


def test_what_is_left_out_is_said(tmp_path: Path) -> None:
    folder = cohere.save_cohere(tmp_path / "model", cohere.pictured(True))
    for command in (["inspect"], ["plan", "--quant", "Q8_0"]):
        shown = _run(*command, folder).stdout
        assert shown.count("Note: left out the vision tower, 52 tensors: text alone is understood") == 1


def test_plan_tells_layers_in_ranges() -> None:
    rows = {row[0]: row[1:4] for row in _rows(_run("plan", "nemotron-3-tiny", "--quant", "Q8_0").stdout)}
    assert rows["embedding"] == ["Q8_0", "", "1"]
    assert rows["norm"] == ["F32", "0-4", "8"]
    assert rows["mamba_input"] == ["Q8_0", "0, 2", "2"]
    assert rows["expert_up"] == ["Q8_0", "1, 4", "2"]
    assert rows["attention_q"] == ["Q8_0", "3", "1"]


@pytest.mark.parametrize("options", [["--quant", "Q4_K_M"], ["--bpw", "4.5"], ["--to", "onnx"]], ids=lambda o: o[0])
def test_plan_as_json_has_the_facts_of_the_table(options: list[str]) -> None:
    shown = _run("plan", "minimax-m2-tiny", *options).stdout
    plan = json.loads(_run("plan", "minimax-m2-tiny", *options, "--json").stdout)
    assert f"{human_bytes(plan['bytes'])}, {plan['bits_per_weight']:.2f} bits per weight" in shown
    rows = _rows(shown)
    assert sum(int(row[3]) for row in rows) == len(plan["tensors"])
    assert {row[1] for row in rows} == {tensor["type"] for tensor in plan["tensors"]}
    assert all(f"Note: {problem}" in shown for problem in plan["problems"])


def test_fit_tells_how_to_serve_the_file() -> None:
    """Experts in RAM, the rest on the GPU; without a GPU there is nothing to say about layers."""
    machine = ["deepseek-v4-tiny", "--fit", "--ram", "8GB", "-c", "4096"]
    shown = _run("plan", *machine, "--vram", "2GB").stdout
    assert "llama-server -m MODEL.gguf -c 4096 --jinja --n-gpu-layers 99 --n-cpu-moe 0" in shown
    fit = json.loads(_run("plan", *machine, "--vram", "2GB", "--json").stdout)
    assert fit["serve"] in shown
    assert f"{human_bytes(fit['state_bytes'])}, working memory: about {human_bytes(fit['working_bytes'])}" in shown
    alone = json.loads(_run("plan", *machine, "--vram", "0", "--json").stdout)
    assert alone["layers_in_ram"] == 3 and "gpu" not in alone["serve"]
    assert fit["ram_bytes_per_token"] == 0 and alone["memory_bandwidth"] > 0
    experts, others = 0, 0
    for tensor in alone["tensors"]:
        routed = tensor["name"].endswith("_exps.weight")
        experts, others = experts + tensor["bytes"] * routed, others + tensor["bytes"] * (not routed)
    assert experts * 4 / 16 < alone["ram_bytes_per_token"] < experts * 4 / 16 + others
    assert " of weights from RAM: at most " in _run("plan", *machine, "--vram", "0").stdout


UNMEASURED = ("--no-verify", "--no-calibration", "--no-report", "--overwrite")


@pytest.mark.parametrize("gpu", [False, True], ids=["CPU", "GPU"])
def test_convert_tells_how_to_run_the_file_here(gpu: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine whose driver, if there is one, tells a GPU of 8 GiB."""
    monkeypatch.setattr("moecast.runner.placement.names", lambda: ["cpu"])
    driver = (sys.executable, "-c", "print(8192)") if gpu else ("no-such-driver",)
    monkeypatch.setattr("moecast.commands.serving._DRIVER", driver)
    file = tmp_path / "model.gguf"
    convert = ("convert", "minimax-m2-tiny", "-o", file, "--quant", "Q8_0", *UNMEASURED)
    shown = _run(*convert).stdout
    options = " --n-gpu-layers 99 --n-cpu-moe 0" if gpu else ""
    for program in ("llama-server", "llama-cli"):
        assert f"\n    {program} -m {file} -c 8192 --jinja{options}\n" in shown
    assert f"{human_bytes(file.stat().st_size)}, " in shown
    assert (" of weights from RAM: at most " in shown) == (not gpu)
    facts = json.loads(_run(*convert, "--json").stdout)
    assert facts["serve"] in shown and (facts["ram_bytes_per_token"] == 0) == gpu


def test_convert_tells_what_fit_has_planned(tmp_path: Path) -> None:
    machine, file = ("deepseek-v4-tiny", "--fit", "--ram", "8GB", "--vram", "700MB"), tmp_path / "model.gguf"
    planned = json.loads(_run("plan", *machine, "--json").stdout)
    made = json.loads(_run("convert", *machine, "-o", file, *UNMEASURED, "--json").stdout)
    for line in ("serve", "chat"):
        assert made[line] == planned[line].replace("MODEL.gguf", str(file)).replace(
            " --jinja", ""
        )  # it has no template
    for fact in ("state_bytes", "working_bytes", "layers_in_ram", "ram_bytes_per_token"):
        assert made[fact] == planned[fact]


def test_what_does_not_fit_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moecast.files.memory_bytes", lambda: 1 << 20)
    shown = _run("convert", "minimax-m2-tiny", "-o", tmp_path / "a.gguf", "--quant", "Q8_0", *UNMEASURED).stdout
    assert "With 8192 tokens of context it takes more memory than this machine has" in shown
    assert "llama-server -m" in shown and "at most" not in shown


def test_lines_to_serve_name_what_llama_must_be_told(tmp_path: Path) -> None:
    """Of a model that it computes otherwise without flash attention, or for several texts at once."""
    folder = m3.save_minimax_m3(tmp_path / "m3", m3.minimax_m3_model())
    planned = _run("plan", folder, "--fit", "--ram", "8GB", "--vram", "2GB", "-c", "512", "--json")
    fit = json.loads(planned.stdout)
    assert fit["serve"].startswith("llama-server -m MODEL.gguf -c 512 --jinja -fa on -np 1 --n-gpu-layers 99")
    assert fit["chat"].startswith("llama-cli -m MODEL.gguf -c 512 --jinja -fa on --n-gpu-layers 99")
    assert sum("-fa on" in problem for problem in fit["problems"]) == 1
    shown = _run("convert", folder, "-o", tmp_path / "a.gguf", "--quant", "Q8_0", "--no-verify").stdout
    (line,) = [line for line in shown.splitlines() if "llama-server -m" in line]
    assert " --jinja -fa on -np 1" in line
    assert sum("-fa on" in line for line in shown.splitlines() if line.startswith("Note: ")) == 1


def test_the_line_names_what_drafts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A block in the file by its kind, a file beside it by its name; beside a GPU its experts stay in RAM."""
    monkeypatch.setattr("moecast.runner.placement.names", lambda: ["cpu"])
    monkeypatch.setattr("moecast.commands.serving._DRIVER", (sys.executable, "-c", "print(8192)"))
    within = deltanet_checkpoints.save_published(tmp_path / "within", deltanet_checkpoints.model_of("qwen3_5"))
    beside = tmp_path / "beside"
    deepseek_checkpoints.save_deepseek_hub(beside, deepseek_checkpoints.deepseek_model())
    deepseek_checkpoints.add_draft(beside)
    options = ("--quant", "Q8_0", "--no-verify", "--no-calibration")
    assert " --spec-type draft-mtp" in _run("convert", within, "-o", tmp_path / "a.gguf", *options).stdout
    assert "spec-type" not in _run("convert", within, "-o", tmp_path / "b.gguf", *options, "--no-mtp").stdout
    shown = _run("convert", beside, "-o", tmp_path / "c.gguf", *options, "--mtp").stdout
    assert f" -md {tmp_path / 'c-mtp.gguf'} --cpu-moe-draft\n" in shown
    made = json.loads(_run("convert", beside, "-o", tmp_path / "d.gguf", *options, "--mtp", "--json").stdout)
    assert made["draft"] == made["files"][-1] == (tmp_path / "d-mtp.gguf").as_posix()


def test_scores_as_a_table_and_as_json() -> None:
    """The same numbers, rounded for people."""
    text = ["-f", checkpoints.TEXT, "-c", "64", "--chunks", "2"]
    found = json.loads(_run("perplexity", "minimax-m2-tiny", *text, "--json").stdout)
    rows = dict(_rows(_run("perplexity", "minimax-m2-tiny", *text).stdout))
    assert rows["Perplexity"].startswith(f"{found['perplexity']:.4f} ± ")
    assert rows["Tokens scored"] == str(found["tokens"])
    both = ["minimax-m2-tiny", "minimax-m2-tiny", *text]
    same = json.loads(_run("parity", *both, "--json").stdout)
    shown = dict(_rows(_run("parity", *both).stdout))
    assert same["mean_kld"] == 0 and shown["Mean KL divergence"].startswith("0.000000 ± ")
    assert same["top1_agreement"] == 1 and shown["Same top token"] == "100.00%"
    assert shown["Perplexity, result"] == f"{same['perplexity_candidate']:.4f} (+0.00%)"


def test_plan_lists_every_tensor() -> None:
    options = ("--quant", "Q4_K_M", "--no-pad")
    rows = {row[0]: row[1:4] for row in _rows(_run("plan", "minimax-m2-tiny", *options, "--tensors").stdout)}
    for tensor in json.loads(_run("plan", "minimax-m2-tiny", *options, "--json").stdout)["tensors"]:
        shape = " x ".join(map(str, tensor["shape"]))
        assert rows[tensor["name"]] == [tensor["type"], shape, str(tensor["bytes"])]
