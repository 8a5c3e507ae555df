"""Every recipe on the example models: size, bits per weight, perplexity, KL divergence from the source.

    python benchmarks/quants.py [--model minimax-m2-tiny] [--chunks 32] [--json]

The table in README.md is what this prints. Calibrated as `convert` does by default; rows are not padded: those of tiny
models would grow several times.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

from moecast.convert import Evaluation, Form, convert

EXAMPLES = Path(__file__).parent.parent / "examples"
RECIPES = ("F32", "BF16", "Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q4_K_S", "IQ4_XS", "Q3_K_M", "Q2_K")


def measure(folder: Path, recipe: str, chunks: int) -> dict[str, float | str]:
    with tempfile.TemporaryDirectory() as output:
        result = convert(folder, output, recipe, form=Form(padding=False), evaluation=Evaluation(chunks=chunks))
    parity = result.parity
    assert parity is not None
    return {
        "model": folder.name,
        "recipe": recipe,
        "bytes": result.bytes,
        "bits_per_weight": result.bits_per_weight,
        "perplexity": parity.perplexity_candidate,
        "perplexity_ratio": parity.perplexity_ratio,
        "mean_kld": parity.mean_kld,
        "mean_kld_error": parity.mean_kld_error,
        "top1_agreement": parity.top1_agreement,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="*", help="folder of examples/, all by default")
    parser.add_argument("--chunks", type=int, default=32)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    folders = sorted(path.parent for path in EXAMPLES.glob(f"{options.model}/config.json"))
    rows = [measure(folder, recipe, options.chunks) for folder in folders for recipe in RECIPES]
    if options.json:
        print(json.dumps(rows, indent=2))
        return
    print("| model | recipe | MB | bits per weight | perplexity | mean KL divergence | same top token |")
    print("|---|---|---|---|---|---|---|")
    for row in rows:
        print(
            f"| {row['model']} | {row['recipe']} | {row['bytes'] / 1e6:.2f} | {row['bits_per_weight']:.2f} "
            f"| {row['perplexity']:.3f} | {row['mean_kld']:.5f} ± {row['mean_kld_error']:.5f} "
            f"| {row['top1_agreement']:.1%} |"
        )


if __name__ == "__main__":
    main()
