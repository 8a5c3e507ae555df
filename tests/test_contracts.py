"""What the design promises about the code as a whole."""

from __future__ import annotations

import ast
import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

import checkpoints
import pytest
from click.testing import CliRunner
from conftest import Checkpoint
from conversions import convert
from importlinter.cli import lint_imports
from moecast.archs.graph import Operation
from moecast.cli import main

ROOT = Path(__file__).parent.parent
PACKAGES = ("quant", "sources", "runner", "convert", "reports")
COMMANDS = sorted(main.commands)


def test_imports_go_one_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("logging.config.dictConfig", lambda settings: None)  # it would silence all other loggers
    assert lint_imports(config_filename="pyproject.toml", no_cache=True) == 0


def test_no_architecture_is_named_outside_its_adapter() -> None:
    files = [*ROOT.glob("*.py"), *(file for package in PACKAGES for file in (ROOT / package).rglob("*.py"))]
    assert len(files) > 20
    named = [
        str(file) for file in files if re.search(r"minimax|nemotron|deepseek|qwen", file.read_text(), re.IGNORECASE)
    ]
    assert named == []


def _asks_for_a_kind(node: ast.AST) -> set[str]:
    """Names of the classes that a `case` or an `isinstance` asks for."""
    if isinstance(node, ast.MatchClass):
        classes: list[ast.AST] = [node.cls]
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "isinstance":
        classes = [*ast.walk(node.args[1])]
    else:
        return set()
    names = (part.attr if isinstance(part, ast.Attribute) else getattr(part, "id", "") for part in classes)
    return set(names)


def test_readers_of_a_graph_go_by_facts_and_not_by_kinds_of_operations() -> None:
    """Only what executes or writes an operation may know which one it is."""
    kinds = {kind.__name__ for kind in Operation.__subclasses__()}
    assert {"Attention", "MoE"} <= kinds
    knowing = (ROOT / "runner" / "blocks", ROOT / "convert" / "onnx")
    files = [
        *ROOT.glob("*.py"),
        *(file for package in (*PACKAGES, "commands") for file in (ROOT / package).rglob("*.py")),
    ]
    readers = [file for file in files if not any(folder in file.parents for folder in knowing)]
    asking = {
        f"{file.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}"
        for file in readers
        for node in ast.walk(ast.parse(file.read_text()))
        if kinds & _asks_for_a_kind(node)
    }
    assert asking == set()


def test_files_are_short() -> None:
    folders = (*PACKAGES, "archs", "examples", "benchmarks")
    files = [*ROOT.glob("*.py"), *(file for folder in folders for file in (ROOT / folder).rglob("*.py"))]
    lines = {str(file): len(file.read_text().splitlines()) for file in files}
    assert {file: count for file, count in lines.items() if count > 400} == {}


# Who may take more parameters than the eight that a reader can keep in mind, and why.
MANY_PARAMETERS = {
    "commands/convert.py:convert": 14,  # click gives a command each option or group of options by its name
    "commands/convert.py:quantize": 10,
    "commands/evaluate.py:parity": 10,
    "commands/evaluate.py:run": 9,
    "commands/plan.py:plan": 14,
    "commands/publish.py:publish": 9,
    "convert/pipeline.py:convert": 9,  # the whole command as a function: each parameter is an object of settings
    "quant/planning/recipes.py:_recipe": 10,  # a row of the table of recipes, by names
}


def test_functions_take_few_parameters() -> None:
    files = [
        *ROOT.glob("*.py"),
        *(file for folder in (*PACKAGES, "archs", "commands") for file in (ROOT / folder).rglob("*.py")),
    ]
    many = {}
    for file in files:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef):
                given = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
                count = len([argument for argument in given if argument.arg not in ("self", "cls")])
                if count > 8:
                    many[f"{file.relative_to(ROOT).as_posix()}:{node.name}"] = count
    assert many == MANY_PARAMETERS


HEAVY = {
    "torch", "onnx", "onnx_ir", "onnxruntime", "transformers", "numpy", "huggingface_hub", "tokenizers", "rich",
    "matplotlib", "jinja2",
}  # fmt: skip


@pytest.mark.parametrize(
    "code",
    ["import moecast", "from moecast.cli import main; main(['--help'], standalone_mode=False)"]
    + [f"from moecast.cli import main; main(['{name}', '--help'], standalone_mode=False)" for name in COMMANDS],
    ids=["import", "help", *COMMANDS],
)
def test_help_loads_nothing_heavy(code: str) -> None:
    told = f"{code}\nimport json, sys\nprint(json.dumps(sorted(sys.modules)), file=sys.stderr)"
    result = subprocess.run([sys.executable, "-c", told], check=True, capture_output=True, text=True)
    assert HEAVY & {*json.loads(result.stderr)} == set()


def test_what_is_public_is_documented() -> None:
    text = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    for package in ("convert", "quant", "runner"):
        section = text.partition(f"## `moecast.{package}`")[2].partition("\n## ")[0]
        named = {name for cell in re.findall(r"^\| (`.*?) \|", section, re.M) for name in re.findall(r"`(\w+)", cell)}
        assert named == {*importlib.import_module(f"moecast.{package}").__all__}


def test_files_that_documents_name_exist() -> None:
    documents = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), ROOT / "examples" / "README.md"]
    folders = "archs|quant|sources|runner|convert|reports|commands|tests|benchmarks|examples"
    named = {
        (document.name, path)
        for document in documents
        for path in re.findall(rf"`((?:{folders})/[\w./-]+\.\w+)`", document.read_text(encoding="utf-8"))
    }
    assert len(named) > 20
    assert {(document, path) for document, path in named if not (ROOT / path).exists()} == set()


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_examples(command: str) -> None:
    result = CliRunner().invoke(main, [command, "--help"])
    assert result.exit_code == 0
    assert "Examples:" in result.output and f"moecast {command}" in result.output


def test_every_command_speaks_json(minimax: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One run of each; `download` is tested against a server of its own, `prepack` on an ONNX folder."""
    monkeypatch.chdir(tmp_path)
    folder, text = str(minimax.folder), ["-f", str(checkpoints.TEXT), "-c", "64", "--chunks", "2"]
    calls = {
        "inspect": ([folder], {"architecture", "parameters", "active_parameters", "tensors", "problems"}),
        "plan": ([folder, "--quant", "Q4_K_M"], {"bytes", "bits_per_weight", "tensors", "problems"}),
        "convert": (
            [folder, "-o", "model.gguf", "--quant", "Q8_0", *text],
            {
                "files", "bytes", "bits_per_weight", "parity", "seconds", "peak_rss_bytes", "recipe", "source",
                "revision", "version", "imatrix", "texts", "resumed", "problems", "output", "draft",
            },
        ),
        "imatrix": (
            [folder, "-o", "imatrix.gguf", "-c", "64", "--chunks", "2"],
            {"file", "tokens", "unseen_experts", "fewest_tokens", "seconds", "peak_rss_bytes"},
        ),
        "perplexity": ([folder, *text], {"perplexity", "tokens", "context"}),
        "parity": (
            [folder, "model.gguf", *text],
            {
                "perplexity_reference", "perplexity_candidate", "mean_kld", "mean_kld_error", "kld_999",
                "top1_agreement", "tokens",
            },
        ),
        "publish": (
            [".", "owner/name", "--dry-run", "-o", "card", "--despite", "one of them was not measured"],
            {"repository", "url", "commit", "files"},
        ),
        "run": ([folder, "-p", "And", "-n", "2"], {"prompt", "text"}),
        "quantize": (["full.gguf", "out.gguf", "--quant", "Q8_0"], {"files", "bytes", "bits_per_weight"}),
        "recipes": ([], {"recipes"}),
        "doctor": ([], {"kernels", "memory_bytes", "disk_free_bytes", "gpus", "engines", "features"}),
    }  # fmt: skip
    assert {*calls, "download", "demo", "prepack"} == {*COMMANDS}
    convert(minimax.folder, "full.gguf", "F32", calibration=None, verify=False)
    for command, (arguments, keys) in calls.items():
        result = CliRunner().invoke(main, [command, *arguments, "--json"])
        assert result.exit_code == 0, result.output
        assert keys <= json.loads(result.stdout).keys()
    converted = json.loads(CliRunner().invoke(main, ["parity", folder, "model.gguf", *text, "--json"]).stdout)
    assert converted["tokens"] == 2 * 31 and 0 < converted["mean_kld"] < 0.01


def test_failed_parity_exits_with_1(minimax: Checkpoint, tmp_path: Path) -> None:
    options = ["-f", str(checkpoints.TEXT), "-c", "64", "--chunks", "2", "--quant", "Q2_K", "-o", str(tmp_path)]
    result = CliRunner().invoke(
        main, ["convert", str(minimax.folder), *options, "--no-calibration", "--max-kld", "1e-9"]
    )
    assert result.exit_code == 1 and "is above 1e-09" in result.stderr
    (file,) = tmp_path.glob("*.gguf")
    options = ["-f", str(checkpoints.TEXT), "-c", "64", "--chunks", "2"]
    assert CliRunner().invoke(main, ["parity", str(minimax.folder), str(file), *options]).exit_code == 0
    judged = CliRunner().invoke(main, ["parity", str(minimax.folder), str(file), *options, "--max-kld", "1e-9"])
    assert judged.exit_code == 1
