"""Options that name the texts to evaluate on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import BadInput
from .options import chunks_option, context_option, grouped, require_files

if TYPE_CHECKING:
    from ..runner.settings import Evaluation


class NamedFile(click.ParamType[tuple[str, Path]]):
    """NAME=FILE."""

    name = "name=file"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, Path]:
        name, _, file = value.partition("=")
        if not name or not file:
            self.fail(f"{value!r}, expected NAME=FILE, for example code=code.txt", param, ctx)
        return name, Path(file)


def _evaluation(
    file: Path | None,
    context: int,
    chunks: int | None,
    texts: Sequence[tuple[str, Path]] = (),
    categories: bool = False,
) -> Evaluation:
    """On all texts that are named; on the bundled one where none is."""
    from ..runner.settings import Evaluation
    from ..runner.texts import EVALUATION_TEXT, bundled_categories

    named = bundled_categories() if categories else {}
    for name, text in texts:
        if name in named:
            raise BadInput(f"--text {name} names two texts: give each a name of its own")
        named[name] = text
    require_files({"--file": file} | {f"--text {name}": text for name, text in named.items()})
    return Evaluation(file if file or named else EVALUATION_TEXT, context, chunks, named)


_TEXT_OPTIONS = (
    click.option("-f", "--file", type=click.Path(path_type=Path), help="Evaluation text; a bundled one by default."),
    context_option,
    chunks_option("--chunks"),
)
text_options = grouped("evaluation", _evaluation, *_TEXT_OPTIONS)
category_options = grouped(
    "evaluation",
    _evaluation,
    *_TEXT_OPTIONS,
    click.option(
        "--text",
        "texts",
        multiple=True,
        type=NamedFile(),
        help="A further text of a category, for example code=code.txt; repeatable. The result is told for each.",
    ),
    click.option("--categories", is_flag=True, help="A bundled text for each of several categories."),
)
