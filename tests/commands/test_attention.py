"""--attention full: what a model says that attends to all tokens, in every command that runs one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from deepseek_v3_checkpoints import save_deepseek
from moecast.cli import main
from moecast.runner.measure.evaluate import perplexity
from moecast.runner.settings import Evaluation
from moecast.sources.model import open_model
from sparse_checkpoints import sparse_model

EVALUATED = ("--context", "128", "--chunks", "2", "--json")  # of which an indexer leaves 32


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_deepseek(tmp_path_factory.mktemp("sparse") / "model", sparse_model("deepseek_v32", num_hidden_layers=2))


def run(*arguments: object) -> dict[str, Any]:
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def test_parity_says_what_the_choice_costs(checkpoint: Path) -> None:
    """The reference attends as it is made to, the candidate to everything."""
    assert run("parity", checkpoint, checkpoint, *EVALUATED)["mean_kld"] == 0
    found = run("parity", checkpoint, checkpoint, *EVALUATED, "--attention", "full")
    assert found["mean_kld"] > 1e-4


def test_perplexity_is_that_of_a_model_that_picks_all(checkpoint: Path, tmp_path: Path) -> None:
    picks_all = save_deepseek(tmp_path / "all", sparse_model("deepseek_v32", num_hidden_layers=2, index_topk=128))
    expected = perplexity(open_model(picks_all), Evaluation(context=128, chunks=2))
    found = run("perplexity", checkpoint, *EVALUATED, "--attention", "full")["perplexity"]
    assert found == pytest.approx(expected.perplexity, rel=1e-5)
    assert run("perplexity", checkpoint, *EVALUATED)["perplexity"] != pytest.approx(found, rel=1e-5)


def test_run_goes_on_with_all_of_a_text(checkpoint: Path) -> None:
    """Text beyond what an indexer leaves; of a random model it says something else then."""
    prompt = ("run", checkpoint, "-p", "And it came to pass in those days that " * 6, "-n", "24", "--json")
    assert run(*prompt)["text"] != run(*prompt, "--attention", "full")["text"]


def test_onnx_folders_are_refused(tmp_path: Path, checkpoint: Path) -> None:
    made = CliRunner().invoke(
        main, ["convert", str(checkpoint), "-o", str(tmp_path), "--to", "onnx", "--quant", "Q8_0", "--no-verify"]
    )
    assert made.exit_code == 0, made.output
    (folder,) = (file.parent for file in tmp_path.rglob("model.onnx"))
    result = CliRunner().invoke(main, ["perplexity", str(folder), "--attention", "full"])
    assert result.exit_code == 2 and "--attention full cannot change an ONNX folder" in result.stderr
