"""What products in BF16 change: `python benchmarks/products.py [CHECKPOINT ...] [--chunks 32] [--quants Q8_0 Q4_K_M]`.

For each checkpoint (by default the examples) the divergence that rounding products causes by itself, and the KL
divergence of quantized files, padded, measured with both kinds of products.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from moecast.convert import Compute, Evaluation, Form, convert
from moecast.runner import parity
from moecast.runner.measure.evaluate import compare_heads, summarize
from moecast.runner.stream import Stream, advance
from moecast.runner.texts import EVALUATION_TEXT, chunk_tokens, with_bos
from moecast.runner.weights import ModelWeights
from moecast.sources.model import open_model

ROOT = Path(__file__).parent.parent
CONTEXT = 512


def rounding(folder: Path, chunks: int) -> tuple[float, float, float]:
    """The ratio of perplexities in bfloat16 and float32; KL(float32 || bfloat16) in nats, its mean and median."""
    model = open_model(folder)
    tokens = chunk_tokens(model.tokenizer, EVALUATION_TEXT, CONTEXT, chunks)
    inputs = with_bos(tokens, model.tokenizer)
    streams = [Stream(model, inputs, weights=ModelWeights(model, dtype)) for dtype in ("float32", "bfloat16")]
    for layer in model.graph.layers:
        advance(streams, [layer, layer])
    (divergence,) = compare_heads(streams[0], streams[1:], tokens)
    result = summarize(divergence, (), {"evaluation": len(tokens)}, CONTEXT, "bfloat16", model.context_length)
    return result.perplexity_ratio, result.mean_kld, float(divergence.kld.median())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    examples = sorted(path.parent for path in ROOT.glob("examples/*/config.json"))
    parser.add_argument("checkpoints", nargs="*", type=Path, default=examples)
    parser.add_argument("--chunks", type=int, default=32)
    parser.add_argument("--quants", nargs="*", default=["Q8_0", "Q4_K_M", "IQ2_XXS"])
    options = parser.parse_args()
    columns = ["model", "perplexity", "mean KL", "median KL", *(f"{quant}, float32 / BF16" for quant in options.quants)]
    print(f"| {' | '.join(columns)} |")
    print("|" + "---|" * len(columns))
    for folder in options.checkpoints:
        ratio, kld, median = rounding(folder, options.chunks)
        cells = [folder.name, f"{ratio - 1:+.3%}", f"{kld:.6f}", f"{median:.6f}"]
        for quant in options.quants:
            with tempfile.TemporaryDirectory() as temporary:
                file = convert(folder, temporary, quant, form=Form(padding=True), evaluation=None).files[0]
                evaluation = Evaluation(EVALUATION_TEXT, CONTEXT, options.chunks)
                found = [parity(folder, file, evaluation, Compute(dtype)).mean_kld for dtype in ("float32", "bfloat16")]
            cells.append(" / ".join(f"{value:.6f}" for value in found))
        print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
