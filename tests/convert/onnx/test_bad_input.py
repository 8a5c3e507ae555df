"""What stops a conversion to ONNX, or the use of its result: one line that names it, and nothing half-written."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import checkpoints
import moecast.convert.encode
import pytest
import torch
from click.testing import CliRunner, Result
from conftest import Checkpoint
from moecast.archs.graph import Branch, Operation, SubLayer
from moecast.archs.weights import Weight
from moecast.cli import main
from moecast.convert.onnx.model import build_model
from moecast.errors import BadInput, Interrupted, MoecastError
from moecast.quant.planning.onnx_plan import plan_onnx
from moecast.quant.planning.recipes import recipe_named
from moecast.runner.engines import OnnxModel, open_runnable, read_description
from moecast.sources.model import open_model
from onnxruntime.capi import onnxruntime_pybind11_state
from safetensors.torch import load_file, save_file


def _convert(folder: Path, output: Path, *options: str) -> Result:
    arguments = [
        "convert",
        str(folder),
        "--to",
        "onnx",
        "-o",
        str(output),
        "--threads",
        "1",
        "--no-calibration",
        "--no-report",
    ]
    return CliRunner().invoke(main, [*arguments, *options])


def _assert_refused(result: Result, message: str) -> None:
    assert result.exit_code == 2, result.output
    assert message in result.stderr and "Traceback" not in result.output


@pytest.fixture
def converted(minimax: Checkpoint, tmp_path: Path) -> Path:
    assert _convert(minimax.folder, tmp_path, "--no-verify").exit_code == 0
    (folder,) = tmp_path.iterdir()
    return folder


def _contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_existing_output_is_replaced_only_when_asked(minimax: Checkpoint, converted: Path) -> None:
    before = _contents(converted)
    _assert_refused(_convert(minimax.folder, converted.parent), "exists: use --overwrite")
    assert _contents(converted) == before
    (converted / "model-00007.onnx_data").write_bytes(b"of a larger model")
    assert _convert(minimax.folder, converted.parent, "--overwrite", "--no-verify").exit_code == 0
    assert _contents(converted) == before


def test_failure_leaves_what_was_there(minimax: Checkpoint, converted: Path, tmp_path: Path) -> None:
    """A weight is not finite, halfway through the model."""
    damaged = checkpoints.copied(minimax.folder, tmp_path / "copy" / minimax.folder.name)
    tensors = load_file(damaged / "model.safetensors")
    name = "model.layers.1.block_sparse_moe.experts.5.w2.weight"
    tensors[name][0, 0] = float("nan")
    save_file(tensors, damaged / "model.safetensors")
    _assert_refused(_convert(damaged, tmp_path / "new", "--no-verify"), name)
    assert list((tmp_path / "new").iterdir()) == []
    before = _contents(converted)
    _assert_refused(_convert(damaged, converted.parent, "--overwrite", "--no-verify"), name)
    assert _contents(converted) == before


@pytest.mark.parametrize("error", [BadInput("a weight is not finite"), Interrupted("the connection is lost")])
def test_a_folder_that_is_gone_hides_no_error(
    minimax: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: MoecastError
) -> None:
    """Somebody removes the folder while it is being filled, and then something else goes wrong."""

    def gone(*arguments: object) -> None:
        for folder in tmp_path.glob("*onnx*"):
            shutil.rmtree(folder)
        raise error

    monkeypatch.setattr(moecast.convert.encode, "quantize_weight", gone)
    _assert_refused(_convert(minimax.folder, tmp_path / "model-onnx", "--no-verify"), str(error))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--quant", "IQ2_XXS"), "--quant IQ2_XXS has types that ONNX Runtime cannot multiply with, expected one of"),
        (("--pre", "gpt-2"), "--pre means nothing for an ONNX model"),
        (("--split-max-size", "4G"), "--split-max-size means nothing for an ONNX model"),
        (("--to", "gguf", "--activations", "float32"), "--activations means nothing for a GGUF file"),
    ],
)
def test_options_that_mean_nothing(minimax: Checkpoint, tmp_path: Path, options: tuple[str, ...], message: str) -> None:
    _assert_refused(_convert(minimax.folder, tmp_path / "out", *options), message)


def test_missing_operators_are_named_first(
    minimax: Checkpoint, converted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before anything is converted; without verification the file is for another machine."""
    kernels = onnxruntime_pybind11_state.get_all_opkernel_def()
    kept = [kernel for kernel in kernels if kernel.op_name not in ("QMoE", "GroupQueryAttention")]
    monkeypatch.setattr(onnxruntime_pybind11_state, "get_all_opkernel_def", lambda: kept)
    message = "cannot compute com.microsoft.GroupQueryAttention, com.microsoft.QMoE: install a newer onnxruntime"
    _assert_refused(_convert(minimax.folder, tmp_path / "new"), message)
    assert not list((tmp_path / "new").glob("*/*"))
    assert _convert(minimax.folder, tmp_path / "new", "--no-verify").exit_code == 0
    with pytest.raises(BadInput, match="QMoE"):
        OnnxModel(converted)


@dataclass(frozen=True)
class Telepathy(Operation):
    """An operation that nobody has written in ONNX."""

    @property
    def reads(self) -> tuple[Weight, ...]:
        return ()

    @property
    def writes(self) -> tuple[Weight, ...]:
        return ()


def test_an_operation_without_a_form(minimax: Checkpoint) -> None:
    plan = plan_onnx(open_model(minimax.folder).graph, recipe_named("F32"))
    first, *others = plan.graph.layers
    strange = replace(first, sublayers=(SubLayer((Branch(None, Telepathy()),)),))
    with pytest.raises(BadInput, match=r"^ONNX has no form for Telepathy yet: use --to gguf$"):
        build_model(replace(plan, graph=replace(plan.graph, layers=(strange, *others))))


def test_onnx_runtime_is_missing(minimax: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    _assert_refused(_convert(minimax.folder, tmp_path / "out"), "ONNX Runtime is not installed: pip install")
    assert _convert(minimax.folder, tmp_path / "out", "--no-verify").exit_code == 0


def _shortened(folder: Path) -> None:
    file = folder / "model-00001.onnx_data"
    file.write_bytes(file.read_bytes()[:-10_000])


def _without_description(folder: Path) -> None:
    (folder / "moecast.json").unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [(_shortened, r"model\.onnx cannot be loaded: "), (_without_description, r"moecast\.json is missing: only what")],
)
def test_damaged_folder(converted: Path, damage: Any, message: str) -> None:
    damage(converted)
    with pytest.raises(BadInput, match=message):
        open_runnable(converted)


def test_nothing_to_continue(converted: Path) -> None:
    _assert_refused(CliRunner().invoke(main, ["run", str(converted), "-p", ""]), "--prompt is empty")
    half = CliRunner().invoke(main, ["run", str(converted), "-p", "a\udcff"])
    _assert_refused(half, "--prompt is no UTF-8 text: character 2 is none")
    colder = CliRunner().invoke(main, ["run", str(converted), "-p", "And", "--temperature", "-1"])
    _assert_refused(colder, "-1.0 is not in the range x>=0")


STATE = {"input": "past.0", "output": "present.0", "shape": [1, 2], "fill": 0.0}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"operators": "Add"}, r"operators is 'Add', expected a list of names"),
        ({"operators": [1]}, r"operators is \[1\], expected a list of names"),
        ({"vocabulary_size": 0}, r"vocabulary_size is 0, expected a positive whole number"),
        ({"vocabulary_size": 2**40}, r"vocabulary_size is 1099511627776, expected a positive whole number up to"),
        ({"vocabulary_size": 10**30}, r"vocabulary_size is 1e\+30, expected a whole number"),
        ({"prepacked": "yes"}, r"prepacked is 'yes', expected true or false"),
        ({"states": None}, r"states is None, expected a list"),
        ({"states": [7]}, r"a state: input is missing, expected text"),
        ({"states": [STATE | {"output": 1}]}, r"a state: output is 1, expected text"),
        ({"states": [STATE | {"fill": float("nan")}]}, r"begins as nan, expected a tensor"),
        (
            {"states": [STATE | {"shape": [2**40]}]},
            r"shape is \[1099511627776\], expected whole numbers up to 16777216",
        ),
        ({"states": [STATE | {"shape": [-1]}]}, r"shape is \[-1\], expected whole numbers"),
        ({"states": [STATE | {"shape": [2**20, 2**20]}]}, r"the states have 1099511627776 values, expected at most"),
        ({"states": [STATE | {"shape": [2**24]}] * 9}, r"the states have 150994944 values, expected at most"),
        ({"states": [STATE | {"shape": [1] * 9}]}, r"it has 9 dimensions"),
    ],
)
def test_descriptions_that_do_not_add_up(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    """Nothing is allocated by what a description says before all of it is known to be reasonable."""
    description = {"operators": ["Add"], "vocabulary_size": 512, "context_length": 64, "states": [STATE]}
    file = tmp_path / "moecast.json"
    file.write_text(json.dumps(description))
    assert read_description(tmp_path)["states"] == [STATE]
    file.write_text(json.dumps(description | change))
    with pytest.raises(BadInput, match=message) as error:
        read_description(tmp_path)
    assert str(file) in str(error.value)


def test_description_of_another_model(converted: Path) -> None:
    file = converted / "moecast.json"
    description = json.loads(file.read_text())
    file.write_text(json.dumps(description | {"states": description["states"][1:]}))
    with pytest.raises(BadInput, match=r"moecast\.json describes another model\.onnx: past_key_values\.0\.key"):
        OnnxModel(converted)
    file.write_text(json.dumps(description | {"vocabulary_size": 500}))
    model = OnnxModel(converted)
    with pytest.raises(BadInput, match=r"model\.onnx gives 512 logits, expected 500"):
        model.advance(torch.tensor([1, 2]), model.initial_state())
    grown = [state | {"shape": [*state["shape"], 3]} for state in description["states"]]
    file.write_text(json.dumps(description | {"states": grown}))
    model = OnnxModel(converted)
    with pytest.raises(BadInput, match=r"model\.onnx cannot be run: "):
        model.advance(torch.tensor([1, 2]), model.initial_state())


def test_prepacking_a_damaged_model(converted: Path) -> None:
    (converted / "model.onnx").write_bytes(b"\xff" * 100)
    result = CliRunner().invoke(main, ["prepack", str(converted)])
    _assert_refused(result, "model.onnx cannot be read: ")
