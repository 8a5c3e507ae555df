"""KL divergence of models with our encoding against ggml's: same types, same importance, same tokens.

    python benchmarks/quality.py [--orders 8] [--models NAME ...] [--recipes NAME ...] [--json FILE]

Weights have the types of llama-quantize's stock mixes; they are encoded once by moecast and once by ggml's kernels,
which are those of the installed xllamacpp. Importance comes from llama-imatrix, run on examples/text/calibration.txt.
Every token of examples/text/evaluation.txt counts but the first sixteen of a chunk of 512.

Which columns share a block, and so how well they go together, is chance, and in a model as small as these it moves the
result by a per cent or two either way. With --orders N the columns of every tensor are shuffled N times, and each order
is measured on its share of the chunks; the ratio's error then covers that chance. The tables in docs/performance.md are
what this prints.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from moecast.convert import NO_CALIBRATION, Form, convert
from moecast.quant import dequantize, quantize
from moecast.quant.planning.plan import Plan, plan_tensors
from moecast.quant.planning.recipes import recipe_named
from moecast.runner.stream import Stream
from moecast.runner.texts import DEFAULT_CONTEXT, EVALUATION_TEXT, chunk_tokens
from moecast.sources.imatrix import ImportanceMatrix, read_imatrix
from moecast.sources.model import Model, open_model
from numpy.typing import NDArray
from torch import Tensor

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))
import ggml  # noqa: E402

RECIPES = ("Q4_K_M", "IQ4_XS", "Q3_K_M", "IQ2_XXS")
MODELS = ("minimax-m2-tiny", "nemotron-3-tiny", "deepseek-v4-tiny")
SCORED = slice(16, DEFAULT_CONTEXT - 1)  # positions of a chunk

Floats = NDArray[np.float32]
Encoder = Callable[[Floats, str, "Floats | None"], Floats]  # rows, type, importance -> what comes back


def ours(rows: Floats, name: str, importance: Floats | None) -> Floats:
    return dequantize(quantize(rows, name, importance), name)


def theirs(rows: Floats, name: str, importance: Floats | None) -> Floats:
    """What llama-quantize does: every expert with its own importance, ones where nothing is known."""
    return ggml.dequantize(ggml.quantize(rows, name, importance), name)


class Reencoded(Model):
    """A model with other numbers in its quantized weights."""

    def __init__(self, model: Model, plan: Plan, importance: ImportanceMatrix, encode: Encoder, order: int) -> None:
        super().__init__(model.path, model.architecture, model.graph, model.tensors, model.metadata)
        shuffled = with_columns_shuffled(encode, order) if order else encode
        self.weights: dict[str, Tensor] = {}
        for tensor in plan.tensors:
            weight = tensor.weight
            if tensor.type.block_size == 1:
                continue
            columns = importance.of(weight.name, weight.columns, weight.experts or 1)
            experts = []
            for expert in range(weight.experts or 1):
                values = model.load(weight, expert if weight.experts else None).view(-1, weight.columns)
                part = columns[expert].numpy() if columns is not None and columns[expert].any() else None
                experts.append(torch.from_numpy(shuffled(values.numpy(), tensor.type.name, part)).view(values.shape))
            self.weights[weight.name] = torch.stack(experts) if weight.experts else experts[0]

    def load(self, weight, expert=None, rows=None):  # type: ignore[no-untyped-def]  # as in the base class
        values = self.weights.get(weight.name)
        if values is None:
            return super().load(weight, expert, rows)
        values = values if expert is None else values[expert]
        return values if rows is None else values[slice(*rows)]


def with_columns_shuffled(encode: Encoder, seed: int) -> Encoder:
    """The same model in another order of its channels, as far as the encoder can tell."""

    def run(rows: Floats, name: str, importance: Floats | None) -> Floats:
        order = np.random.default_rng([seed, rows.shape[1]]).permutation(rows.shape[1])
        result = np.empty_like(rows)
        part = None if importance is None else np.ascontiguousarray(importance[order])
        result[:, order] = encode(np.ascontiguousarray(rows[:, order]), name, part)
        return result

    return run


def log_probabilities(model: Model, tokens: Tensor) -> Tensor:
    """Of every word after each scored position: [chunks, positions, words]."""
    stream = Stream(model, tokens)
    for layer in model.graph.layers:
        stream.advance(layer)
    states = stream.final_states(SCORED)
    logits = stream.logits(states)
    return torch.log_softmax(logits, dim=1).view(len(tokens), -1, logits.shape[1])


def measure(
    folder: Path, importance: ImportanceMatrix, recipes: Sequence[str], orders: int
) -> list[dict[str, float | str]]:
    rows: list[dict[str, float | str]] = []
    with tempfile.TemporaryDirectory() as temporary:
        unpadded = Form(padding=False)
        made = convert(folder, temporary, "F32", form=unpadded, calibration=NO_CALIBRATION, evaluation=None)
        model = open_model(made.files[0])
        tokens = chunk_tokens(model.tokenizer, EVALUATION_TEXT, DEFAULT_CONTEXT, None)
        if model.tokenizer.add_bos and model.tokenizer.bos is not None:
            tokens[:, 0] = model.tokenizer.bos
        reference = log_probabilities(model, tokens)
        for recipe in recipes:
            plan = plan_tensors(model.graph, recipe_named(recipe), calibrated=True)
            means: list[list[Tensor]] = [[], []]  # of the chunks' divergences, for each order: ours, ggml's
            for order in range(orders):
                part = slice(order, None, orders)
                for encoder, results in zip((ours, theirs), means, strict=True):
                    candidate = Reencoded(model, plan, importance, encoder, order)
                    expected, found = reference[part], log_probabilities(candidate, tokens[part])
                    results.append((expected.exp() * (expected - found)).sum(-1).double().mean(1))
            rows.append({"model": folder.name, "recipe": recipe, "bytes": plan.bytes, **compare(*means)})
            print(table_row(rows[-1]), flush=True)
    return rows


def compare(mine: list[Tensor], ggmls: list[Tensor]) -> dict[str, float]:
    """Means and their ratio, whose error follows from how much it differs among orders, or among chunks of one."""
    a, b = (torch.stack([part.mean() for part in side]) if len(side) > 1 else side[0] for side in (mine, ggmls))
    ratio = a.mean() / b.mean()
    error = (a - ratio * b).std() / len(a) ** 0.5 / b.mean()
    return {
        "mean_kld": float(a.mean()),
        "mean_kld_ggml": float(b.mean()),
        "ratio": float(ratio),
        "ratio_error": float(error),
    }


def table_row(row: dict[str, float | str]) -> str:
    return (
        f"| {row['model']} | {row['recipe']} | {row['mean_kld']:.5f} | {row['mean_kld_ggml']:.5f} "
        f"| {row['ratio']:.3f} ± {row['ratio_error']:.3f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--orders", type=int, default=1, help="of columns, the first being the model's own")
    parser.add_argument("--models", nargs="+", default=MODELS, choices=MODELS)
    parser.add_argument("--recipes", nargs="+", default=RECIPES)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here as well")
    options = parser.parse_args()
    print("| model | recipe | mean KL, ours | mean KL, ggml's kernels | ratio |\n|---|---|---|---|---|")
    rows = []
    for name in options.models:
        importance = read_imatrix(Path(__file__).parent / "data" / f"{name}-imatrix.gguf")
        rows += measure(ROOT / "examples" / name, importance, options.recipes, options.orders)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
