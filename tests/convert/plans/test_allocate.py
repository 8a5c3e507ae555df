"""Measuring, solving and comparing, against files that were written with the same types."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from conftest import Checkpoint
from conversions import convert
from moecast.cli import main
from moecast.convert.plans.allocate import choose_measured_plan, split_tokens, stock_within, winner, without
from moecast.convert.plans.choose import Budget, plan_for
from moecast.convert.requantize import requantize
from moecast.convert.settings import Goal
from moecast.errors import BadInput
from moecast.quant.planning.allocation import typical_damage
from moecast.quant.planning.plan import Form, plan_file
from moecast.quant.planning.recipes import RECIPES, recipe_named
from moecast.runner.measure import probe
from moecast.runner.measure.compare_plans import divergences
from moecast.runner.measure.logits import stream_logits
from moecast.runner.measure.probe import measure_damage
from moecast.runner.passes import Measuring
from moecast.runner.stream import Stream
from moecast.runner.texts import CALIBRATION_TEXT, EVALUATION_TEXT, chunk_tokens
from moecast.sources.model import Model, open_model
from torch import Tensor

CONTEXT = 64
UNPADDED = Form(padding=False)
EXAMPLES = Path(__file__).parents[3] / "examples"
TEXT = Path(__file__).parents[2] / "data" / "imatrix" / "text.txt"


@pytest.fixture(scope="module")
def full(minimax: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint as a float32 GGUF."""
    return convert(minimax.folder, tmp_path_factory.mktemp("full"), "F32", calibration=None, verify=False).files[0]


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.mark.whole
def test_a_probe_is_a_file_with_one_weight_rounded(full: Path, tmp_path: Path) -> None:
    model = open_model(full)
    tokens = chunk_tokens(model.tokenizer, EVALUATION_TEXT, CONTEXT, 3)
    damage = measure_damage(Measuring(model), tokens, [model.graph])
    for name in ("token_embd.weight", "blk.0.attn_v.weight", "blk.1.ffn_down_exps.weight", "output.weight"):
        goal = Goal("F32", tensor_types=[(f"^{name}$", "IQ2_XXS")])
        file = requantize(full, tmp_path / f"{name}.gguf", goal).files[0]
        expected = typical_divergence(model, open_model(file), tokens)
        assert damage.sensitivity[name] * damage.probe[name] == pytest.approx(expected, rel=1e-3)
        assert damage.errors[name]["Q8_0"] < damage.errors[name]["Q4_K"] < damage.errors[name]["IQ2_XXS"] < 0.3


@pytest.mark.whole
def test_a_probe_of_many_layers_is_a_file_with_a_weight_of_each_rounded(
    full: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They share the sensitivity, and the one probe that is left takes all the text that theirs would."""
    model = open_model(full)
    names = [weight.name for weight in model.graph.weights() if "attn_v" in weight.name]
    monkeypatch.setattr(probe, "_GROUPS", 1)
    assert names in probe.probes_of(model.graph, names).values() and len(names) == len(model.graph.layers) > 1
    tokens = chunk_tokens(model.tokenizer, EVALUATION_TEXT, CONTEXT, 3)
    damage = measure_damage(Measuring(model), tokens, [model.graph])
    file = requantize(full, tmp_path / "a.gguf", Goal("F32", tensor_types=[("attn_v", "IQ2_XXS")])).files[0]
    expected = typical_divergence(model, open_model(file), tokens)
    assert sum(damage.sensitivity[name] * damage.probe[name] for name in names) == pytest.approx(expected, rel=1e-3)
    assert len({damage.sensitivity[name] for name in names}) == 1


def typical_divergence(reference: Model, candidate: Model, tokens: Tensor) -> float:
    """The mean root of the second half's KL divergences, weighed by the probability of the token that follows."""
    positions, total, weight = slice(CONTEXT // 2, CONTEXT - 1), 0.0, 0.0
    streams = [Stream(model, tokens) for model in (reference, candidate)]
    for stream in streams:
        for layer in stream.model.graph.layers:
            stream.advance(layer)
    sources = [stream_logits(stream, positions) for stream in streams]
    for chunk, ids in enumerate(tokens):
        first, second = (source(chunk).double().log_softmax(dim=1) for source in sources)
        follows = first.exp().gather(1, ids[CONTEXT // 2 + 1 :, None])[:, 0]
        total += float(((first.exp() * (first - second)).sum(dim=1) * follows).sqrt().sum())
        weight += float(follows.sum())
    return total**2 / (weight * len(tokens) * (CONTEXT // 2 - 1))


@pytest.mark.whole
def test_foreign_text_ranks_weights_nearly_like_text_of_the_kind_a_model_knows() -> None:
    """The example was trained on one book; without weighing positions, dialogues and code give a correlation of 0.5."""
    model = open_model(EXAMPLES / "minimax-m2-tiny")
    logarithms = []
    for file in (CALIBRATION_TEXT, EVALUATION_TEXT):
        tokens = chunk_tokens(model.tokenizer, file, 512, 3)
        damage = measure_damage(Measuring(model), tokens, [model.graph])
        logarithms.append(torch.tensor([damage.sensitivity[name] for name in damage.probe]).log())
    assert float(torch.corrcoef(torch.stack(logarithms))[0, 1]) > 0.85


@pytest.mark.whole
def test_plans_side_by_side_are_the_files_they_describe(minimax: Checkpoint, full: Path, tmp_path: Path) -> None:
    model = open_model(minimax.folder)
    tokens = chunk_tokens(model.tokenizer, EVALUATION_TEXT, CONTEXT, 3)
    plans = [plan_file(model.graph, recipe_named(name)) for name in ("Q4_K_M", "Q2_K")]
    found = divergences(Measuring(model), plans, tokens)
    for plan, divergence in zip(plans, found, strict=True):
        path = tmp_path / f"{plan.recipe.name}.gguf"
        result = convert(model, path, plan, calibration=None, context=CONTEXT, chunks=3)
        assert result.parity
        assert float(divergence.kld.mean()) == pytest.approx(result.parity.mean_kld, rel=1e-3)


@pytest.mark.whole
def test_the_best_plan_is_no_worse_than_stock_at_its_bytes(minimax: Checkpoint) -> None:
    model = open_model(minimax.folder)
    tokens = chunk_tokens(model.tokenizer, EVALUATION_TEXT, CONTEXT, 8)
    stock = plan_file(model.graph, recipe_named("Q3_K_M"), calibrated=True)
    probes, held_out = split_tokens(tokens, 4, 4)
    found = choose_measured_plan(Measuring(model, tokens), Budget("best", stock.bytes), probes, held_out)
    klds = {result.name: result.mean_kld for result in found.candidate_plans}
    assert found.plan.bytes <= stock.bytes
    assert min(klds.values()) < klds["Q3_K_M"]
    assert found.plan.expected_kld == pytest.approx(min(klds.values()))
    again, other = divergences(Measuring(model, without(tokens, held_out)), [found.plan, stock], held_out)
    assert float(again.probability_weighted_kld.mean()) == pytest.approx(found.candidate_plans[0].mean_kld)
    assert float(other.probability_weighted_kld.mean()) == pytest.approx(klds["Q3_K_M"])


def test_stock_is_what_llama_quantize_has(minimax: Checkpoint) -> None:
    """Not one of our own mixes, even where that comes closer to the size."""
    graph = open_model(minimax.folder).graph
    for recipe in (recipe for recipe in RECIPES.values() if recipe.ours):
        plan = plan_file(graph, recipe, UNPADDED, calibrated=True)
        stock = stock_within(graph, plan.bytes, UNPADDED, calibrated=True)
        assert stock is not None and not stock.recipe.ours and 0.7 * plan.bytes < stock.bytes <= plan.bytes


def test_stock_wins_ties() -> None:
    noise = torch.randn(1000, generator=torch.Generator().manual_seed(0)).abs().double()
    assert winner({"exponent 1": noise - 1e-9 * noise.roll(1), "Q3_K_M": noise}) == "exponent 1"
    jitter = torch.randn(1000, generator=torch.Generator().manual_seed(1)).double()
    jitter = 0.1 * (jitter - jitter.mean()) + 1e-4
    assert winner({"exponent 1": noise - jitter, "Q3_K_M": noise}) == "Q3_K_M"


def test_tokens_of_probes_and_comparisons_are_apart() -> None:
    tokens = torch.arange(11)[:, None].expand(11, 4)
    probes, held_out = split_tokens(tokens, 4, 6)
    assert len(probes) == 4
    assert len(held_out) == 5  # half
    assert not set(probes.flatten().tolist()) & set(held_out.flatten().tolist())
    with pytest.raises(BadInput, match="two or more"):
        split_tokens(tokens[:1], 4, 6)


def test_a_size_is_hit(minimax_fp8: Checkpoint, tmp_path: Path) -> None:
    size = 3_000_000
    arguments = ("convert", minimax_fp8.folder, "-o", tmp_path, "--size", size, "--no-measure", "--no-verify", "--json")
    result = run(*arguments, "--no-calibration")
    assert result.exit_code == 0, result.output
    written = json.loads(result.stdout)["bytes"]
    assert 0.995 * size <= written <= size
    assert written == sum(path.stat().st_size for path in tmp_path.glob("*.gguf"))


def test_a_plan_file_and_a_model_file_give_their_types(minimax_fp8: Checkpoint, tmp_path: Path) -> None:
    planned = run("plan", minimax_fp8.folder, "--bpw", 4, "-o", tmp_path / "plan.json", "--json")
    assert planned.exit_code == 0, planned.output
    types = {tensor["name"]: tensor["type"] for tensor in json.loads(planned.stdout)["tensors"]}
    file = tmp_path / "model.gguf"
    made = run(
        "convert", minimax_fp8.folder, "-o", file, "--plan", tmp_path / "plan.json", "--no-calibration", "--no-verify"
    )
    assert made.exit_code == 0, made.output
    assert {tensor.name: tensor.dtype for tensor in open_model(file).tensors} == types
    like = run("plan", minimax_fp8.folder, "--like", file, "--json")
    assert {tensor["name"]: tensor["type"] for tensor in json.loads(like.stdout)["tensors"]} == types
    assert run("plan", minimax_fp8.folder, "--bpw", 4, "--like", file).exit_code == 2
    assert run("plan", minimax_fp8.folder, "--bpw", 4, "--to", "onnx").exit_code == 2


@pytest.mark.slow
def test_a_measured_plan_is_the_one_that_convert_makes(minimax_fp8: Checkpoint, tmp_path: Path) -> None:
    """`plan --measure` writes nothing but the plan, and what `convert` measures leads to the same types."""
    file, goal = tmp_path / "plan.json", ("--bpw", 4, "--calibration", TEXT)
    planned = run("plan", minimax_fp8.folder, *goal, "--measure", "-o", file, "--json")
    assert planned.exit_code == 0, planned.output
    plan = json.loads(planned.stdout)
    assert plan == json.loads(file.read_text()) and plan["expected_kld"] > 0
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]
    made = run("convert", minimax_fp8.folder, "-o", tmp_path / "model.gguf", *goal, "--no-verify")
    assert made.exit_code == 0, made.output
    types = {tensor["name"]: tensor["type"] for tensor in plan["tensors"]}
    assert {tensor.name: tensor.dtype for tensor in open_model(tmp_path / "model.gguf").tensors} == types
    again = run("plan", minimax_fp8.folder, *goal, "--measure", "-o", file)
    assert again.exit_code == 2 and "plan.json exists: use --overwrite" in again.stderr
    assert "add --size or --bpw" in run("plan", minimax_fp8.folder, "--quant", "Q4_K_M", "--measure").stderr


def test_rows_are_padded_where_that_does_less_damage(minimax_odd: Checkpoint) -> None:
    """Rows of 160 and 96 would grow several times: never here; `plan_within` decides by damage alone."""
    model = open_model(minimax_odd.folder)
    plan = plan_for(model, Goal(bits_per_weight=6))
    assert plan.graph.hidden_size == 160
    assert any("not measured" in note for note in plan.notes)
    assert not typical_damage(model.graph).measured


@pytest.mark.parametrize(
    ("option", "little", "pattern"),
    [
        ("--bpw", "1", r"1\.00bpw is too little for this model: ask for at least --bpw (\d+\.\d\d)$"),
        ("--size", "1MB", r"0\.001GB is too little for this model: ask for at least --size (\d+\.\d\dMB)$"),
    ],
)
def test_a_budget_that_is_too_small_is_answered_in_its_unit(
    minimax: Checkpoint, option: str, little: str, pattern: str
) -> None:
    result = CliRunner().invoke(main, ["plan", str(minimax.folder), option, little])
    found = re.search(pattern, result.stderr.strip())
    assert result.exit_code == 2 and found, result.stderr
    assert CliRunner().invoke(main, ["plan", str(minimax.folder), option, found[1]]).exit_code == 0
    amount, unit = re.fullmatch(r"([\d.]+)(\w*)", found[1]).groups()  # type: ignore[union-attr]
    less = f"{float(amount) - 0.02:.2f}{unit}"
    assert CliRunner().invoke(main, ["plan", str(minimax.folder), option, less]).exit_code == 2
