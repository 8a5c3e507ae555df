"""The command line: one module for each group of commands, which parse, call and print.

Everything heavy is imported inside the command that needs it, so that help answers at once.
"""

from __future__ import annotations

import click

from . import __version__
from .commands import convert as cli_convert
from .commands import evaluate as cli_evaluate
from .commands import models as cli_models
from .commands import plan as cli_plan
from .commands import publish as cli_publish
from .commands.logs import LOG_OPTIONS
from .commands.options import Commands


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="moecast")
def main() -> None:
    """Cast mixture-of-experts checkpoints into files that run on the machine you have, and prove the result.

    \b
    Examples:
      moecast inspect CHECKPOINT
      moecast convert OWNER/NAME --quant Q4_K_M
      moecast parity CHECKPOINT out/model.gguf --max-kld 0.05
    """


for command in (
    cli_models.inspect,
    cli_plan.plan,
    cli_convert.convert,
    cli_convert.quantize,
    cli_convert.imatrix,
    cli_convert.prepack,
    cli_evaluate.perplexity,
    cli_evaluate.parity,
    cli_evaluate.run,
    cli_models.download,
    cli_publish.publish,
    cli_models.recipes,
    cli_models.doctor,
    cli_convert.demo,
):
    for option in LOG_OPTIONS:
        option(command)
    main.add_command(command)


if __name__ == "__main__":
    main()
