"""KL divergence of plans under a budget against llama.cpp's mixes of the same bytes: same quantizers, same calibration.

    python benchmarks/allocation.py [CHECKPOINT ...] [--llama] [--chunks 12] [--save benchmarks/data/allocation.json]
    python benchmarks/allocation.py --plot docs/allocation.svg

Checkpoints are the examples unless others are given; larger ones come from examples/train.py, for example

    python examples/train.py minimax-m2 --text kjv.txt --output minimax-m2-6-layers --layers 6 \\
        --intermediate-size 256 --steps 1100 --batch 2 --learning-rate 3e-3

Weights are measured on parts of the calibration text, plans are chosen on other parts of it, and what is printed was
measured on the evaluation text. Ours are rounded with error feedback; mixes and plans by role are not, but where
that is said. `--llama` writes three pairs of files and lets llama.cpp measure them too. The tables
and the plot of docs/performance.md come from here.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from moecast.convert import Calibration, Form, Goal, convert
from moecast.convert.plans.allocate import (
    HELD_OUT_CHUNKS,
    candidates_within,
    probe_chunks,
    split_tokens,
    winner,
    without,
)
from moecast.convert.plans.choose import Budget, plan_for_budget
from moecast.quant.planning.allocation import Damage
from moecast.quant.planning.plan import Plan, plan_tensors
from moecast.quant.planning.recipes import Recipe, recipe_named
from moecast.runner.measure.compare_plans import divergences
from moecast.runner.measure.probe import measure_damage
from moecast.runner.passes import Measuring
from moecast.runner.texts import EVALUATION_TEXT, chunk_tokens
from moecast.sources.model import Model, open_model

ROOT = Path(__file__).parent.parent
DATA = Path(__file__).parent / "data" / "allocation.json"
POINTS = ("Q4_K_M", "IQ4_XS", "Q3_K_M", "IQ3_XXS", "Q2_K", "IQ2_XXS")
CONFIRMED = ("IQ4_XS", "Q3_K_M", "IQ3_XXS")
UNIFORM = ("Q4_K", "Q3_K", "IQ3_XXS", "IQ2_XXS")
CONTEXT = 512
RATIOS = {
    "ours / stock": ("ours", "stock"),
    "ours / roles": ("ours", "roles"),
    "ours without error feedback / stock": ("ours_nearest", "stock"),
    "ours / ours without error feedback": ("ours", "ours_nearest"),
    "stock with error feedback / stock": ("stock_feedback", "stock"),
    "ours / stock with error feedback": ("ours", "stock_feedback"),
    "ours / roles with error feedback": ("ours", "roles_feedback"),
}
SHOWN = ("ours / stock", "ours / roles", "ours / stock with error feedback")
# Of the kind that the examples were trained on: to them the bundled text is as foreign as noise.
CALIBRATION_TEXT = EVALUATION_TEXT.with_name("calibration.txt")


def uniform(model: Model, type: str) -> Plan:
    """One type for everything that may be quantized."""
    return plan_tensors(model.graph, Recipe(type, 0, type))


def measure(folder: Path, calibrating: int, chunks: int, llama: bool) -> dict[str, Any]:
    """All points of one model."""
    model = open_model(folder)
    calibration = chunk_tokens(model.tokenizer, CALIBRATION_TEXT, CONTEXT, calibrating)
    evaluation = chunk_tokens(model.tokenizer, EVALUATION_TEXT, CONTEXT, None)
    evaluation = evaluation[:: max(1, len(evaluation) // chunks)][:chunks]
    probes, held_out = split_tokens(calibration, probe_chunks(model.graph), HELD_OUT_CHUNKS)
    started = time.process_time()
    measuring = Measuring(model, calibration, error_feedback=True)
    nearest = replace(measuring, error_feedback=False)
    damage = measure_damage(replace(measuring, calibration=without(calibration, probes)), probes, [model.graph])
    seconds = time.process_time() - started
    stocks = {point: plan_tensors(model.graph, recipe_named(point), calibrated=True) for point in POINTS}
    candidate_plans = {point: _rivals(model, stock, damage) for point, stock in stocks.items()}
    keys = [(point, name) for point in POINTS for name in candidate_plans[point]]
    comparing = replace(measuring, calibration=without(calibration, held_out))
    found = divergences(comparing, [candidate_plans[p][n] for p, n in keys], held_out)
    klds = {key: divergence.probability_weighted_kld for key, divergence in zip(keys, found, strict=True)}
    winners = {point: winner({name: klds[point, name] for name in candidate_plans[point]}) for point in POINTS}
    shown = {point: {"ours": candidate_plans[point][winners[point]], "stock": stocks[point]} for point in POINTS}
    for point, plans in shown.items():
        plans["roles"] = _by_roles(model, stocks[point], damage)
    keys = [(point, name) for point in POINTS for name in shown[point]]
    plans = [shown[p][n] for p, n in keys] + [uniform(model, type) for type in UNIFORM]
    final, plain = ([float(d.kld.mean()) for d in divergences(how, plans, evaluation)] for how in (measuring, nearest))
    kld, plain_kld = (dict(zip(keys, found, strict=False)) for found in (final, plain))
    rows = [
        {
            "point": point,
            "bytes": shown[point]["ours"].bytes,
            "bytes_stock": stocks[point].bytes,
            "bits_per_weight": stocks[point].bits_per_weight,
            "winner": winners[point],
            "ours": kld[point, "ours"],
            "stock": plain_kld[point, "stock"],
            "roles": plain_kld[point, "roles"],
            "ours_nearest": plain_kld[point, "ours"],
            "stock_feedback": kld[point, "stock"],
            "roles_feedback": kld[point, "roles"],
            "expected": damage_of(damage, shown[point]["ours"]),
        }
        for point in POINTS
    ]
    if llama:
        for row in rows:
            if row["point"] in CONFIRMED:
                row |= confirm(model, shown[row["point"]], evaluation)
    flat = [{"type": plan.recipe.name, "bytes": plan.bytes, "kld": kld} for plan, kld in zip(plans, final, strict=True)]
    return {
        "model": folder.name,
        "parameters": model.graph.parameters(),
        "measure_seconds": seconds,
        "points": rows,
        "uniform": flat[len(keys) :],
        "sensitivity": _by_role(model, damage),
    }


def _rivals(model: Model, stock: Plan, damage: Damage) -> dict[str, Plan]:
    budget = Budget("ours", stock.bytes)
    return candidates_within(model.graph, budget, damage, Form(padding=False), calibrated=True)


def _by_roles(model: Model, stock: Plan, damage: Damage) -> Plan:
    """The best plan with one type a role, from the same measurements."""
    budget, form = Budget("roles", stock.bytes), Form(padding=False)
    return plan_for_budget(model.graph, budget, damage, form, True, together=lambda weight: weight.role)


def damage_of(damage: Damage, plan: Plan) -> float:
    return sum(damage.of(tensor.weight, tensor.type) for tensor in plan.tensors)


def _by_role(model: Model, damage: Damage) -> dict[str, float]:
    """Sensitivity of all weights of a role together."""
    sums: dict[str, float] = {}
    for weight in model.graph.weights():
        if weight.name in damage.probe:
            sums[weight.role.value] = sums.get(weight.role.value, 0.0) + damage.sensitivity[weight.name]
    return sums


def confirm(model: Model, plans: dict[str, Plan], tokens: torch.Tensor) -> dict[str, float]:
    """KL divergence of two written files from the float32 file, all run by llama.cpp."""
    sys.path.insert(0, str(ROOT / "tests"))
    from llama import Engine

    def log_probabilities(path: Path, chunk: torch.Tensor) -> torch.Tensor:
        with Engine(path, context=CONTEXT) as engine:
            if engine.bos_token is not None:
                chunk = torch.cat((torch.tensor([engine.bos_token]), chunk[1:]))
            logits = torch.from_numpy(engine.logits(chunk.tolist())[CONTEXT // 2 : CONTEXT - 1])
        return logits.double().log_softmax(dim=-1)

    with tempfile.TemporaryDirectory() as folder:
        files = {"F32": convert(model, folder, "F32", form=Form(padding=False), evaluation=None).files[0]}
        for name in ("ours", "stock"):
            plan, feedback = replace(plans[name], recipe=replace(plans[name].recipe, name=name)), name == "ours"
            calibration = Calibration(CALIBRATION_TEXT, error_feedback=feedback)
            made = convert(model, folder, Goal(plan=plan), calibration=calibration, evaluation=None)
            files[name] = made.files[0]
        sums = {"ours": 0.0, "stock": 0.0}
        chunks = tokens[:: max(1, len(tokens) // 4)][:4]
        for chunk in chunks:
            reference = log_probabilities(files["F32"], chunk)
            for name in sums:
                other = log_probabilities(files[name], chunk)
                sums[name] += float((reference.exp() * (reference - other)).sum(dim=-1).mean()) / len(chunks)
    return {"llama_ours": sums["ours"], "llama_stock": sums["stock"]}


def show(results: list[dict[str, Any]]) -> None:
    print("| model | bytes of | bits per weight | stock | by role | ours | " + " | ".join(SHOWN) + " | chosen |")
    print("|---|---|---|---|---|---" + "|---" * len(SHOWN) + "|---|")
    ratios: dict[str, list[float]] = {name: [] for name in RATIOS}
    for result in results:
        for row in result["points"]:
            for name, (part, whole) in RATIOS.items():
                ratios[name].append(row[part] / row[whole])
            print(
                f"| {result['model']} | {row['point']} | {row['bits_per_weight']:.2f} | {row['stock']:.5f} "
                f"| {row['roles']:.5f} | {row['ours']:.5f} | "
                + " | ".join(f"{ratios[name][-1]:.2f}" for name in SHOWN)
                + f" | {row['winner']} |"
            )
    print()
    for name, found in ratios.items():
        print(f"- {name}: {sum(found) / len(found):.3f} on average, {max(found):.3f} at most")
    for result in results:
        for row in result["points"]:
            if "llama_ours" in row:
                print(
                    f"- llama.cpp, {result['model']} {row['point']}: stock {row['llama_stock']:.5f}, "
                    f"ours {row['llama_ours']:.5f} ({row['llama_ours'] / row['llama_stock']:.2f}x)"
                )


def plot(results: list[dict[str, Any]], path: Path) -> None:
    """KL divergence against size, one panel a model."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(results), figsize=(4 * len(results), 3.6), squeeze=False)
    for axis, result in zip(axes[0], results, strict=True):
        points = sorted(result["points"], key=lambda row: row["bytes"])
        axis.plot([r["bytes"] / 2**20 for r in points], [r["ours"] for r in points], "o-", label="moecast")
        axis.plot([r["bytes_stock"] / 2**20 for r in points], [r["stock"] for r in points], "s--", label="stock mix")
        flat = sorted(result["uniform"], key=lambda row: row["bytes"])
        axis.plot([r["bytes"] / 2**20 for r in flat], [r["kld"] for r in flat], "^:", label="one type, error feedback")
        axis.set(title=result["model"], xlabel="MiB", yscale="log")
        axis.grid(alpha=0.3, which="both")
    axes[0][0].set_ylabel("mean KL divergence, nats")
    axes[0][0].legend()
    figure.tight_layout()
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", nargs="*", type=Path)
    parser.add_argument("--chunks", type=int, default=12)
    parser.add_argument("--calibrating", type=int, default=32, help="chunks of the calibration text")
    parser.add_argument("--llama", action="store_true")
    parser.add_argument("--save", type=Path, help="keep the results, those of other models that are there too")
    parser.add_argument("--plot", type=Path, help="draw the results kept in benchmarks/data/allocation.json")
    options = parser.parse_args()
    if options.plot:
        plot(json.loads(DATA.read_text()), options.plot)
        show(json.loads(DATA.read_text()))
        return
    folders = options.checkpoints or sorted(path.parent for path in (ROOT / "examples").glob("*/config.json"))
    results = [measure(folder, options.calibrating, options.chunks, options.llama) for folder in folders]
    show(results)
    if options.save:
        kept = json.loads(options.save.read_text()) if options.save.exists() else []
        names = {result["model"] for result in results}
        everything = [result for result in kept if result["model"] not in names] + results
        options.save.write_text(json.dumps(sorted(everything, key=lambda r: r["model"]), indent=1) + "\n")


if __name__ == "__main__":
    main()
