"""Trains a tiny mixture-of-experts model and writes it in the format its big relatives are published in.

    bible -f gen1:1-rev22:21 > kjv.txt          # Debian: apt install bible-kjv bible-kjv-text; public domain
    python examples/train.py minimax-m2 --text kjv.txt --output examples/minimax-m2-tiny
    python examples/train.py nemotron-h --text kjv.txt --output examples/nemotron-3-tiny --steps 1400 --window 256
    python examples/train.py deepseek-v4 --text kjv.txt --output examples/deepseek-v4-tiny --steps 900 --batch 2
    python examples/train.py qwen3.5 --text kjv.txt --output examples/qwen3.5-tiny --steps 1200 --window 256

They need 7 to 30 minutes on one core and repeat to the bit on the same machine and library versions.
Larger variants: --layers, --hidden-size, --intermediate-size, --experts, --vocabulary. `--write-text FOLDER` also
writes the held-out evaluation text and the calibration text.
"""

import argparse
from dataclasses import fields, replace
from pathlib import Path

import deepseek_v4
import minimax_m2
import nemotron_h
import qwen3_5
import torch
from architecture import Architecture, Sizes
from checkpoint import write_checkpoint
from corpus import CALIBRATION_BOOKS, EVALUATION_BOOKS, join, read_books
from tokenizer import train_tokenizer, write_tokenizer
from training import initialize, perplexity, train
from transformers import PreTrainedModel

ARCHITECTURES: dict[str, Architecture] = {
    "minimax-m2": minimax_m2,
    "nemotron-h": nemotron_h,
    "deepseek-v4": deepseek_v4,
    "qwen3.5": qwen3_5,
}


def arguments() -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("architecture", choices=ARCHITECTURES)
    parser.add_argument("--text", type=Path, required=True, help="output of `bible -f gen1:1-rev22:21`")
    parser.add_argument("--output", type=Path, required=True, help="folder to write the checkpoint to")
    parser.add_argument("--write-text", type=Path, metavar="FOLDER", help="write evaluation.txt and calibration.txt")
    for field in fields(Sizes):
        parser.add_argument("--" + field.name.replace("_", "-"), type=int, metavar="N")
    parser.add_argument("--steps", type=int, default=2600, metavar="N")
    parser.add_argument("--batch", type=int, default=4, metavar="N", help="windows per step (default %(default)s)")
    parser.add_argument("--window", type=int, default=512, metavar="N", help="tokens per window (default %(default)s)")
    parser.add_argument("--learning-rate", type=float, default=4e-3, metavar="X")
    parser.add_argument("--seed", type=int, default=0, metavar="N")
    parser.add_argument("--threads", type=int, default=1, metavar="N")
    return parser.parse_args()


def main() -> None:
    """Corpus, tokenizer, training, export; prints the perplexity on the held-out books."""
    options = arguments()
    torch.set_num_threads(options.threads)
    architecture = ARCHITECTURES[options.architecture]
    given = {field.name: getattr(options, field.name) for field in fields(Sizes)}
    sizes = replace(architecture.DEFAULT_SIZES, **{name: size for name, size in given.items() if size is not None})

    books = read_books(options.text)
    documents = [text for book, text in books.items() if book not in EVALUATION_BOOKS]
    evaluation = join(books, EVALUATION_BOOKS)
    if options.write_text:
        options.write_text.mkdir(parents=True, exist_ok=True)
        (options.write_text / "evaluation.txt").write_text(evaluation, encoding="utf-8")
        (options.write_text / "calibration.txt").write_text(join(books, CALIBRATION_BOOKS), encoding="utf-8")

    tokenizer = train_tokenizer(architecture, "".join(documents), sizes.vocabulary)
    begin, end = architecture.BEGIN_OF_TEXT or "", architecture.END_OF_TEXT
    tokens = torch.tensor([token for text in documents for token in tokenizer.encode(begin + text + end).ids])
    held_out = torch.tensor(tokenizer.encode(evaluation).ids)
    print(f"{len(tokens)} tokens of training text, {len(held_out)} held out")

    model: PreTrainedModel = architecture.build(sizes)
    initialize(model, options.seed)
    print(f"{sum(parameter.numel() for parameter in model.parameters())} parameters")
    train(
        model,
        architecture.routers(model),
        tokens,
        steps=options.steps,
        batch=options.batch,
        context=options.window,
        learning_rate=options.learning_rate,
        seed=options.seed,
    )

    write_checkpoint(architecture, architecture.hub_tensors(model), architecture.hub_config(sizes), options.output)
    write_tokenizer(architecture, tokenizer, sizes.context, options.output)
    size = sum(file.stat().st_size for file in options.output.iterdir())
    print(f"{options.output}: {size} bytes; held-out perplexity before rounding: {perplexity(model, held_out):.3f}")


if __name__ == "__main__":
    main()
