"""Commands that measure models."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from .options import hub_options, json_option, text_options

if TYPE_CHECKING:
    from .runner.evaluate import Parity
    from .sources.model import Model


@click.command()
@click.argument("model")
@text_options
@hub_options
@json_option
def perplexity(
    model: str,
    file: Path | None,
    context: int,
    chunks: int | None,
    revision: str | None,
    token: str | None,
    as_json: bool,
) -> None:
    """Perplexity of a checkpoint or a GGUF file on a text, defined as llama-perplexity does.

    \b
    Examples:
      moecast perplexity CHECKPOINT -f text.txt
      moecast perplexity model.gguf -f text.txt --chunks 20 --json
    """
    from .console import watch
    from .report import show_perplexity
    from .runner.evaluate import EVALUATION_TEXT
    from .runner.evaluate import perplexity as run

    opened = _open(model, revision, token)
    with watch() as progress:
        result = run(opened, file or EVALUATION_TEXT, context, chunks, progress)
    show_perplexity(str(opened.path), result, as_json)


@click.command()
@click.argument("reference")
@click.argument("candidate")
@text_options
@click.option("--max-kld", type=float, help="Exit with 1 when the mean KL divergence is above this.")
@hub_options
@json_option
def parity(
    reference: str,
    candidate: str,
    file: Path | None,
    context: int,
    chunks: int | None,
    max_kld: float | None,
    revision: str | None,
    token: str | None,
    as_json: bool,
) -> None:
    """How far CANDIDATE is from REFERENCE: KL divergence, perplexity, agreement on the most probable token.

    \b
    Examples:
      moecast parity CHECKPOINT model.gguf --max-kld 0.05
      moecast parity a.gguf b.gguf -f text.txt --json
    """
    from .console import watch
    from .report import show_parity
    from .runner.evaluate import EVALUATION_TEXT
    from .runner.evaluate import parity as run

    first, second = _open(reference, revision, token), _open(candidate, None, token)
    with watch() as progress:
        result = run(first, second, file or EVALUATION_TEXT, context, chunks, progress)
    show_parity(f"{second.path} against {first.path}", result, as_json)
    judge(result, max_kld)


def judge(result: Parity | None, max_kld: float | None) -> None:
    """Exit with 1 when a result is worse than the user accepts."""
    if result and max_kld is not None and not result.mean_kld <= max_kld:
        click.echo(f"Failed: mean KL divergence {result.mean_kld:.6f} is above {max_kld}", err=True)
        sys.exit(1)


def _open(source: str, revision: str | None, token: str | None) -> Model:
    from .console import watch
    from .sources.locate import locate
    from .sources.model import open_model

    with watch() as progress:
        return open_model(locate(source, revision, token, progress)[0])
