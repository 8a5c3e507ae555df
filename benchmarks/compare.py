"""What comparing many files at once saves: `python benchmarks/compare.py [CHECKPOINT] [--chunks 4] [--runs 3]`.

Twenty recipes of one checkpoint are compared with it one by one and all in one pass. At best, the pass costs what the
comparisons cost together, less the nineteen evaluations of the checkpoint that it does without; the ratio to that is
what counts. Runs of both kinds alternate, and figures are medians of the processor's seconds, which do not depend on
what else a machine does.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

from moecast.convert import NO_CALIBRATION, convert
from moecast.quant.planning.recipes import RECIPES
from moecast.runner import Evaluation, compare, parity, perplexity

EXAMPLE = Path(__file__).parents[1] / "examples" / "minimax-m2-tiny"
COUNT = 20


def seconds(call: Callable[[], object]) -> float:
    started = time.process_time()
    call()
    return time.process_time() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", nargs="?", type=Path, default=EXAMPLE)
    parser.add_argument("--chunks", type=int, default=4)
    parser.add_argument("--runs", type=int, default=3)
    options = parser.parse_args()
    source, evaluation = options.checkpoint, Evaluation(chunks=options.chunks)
    quantized = [name for name, recipe in RECIPES.items() if recipe.quantized and not recipe.native][:COUNT]
    with tempfile.TemporaryDirectory() as folder:
        files = [
            convert(source, Path(folder) / f"{name}.gguf", name, calibration=NO_CALIBRATION, evaluation=None).files[0]
            for name in quantized
        ]
        assert len(files) == COUNT
        one_by_one, together, alone = [], [], []
        for _ in range(options.runs):
            one_by_one.append(sum(seconds(lambda file=file: parity(source, file, evaluation)) for file in files))
            together.append(seconds(lambda: compare(source, files, evaluation)))
            alone.append(seconds(lambda: perplexity(source, evaluation)))
    best = median(one_by_one) - (COUNT - 1) * median(alone)
    print(f"{COUNT} files of {source.name}, {options.chunks} chunks of {evaluation.context} tokens")
    print(f"One by one {median(one_by_one):.1f} s, the checkpoint alone {median(alone):.2f} s")
    print(
        f"In one pass {median(together):.1f} s, {median(together) / best:.2f} of the sum less {COUNT - 1} checkpoints"
    )


if __name__ == "__main__":
    main()
