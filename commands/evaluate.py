"""Commands that measure models."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from .logs import LOGGER, typed_command
from .options import (
    calibrating_options,
    device_options,
    drafted_options,
    evaluating_options,
    json_option,
    max_kld_option,
    opening_options,
    source_options,
)
from .reporting import report_option, save_report
from .terminal import printable
from .texts import category_options, text_options
from .values import SOURCE, Number

if TYPE_CHECKING:
    from ..runner.engines import OnnxModel
    from ..runner.measure.evaluate import Parity
    from ..runner.settings import Compute, Evaluation, Opening
    from ..sources.hub.access import HubAccess
    from ..sources.model import Model


@click.command()
@click.argument("model", type=SOURCE)
@text_options
@evaluating_options
@opening_options
@source_options
@json_option
def perplexity(
    model: str,
    evaluation: Evaluation,
    compute: Compute,
    opening: Opening,
    access: HubAccess,
    as_json: bool,
) -> None:
    """Perplexity of a checkpoint, a GGUF file or an ONNX folder on a text, defined as llama-perplexity does.

    \b
    Examples:
      moecast perplexity CHECKPOINT -f text.txt
      moecast perplexity model.gguf -f text.txt --chunks 20 --json
    """
    from ..runner.measure.evaluate import perplexity as run
    from .console import make_progress
    from .report import show_perplexity

    opened = _open(model, access, opening)
    with make_progress() as progress:
        result = run(opened, evaluation, compute, progress)
    show_perplexity(str(opened.path), result, as_json)
    if not result.is_finite:
        _exit_if([*result.problems])


@click.command()
@click.argument("reference", type=SOURCE)
@click.argument("candidates", metavar="CANDIDATE...", type=SOURCE, nargs=-1)
@category_options
@max_kld_option
@drafted_options
@report_option
@calibrating_options
@opening_options
@source_options
@json_option
def parity(
    reference: str,
    candidates: tuple[str, ...],
    evaluation: Evaluation,
    max_kld: float | None,
    drafted: int | None,
    report_folder: Path | None,
    compute: Compute,
    opening: Opening,
    access: HubAccess,
    as_json: bool,
) -> None:
    """How far each CANDIDATE is from REFERENCE: KL divergence, perplexity, agreement on the most probable token.

    Several are compared side by side, in one pass over REFERENCE. They may be checkpoints, GGUF files and ONNX folders,
    also of other tools.

    With --draft, what drafts tokens of REFERENCE, in it or in the file that `convert --mtp` writes beside it, is
    compared with REFERENCE: how many of the drafted tokens it would have said itself, the most probable every time.

    \b
    Examples:
      moecast parity CHECKPOINT model.gguf --max-kld 0.05
      moecast parity a.gguf b.gguf -f text.txt --json
      moecast parity CHECKPOINT ours.gguf theirs.gguf model-onnx/ --categories
      moecast parity CHECKPOINT *.gguf --text code=code.txt --text chat=chat.txt --memory 16GB
      moecast parity model.gguf --draft
      moecast parity model.gguf model-mtp.gguf --draft --tokens 5 --json
    """
    from ..reports.gather import comparison_report
    from ..runner.measure.candidates import compare
    from .candidates import show_candidates
    from .console import make_progress
    from .report import show_parity

    first = _open(reference, access, replace(opening, attention="model"))
    if drafted:
        _show_accepted(first, candidates, drafted, evaluation, compute, as_json)
        return
    if not candidates:
        raise click.UsageError("Missing argument 'CANDIDATE...'.")
    others = [_open(candidate, replace(access, revision=None), opening) for candidate in candidates]
    with make_progress() as progress:
        compared = compare(first, others, evaluation, compute, progress)
    if len(compared) == 1:
        show_parity(f"{compared[0].path} against {first.path}", compared[0].parity, as_json)
    else:
        show_candidates(first.path, compared, as_json)
    if report_folder:
        save_report(comparison_report(first, others, compared, evaluation, typed_command()), report_folder)
    exit_if_worse([(found.path, found.parity) for found in compared], max_kld)


def _show_accepted(
    model: Model | OnnxModel,
    drafts: Sequence[str],
    tokens: int,
    evaluation: Evaluation,
    compute: Compute,
    as_json: bool,
) -> None:
    """What a model accepts of its drafts, or of those of a file beside it."""
    from ..runner.measure.acceptance import acceptance
    from .console import make_progress
    from .report import show_acceptance

    if len(drafts) > 1:
        raise click.UsageError("--draft compares a model with one draft at most")
    draft = Path(drafts[0]) if drafts else None
    with make_progress() as progress:
        result = acceptance(model, draft, tokens, evaluation, compute, progress)
    show_acceptance(str(model.path), result, as_json)


def exit_if_worse(results: Sequence[tuple[Path, Parity | None]], max_kld: float | None) -> None:
    """Exit with 1 when any result is no number, or worse than the user accepts."""
    failures = [(path, line) for path, parity in results if parity for line in _failures(parity, max_kld)]
    _exit_if([line if len(results) == 1 else f"{path}: {line}" for path, line in failures])


def _failures(result: Parity, max_kld: float | None) -> list[str]:
    """In what a result is no number, or worse than the user accepts."""
    if not result.is_finite:
        return [*result.problems]
    found: list[str] = []
    if max_kld is None:
        return found
    if not result.mean_kld <= max_kld:
        found.append(f"mean KL divergence {result.mean_kld:.6f} is above {max_kld}")
    if result.tokenization is None:
        found.append("the file's text splitter is none that moecast can run, so its token ids are not proved")
    elif result.tokenization.evaluation_tokens > 0:  # probe texts go further than llama.cpp's splitters do: a note
        found.append(f"token ids differ on {result.tokenization}")
    return found


def _exit_if(failures: Sequence[str]) -> None:
    """Exit with 1 when there are any, a line each."""
    for failure in failures:
        LOGGER.error(f"Failed: {failure}")
    if failures:
        sys.exit(1)


@click.command()
@click.argument("model", type=SOURCE)
@click.option("-p", "--prompt", required=True, help="Text to continue, control tokens included.")
@click.option(
    "-n", "--tokens", type=click.IntRange(1), default=128, show_default=True, help="Write at most this many tokens."
)
@click.option(
    "--temperature", type=Number(), default=0.0, show_default=True, help="0 takes the most probable token every time."
)
@click.option("--seed", type=click.IntRange(0, 2**63 - 1), help="For the same random choices again.")
@device_options
@opening_options
@source_options
@json_option
def run(
    model: str,
    prompt: str,
    tokens: int,
    temperature: float,
    seed: int | None,
    compute: Compute,
    opening: Opening,
    access: HubAccess,
    as_json: bool,
) -> None:
    """Continue a text with a checkpoint, a GGUF file or an ONNX folder.

    Checkpoints and GGUF files are read anew for every token: that shows what they say, not how fast they are.

    \b
    Examples:
      moecast run CHECKPOINT -p "Once upon a time"
      moecast run model-onnx/ -p "Once upon a time" --temperature 0.8
    """
    from ..runner.generate import beyond_context, generate
    from .console import print_json

    opened, pieces = _open(model, access, opening), []
    text = generate(opened, prompt, tokens, temperature, seed, compute)
    problems = beyond_context(opened, prompt, tokens)
    for problem in problems:
        LOGGER.warning(problem)
    for piece in text:
        pieces.append(piece)
        if not as_json:
            click.echo(printable(piece, keep="\n\t") if sys.stdout.isatty() else piece, nl=False)
    if as_json:
        print_json({"prompt": prompt, "text": "".join(pieces), "problems": problems})
    else:
        click.echo()


def _open(source: str, access: HubAccess, opening: Opening) -> Model | OnnxModel:
    from ..runner.engines import open_runnable
    from ..sources.locate import locate
    from .console import make_progress

    with make_progress() as progress:
        return open_runnable(locate(source, access, progress)[0], opening, access.ignore_config)
