"""Padding as commands decide it: the same everywhere, kept by plan files and journals, and open under a budget."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import checkpoints
import gguf
import moecast.convert.encode
import nemotron_checkpoints as nemotron
import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from conversions import convert
from moecast.cli import main
from moecast.convert.calibrate import write_imatrix
from moecast.convert.plans.allocate import candidates_within, winner
from moecast.convert.plans.choose import Budget, plan_for
from moecast.convert.requantize import requantize
from moecast.convert.settings import Calibration, Goal
from moecast.errors import BadInput
from moecast.quant.planning.allocation import typical_damage
from moecast.quant.planning.plan import Form, plan_file
from moecast.quant.planning.recipes import recipe_named
from moecast.runner.measure.compare_plans import divergences
from moecast.runner.passes import Measuring
from moecast.runner.texts import chunk_tokens
from moecast.sources.imatrix import read_imatrix
from moecast.sources.model import open_model

PARTLY = [512, 160, 512]  # hidden size, experts, shared experts
ALL_PADDED = [512, 256, 512]
UNPADDED = [480, 160, 480]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("m") / "model"
    return nemotron.save_nemotron(path, nemotron.nemotron_model(**nemotron.PARTLY_PADDED))


@pytest.fixture(scope="module")
def imatrix(folder: Path) -> Path:
    """Measured on the checkpoint."""
    path = folder.parent / "imatrix.gguf"
    write_imatrix(folder, path, Calibration(checkpoints.TEXT, 64, 4))
    return path


@pytest.fixture(scope="module")
def padded(folder: Path) -> Path:
    """The whole checkpoint padded, in float32."""
    return convert(folder, folder.parent / "padded.gguf", _in_float32(folder), calibration=None, verify=False).files[0]


def _in_float32(folder: Path) -> Goal:
    plan = folder.parent / "plan.json"
    tensors = plan_file(open_model(folder).graph, recipe_named("Q4_K_M"), Form(padding=True)).stored
    entries = [{"name": tensor.name, "type": "F32", "shape": tensor.shape} for tensor in tensors]
    plan.write_text(json.dumps({"version": 1, "name": "F32", "tensors": entries}))
    return Goal(plan=plan)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def planned(*arguments: object) -> list[tuple[str, str, list[int]]]:
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.output
    return [(tensor["name"], tensor["type"], tensor["shape"]) for tensor in json.loads(result.stdout)["tensors"]]


def stored(path: Path) -> list[tuple[str, str, list[int]]]:
    return [(tensor.name, tensor.dtype, list(tensor.shape)) for tensor in open_model(path).tensors]


def widths(path: Path) -> list[int]:
    fields = gguf.GGUFReader(path).fields
    keys = ("embedding_length", "expert_feed_forward_length", "expert_shared_feed_forward_length")
    return [fields[f"nemotron_h_moe.{key}"].contents() for key in keys]


@pytest.mark.parametrize(("option", "expected"), [((), PARTLY), (("--pad",), ALL_PADDED), (("--no-pad",), UNPADDED)])
def test_every_command_decides_alike(
    folder: Path, tmp_path: Path, option: tuple[str, ...], expected: list[int]
) -> None:
    given = ("--quant", "Q3_K_M", "--no-calibration", *option)
    plan = planned("plan", folder, *given, "-o", tmp_path / "plan.json")
    assert plan == planned("convert", folder, "--dry-run", *given)
    file, again, like = (tmp_path / f"{name}.gguf" for name in ("file", "again", "like"))
    quiet = ("--no-report", "--no-verify", "--no-calibration")
    for output, goal in (
        (file, given),
        (again, ("--plan", tmp_path / "plan.json")),
        (like, ("--like", file)),
    ):
        assert run("convert", folder, "-o", output, *goal, *quiet).exit_code == 0
        assert stored(output) == plan and widths(output) == expected


def test_a_resumed_conversion_keeps_its_padding(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    undisturbed, output = tmp_path / "undisturbed.gguf", tmp_path / "out" / "model.gguf"
    quiet = ("--quant", "Q3_K_M", "--no-report", "--no-verify", "--no-calibration", "--name", "m")
    assert run("convert", folder, "-o", undisturbed, *quiet).exit_code == 0
    with monkeypatch.context() as patched:
        patched.setattr(moecast.convert.encode, "quantize_weight", _stopping(moecast.convert.encode.quantize_weight))
        assert run("convert", folder, "-o", output, *quiet).exit_code == 130
    refused = run("convert", folder, "-o", output, *quiet, "--pad")
    assert refused.exit_code == 2 and "tensor list" in refused.stderr
    resumed = run("convert", folder, "-o", output, *quiet, "--json")
    assert resumed.exit_code == 0 and json.loads(resumed.stdout)["resumed"]
    assert output.read_bytes() == undisturbed.read_bytes()
    assert widths(output) == PARTLY


def _stopping(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, interrupted at its 60th call."""
    calls = iter(range(60))

    def called(*arguments: Any, **named: Any) -> Any:
        if next(calls, None) is None:
            raise KeyboardInterrupt
        return function(*arguments, **named)

    return called


def test_stock_mixes_take_part_in_both_forms(folder: Path) -> None:
    graph = open_model(folder).graph
    budget = Budget("best", plan_file(graph, recipe_named("Q3_K_M"), Form(padding=False)).bytes)
    how = (graph, budget, typical_damage(graph))
    found = candidates_within(*how, Form(), calibrated=False)
    stock = {name: plan.graph.hidden_size for name, plan in found.items() if plan.recipe.name != "best"}
    assert set(stock.values()) == {480, 512}
    assert all((size == 512) == name.endswith(" with padded rows") for name, size in stock.items())
    assert all(plan.bytes <= budget.bytes for plan in found.values())
    for padding, size in ((True, 512), (False, 480)):
        found = candidates_within(*how, Form(padding=padding), calibrated=False)
        assert {plan.graph.hidden_size for plan in found.values()} == {size}
    for hidden in (480, 512):  # the better mix stays where the others are no better beyond doubt
        klds = {name: torch.full((2,), 1.0 + (size != hidden)).double() for name, size in stock.items()}
        others = {name: torch.tensor([0.5, 1.6]).double() for name in found if name not in klds}
        assert (
            stock[winner(others | klds)] == hidden
        )  # the better mix stays where the others are no better beyond doubt


def test_the_form_of_less_damage_is_taken(folder: Path) -> None:
    """Of all forms' plans within the budget none promises less."""
    model = open_model(folder)
    damage = typical_damage(model.graph)

    def expected(bits: float, padding: bool | None) -> float:
        plan = plan_for(model, Goal(bits_per_weight=bits), Form(padding=padding))
        return sum(damage.of(tensor.weight, tensor.type) for tensor in plan.tensors)

    for bits in (4.5, 5, 6, 8):
        assert expected(bits, None) <= min(expected(bits, True), expected(bits, False))


@pytest.mark.whole
def test_plans_of_two_forms_side_by_side_are_the_files_they_describe(folder: Path, tmp_path: Path) -> None:
    model = open_model(folder)
    tokens = chunk_tokens(model.tokenizer, checkpoints.TEXT, 64, 3)
    forms = [Form(), Form(padding=True), Form(padding=False)]
    plans = [plan_file(model.graph, recipe_named("Q3_K_M"), form) for form in forms]
    found = divergences(Measuring(model), plans, tokens)
    for plan, divergence in zip(plans, found, strict=True):
        path = tmp_path / f"{plan.bytes}.gguf"
        result = convert(folder, path, plan, calibration=None, file=checkpoints.TEXT, context=64, chunks=3)
        assert result.parity
        assert float(divergence.kld.mean()) == pytest.approx(result.parity.mean_kld, rel=1e-3)


@pytest.mark.whole
def test_the_checkpoints_importance_serves_the_padded_file(
    folder: Path, imatrix: Path, padded: Path, tmp_path: Path
) -> None:
    """Quantizing a padded file gives the numbers of converting the checkpoint with the same rows padded."""
    direct = convert(folder, tmp_path / "direct.gguf", "Q3_K_M", padding=True, imatrix=imatrix, verify=False).files[0]
    assert run("quantize", padded, tmp_path / "out.gguf", "--quant", "Q3_K_M", "--imatrix", imatrix).exit_code == 0
    expected, found = (
        {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors} for path in (direct, tmp_path / "out.gguf")
    )
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        assert found[name].tensor_type == tensor.tensor_type
        assert np.array_equal(found[name].data, tensor.data), name


@pytest.mark.whole
def test_the_padded_files_importance_serves_the_checkpoint(
    folder: Path, imatrix: Path, padded: Path, tmp_path: Path
) -> None:
    path = tmp_path / "of-padded.gguf"
    write_imatrix(padded, path, Calibration(checkpoints.TEXT, 64, 4))
    model, own, measured = open_model(folder), read_imatrix(imatrix), read_imatrix(path)
    fitted = measured.fitted_to(model)
    assert {name for name, means in own.means.items() if means.shape != measured.means[name].shape}
    for name, means in own.means.items():
        torch.testing.assert_close(fitted.means[name], means, rtol=1e-4, atol=1e-7)
    convert(folder, tmp_path / "out.gguf", "Q3_K_M", imatrix=path, verify=False)
    assert widths(tmp_path / "out.gguf") == PARTLY


def test_importance_of_another_width_is_refused(
    folder: Path, imatrix: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """A width that padding would give, but of rows that are not padded; and one that no padding gives."""
    for hidden in (512, 544):
        overrides = nemotron.PARTLY_PADDED | {"hidden_size": hidden}
        other = nemotron.save_nemotron(tmp_path / f"{hidden}", nemotron.nemotron_model(**overrides))
        with pytest.raises(BadInput, match=rf"imatrix\.gguf: .* values, expected .* x {hidden}: it was measured on"):
            convert(other, tmp_path / "out.gguf", "Q3_K_M", imatrix=imatrix, verify=False)
        full = convert(other, tmp_path / f"{hidden}.gguf", "F32", calibration=None, verify=False).files[0]
        with pytest.raises(BadInput, match=rf"imatrix\.gguf: .* values, expected .* x {hidden}: it was measured on"):
            requantize(full, tmp_path / "out.gguf", "Q3_K_M", imatrix=imatrix)
        assert not (tmp_path / "out.gguf").exists()
        write_imatrix(other, tmp_path / "other.gguf", Calibration(checkpoints.TEXT, 64, 2), overwrite=True)
        with pytest.raises(BadInput, match=r"other\.gguf: .* values, expected .* x 480: it was measured on"):
            convert(folder, tmp_path / "out.gguf", "Q3_K_M", imatrix=tmp_path / "other.gguf", verify=False)
