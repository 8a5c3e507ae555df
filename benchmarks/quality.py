"""KL divergence of files with our quantisers against files with ggml's: same types, same weights, same importance.

    python benchmarks/quality.py [--chunks 60] [--json]

Both files hold the stock mix of llama-quantize; one is encoded by moecast, the other by ggml's kernels, which are
those of the installed xllamacpp. Importance comes from llama-imatrix, run on examples/text/calibration.txt. The
tables in docs/performance.md are what this prints.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

import numpy as np
from moecast.convert import convert
from moecast.convert.gguf_writer import GGUFWriter
from moecast.convert.requantize import requantize
from moecast.quant.plan import Plan, plan_tensors
from moecast.quant.recipes import recipe_named
from moecast.runner import parity
from moecast.runner.evaluate import EVALUATION_TEXT
from moecast.sources.imatrix import ImportanceMatrix, read_imatrix
from moecast.sources.model import Model, open_model

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))
RECIPES = ("Q4_K_M", "IQ4_XS", "Q3_K_M", "IQ2_XXS")


def encode_with_ggml(model: Model, plan: Plan, importance: ImportanceMatrix, path: Path) -> None:
    """What llama-quantize does: every expert with its own importance, ones where nothing is known."""
    import ggml
    import torch

    with GGUFWriter(path, model.metadata, plan.tensors) as writer:
        for tensor in plan.tensors:
            weight, name = tensor.weight, tensor.type.name
            columns = importance.of(weight.name, weight.columns, weight.experts or 1)
            for expert in range(weight.experts or 1):
                values = model.load(weight, expert if weight.experts else None).view(-1, weight.columns).numpy()
                part = columns[expert].numpy() if columns is not None and columns[expert].any() else None
                rows = values.view(np.uint8) if name == "F32" else ggml.quantize(values, name, part)
                writer.write(weight.name, expert * len(rows), torch.from_numpy(rows))


def measure(folder: Path, importance: Path, chunks: int) -> list[dict[str, float | str]]:
    rows: list[dict[str, float | str]] = []
    with tempfile.TemporaryDirectory() as temporary:
        full = convert(folder, temporary, "F32", calibration=None, verify=False, padding=False).files[0]
        model, statistics = open_model(full), read_imatrix(importance)
        for recipe in RECIPES:
            ours, theirs = Path(temporary, "ours.gguf"), Path(temporary, "theirs.gguf")
            requantize(full, ours, recipe, imatrix=importance, overwrite=True)
            theirs.unlink(missing_ok=True)
            encode_with_ggml(model, plan_tensors(model.graph, recipe_named(recipe), True), statistics, theirs)
            results = [parity(model, path, EVALUATION_TEXT, chunks=chunks) for path in (ours, theirs)]
            rows.append(
                {
                    "model": folder.name,
                    "recipe": recipe,
                    "bytes": ours.stat().st_size,
                    "mean_kld": results[0].mean_kld,
                    "mean_kld_error": results[0].mean_kld_error,
                    "mean_kld_ggml": results[1].mean_kld,
                    "ratio": results[0].mean_kld / results[1].mean_kld,
                }
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chunks", type=int, default=60)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    rows = []
    for importance in sorted(Path(__file__).parent.glob("data/*-imatrix.gguf")):
        folder = ROOT / "examples" / importance.name.removesuffix("-imatrix.gguf")
        rows += measure(folder, importance, options.chunks)
    if options.json:
        print(json.dumps(rows, indent=2))
        return
    print("| model | recipe | mean KL, ours | mean KL, ggml's kernels | ratio |\n|---|---|---|---|---|")
    for row in rows:
        print(
            f"| {row['model']} | {row['recipe']} | {row['mean_kld']:.5f} ± {row['mean_kld_error']:.5f} "
            f"| {row['mean_kld_ggml']:.5f} | {row['ratio']:.3f} |"
        )


if __name__ == "__main__":
    main()
