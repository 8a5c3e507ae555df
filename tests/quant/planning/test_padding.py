"""Which widths are padded: those that make a file smaller, compared with every other choice."""

from __future__ import annotations

from pathlib import Path

import nemotron_checkpoints as nemotron
import pytest
import real_models
import real_nemotron
from checkpoints import EXAMPLES
from moecast.archs.graph import Graph
from moecast.archs.nemotron_h import MIXTURE
from moecast.archs.weights import Role
from moecast.errors import BadInput
from moecast.quant.planning.padding import pad, padded_forms
from moecast.quant.planning.plan import Form, Plan, plan_file, plan_tensors
from moecast.quant.planning.plan_file import StoredTypes, plan_like
from moecast.quant.planning.recipes import RECIPES, recipe_named
from moecast.sources.model import open_model

REAL = [pytest.param(model, marks=pytest.mark.slow) for model in ("nano", "super", "lightning")]
MODELS = ("nemotron-3-tiny", "minimax-m2-tiny", "deepseek-v4-tiny", "qwen3.5-tiny", "partly padded", *REAL)
EXPERT = (Role.EXPERT_UP,)
HIDDEN = ()


@pytest.fixture(scope="module", params=MODELS)
def graph(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Graph:
    if request.param in real_nemotron.CONFIGS:
        config = real_models.config(real_nemotron.CONFIGS[request.param])
        return MIXTURE.from_checkpoint(config, real_nemotron.tensors(request.param, "bf16"))
    if request.param == "partly padded":
        return open_model(partly_padded(tmp_path_factory.mktemp("m"))).graph
    return open_model(EXAMPLES / request.param).graph


def partly_padded(folder: Path) -> Path:
    return nemotron.save_nemotron(folder, nemotron.nemotron_model(**nemotron.PARTLY_PADDED))


@pytest.mark.parametrize("mtp", [False, True])
def test_no_recipe_is_larger_for_being_padded_or_not(graph: Graph, mtp: bool) -> None:
    if mtp and not graph.predictions:
        pytest.skip("no block for multi-token prediction")
    smaller = 0
    for recipe in RECIPES.values():
        padded, unpadded, chosen = (plan_file(graph, recipe, Form(padding, mtp)) for padding in (True, False, None))
        assert chosen.bytes <= min(padded.bytes, unpadded.bytes), recipe.name
        smaller += chosen.bytes < unpadded.bytes
    assert (smaller > 10) == (graph.hidden_size in (2688, 4096, 480) or mtp)


def test_the_smallest_of_all_choices(tmp_path: Path) -> None:
    graph = open_model(partly_padded(tmp_path)).graph
    forms = [*padded_forms(graph, 256)]
    assert len({form.hidden_size for form in forms}) == 2 and len(forms) == 8
    assert forms[0] == graph and forms[-1] == pad(graph, 256)
    for quant in ("Q6_K", "Q4_K_M", "IQ4_XS", "Q3_K_L", "Q2_K", "IQ1_S"):
        sizes = [plan_tensors(form, recipe_named(quant)).bytes for form in forms]
        assert plan_file(graph, recipe_named(quant)).bytes == min(sizes) < max(sizes)


def test_a_width_grows_in_all_layers_or_in_none(graph: Graph) -> None:
    """A file states it once."""
    for form in padded_forms(graph, 256):
        sizes: dict[tuple[Role, ...], set[int]] = {}
        for operation in form.operations():
            for width in operation.widths:
                sizes.setdefault(tuple(weight.role for weight in width.rows), set()).add(width.size)
        assert all(len(found) == 1 for found in sizes.values())


def test_one_line_says_what_is_padded_and_what_that_saves() -> None:
    graph = MIXTURE.from_checkpoint(
        real_models.config(real_nemotron.CONFIGS["nano"]), real_nemotron.tensors("nano", "bf16")
    )

    def said(quant: str, padding: bool | None = None) -> tuple[Plan, str]:
        plan = plan_file(graph, recipe_named(quant), Form(padding))
        return plan, next(line for line in plan.problems if "padded" in line)

    everything = "1856 to 2048, 2688 to 2816, 3712 to 3840"
    unpadded = plan_file(graph, recipe_named("IQ2_XXS"), Form(False)).bytes
    plan, line = said("IQ2_XXS")
    saved = f"{1 - plan.bytes / unpadded:.1%}"
    assert line == f"padded rows with zeros, which changes no result: {everything}; that makes the file {saved} smaller"
    (forced, line), (plan, other) = said("IQ4_XS", True), said("IQ4_XS")
    cost = f"{forced.bytes / plan.bytes - 1:.1%} larger"
    assert line.endswith(f"{everything}; that makes the file {cost}")
    assert other == f"no rows padded with zeros ({everything}): that would make the file {cost}"
    assert not any("padded" in line for line in plan_file(graph, recipe_named("Q8_0")).problems)


@pytest.mark.parametrize("kinds", [[EXPERT], [HIDDEN], [HIDDEN, EXPERT]], ids=str)
@pytest.mark.parametrize("multiple", [64, 256])
def test_a_plan_file_says_which_widths_are_padded(tmp_path: Path, kinds: list[tuple[Role, ...]], multiple: int) -> None:
    graph = open_model(partly_padded(tmp_path)).graph
    form = pad(graph, multiple, kinds)
    assert form != graph
    plan = plan_tensors(form, recipe_named("Q4_K_M"))
    stored = StoredTypes("plan.json", "mine", {t.weight.name: (t.type.name, t.weight.shape) for t in plan.tensors})
    again = plan_like(graph, stored)
    assert again.stored == plan.stored and again.graph == form
    name, (type, shape) = "blk.1.ffn_up_exps.weight", stored.tensors["blk.1.ffn_up_exps.weight"]
    other = StoredTypes("plan.json", "mine", {**stored.tensors, name: (type, (*shape[:-2], shape[-2] + 1, shape[-1]))})
    with pytest.raises(BadInput, match=r"plan\.json: .* has shape .*, expected .*: another model's\?"):
        plan_like(graph, other)
