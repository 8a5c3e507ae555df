"""Options that mean the same in every command, spelled once."""

from __future__ import annotations

import re
import traceback
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar, cast

import click

from ..errors import BadInput
from .terminal import one_line, save_traceback

Command = TypeVar("Command", bound=Callable[..., Any])

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}


class Size(click.ParamType[int]):
    """A number of bytes as people write it: 4GB and 4G are decimal, 4GiB is binary."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]I?)?B?", value.strip(), re.IGNORECASE)
        if not match:
            self.fail(f"{value!r} is not a size, expected for example 40GB or 36GiB", param, ctx)
        size = float(match[1]) * _UNITS[(match[2] or "").upper()]
        if size >= 2**63:
            self.fail(f"{value!r} is more than any disk or memory has", param, ctx)
        return int(size)


class TypeOverride(click.ParamType[tuple[str, str]]):
    """REGEX=TYPE: a regular expression for tensor names, and a ggml type."""

    name = "regex=type"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, str]:
        pattern, _, type_name = value.rpartition("=")
        if not pattern:
            self.fail(f"{value!r}, expected REGEX=TYPE, for example ffn_down_exps=q6_k", param, ctx)
        return pattern, type_name.upper()


class FloatType(click.Choice[str]):
    """The name of a torch type of floats; commands get the type itself."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        import torch

        return value if isinstance(value, torch.dtype) else getattr(torch, super().convert(value, param, ctx))


class Commands(click.Group):
    """Turns whatever a command raises into one line: bad input exits with 2, what nobody foresaw with 3."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (click.ClickException, click.Abort, click.exceptions.Exit, SystemExit, BrokenPipeError):
            raise
        except BadInput as error:
            click.echo(one_line(f"Error: {error}"), err=True)
            ctx.exit(2)
        except KeyboardInterrupt:
            click.echo("Interrupted: run the same command again, it continues where it stopped.", err=True)
            ctx.exit(130)
        except BaseException as error:  # the panics of libraries are no Exception
            what, place = traceback.format_exception_only(error)[-1].strip(), save_traceback(error)
            click.echo(one_line(f"Unexpected error: {what}; its traceback is in {place}"), err=True)
            ctx.exit(3)


def shared(*options: Callable[[Command], Command]) -> Callable[[Command], Command]:
    def decorate(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


json_option = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON on standard output.")
hub_options = shared(
    click.option("--revision", help="Branch, tag or commit of a Hub repository."),
    click.option("--token", envvar="HF_TOKEN", help="Hub access token; by default the one `hf auth login` stored."),
)
chunk_options = shared(
    click.option("-c", "--context", default=512, show_default=True, help="Tokens in a chunk."),
    click.option("--chunks", type=int, help="Use at most this many chunks of the text."),
)
text_options = shared(
    click.option("-f", "--file", type=click.Path(path_type=Path), help="Evaluation text; a bundled one by default."),
    chunk_options,
)
pad_option = click.option(
    "--pad/--no-pad", default=True, show_default=True, help="Fill rows up with zeros to fit the recipe."
)
mtp_option = click.option(
    "--mtp/--no-mtp", default=None, help="Keep multi-token prediction.  [default: if that allows --pad]"
)
quant_option = click.option("--quant", help="Recipe, as llama-quantize names it.  [default: Q4_K_M, for ONNX Q4_0]")
target_option = click.option(
    "--to", "file_format", type=click.Choice(["gguf", "onnx"]), default="gguf", show_default=True, help="File format."
)
overwrite_option = click.option("--overwrite", is_flag=True, help="Replace an existing output.")
dry_run_option = click.option("--dry-run", is_flag=True, help="Show types and size, write nothing.")
calibration_option = click.option(
    "--calibration", type=click.Path(path_type=Path), help="Calibration text; a bundled one by default."
)
imatrix_option = click.option(
    "--imatrix", type=click.Path(path_type=Path), help="Weigh columns by this importance matrix, GGUF or .dat."
)
low_memory_option = click.option("--low-memory", is_flag=True, help="ONNX: weights stay in the file; much slower.")
memory_option = click.option(
    "--memory", type=Size(), help="Take no more memory than this, for example 8GB; what does not fit goes to disk."
)
compute_dtype_option = click.option(
    "--compute-dtype",
    type=FloatType(["float32", "bfloat16"]),
    default="float32",
    show_default=True,
    help="What products with weights are computed in; bfloat16 is faster, and blurs KL divergences below 0.001.",
)
error_feedback_option = click.option(
    "--error-feedback/--no-error-feedback",
    default=None,
    help="Let each weight make good the rounding of others (GPTQ); slower.  [default: unless --quant]",
)
threads_option = click.option(
    "--threads", type=click.IntRange(1, 4096), help="Threads to quantize with, all cores by default."
)


def goal_options(command: Command) -> Command:
    """What a file should amount to: the command gets a `goal`, whichever option said it."""

    @shared(
        quant_option,
        click.option("--size", type=Size(), help="Best plan for a file of this size, for example 96GB."),
        click.option("--bpw", "bits_per_weight", type=float, help="Best plan for so many bits for each weight."),
        click.option("--bytes-per-token", type=Size(), help="With --size or --bpw: most that a token may touch."),
        click.option("--plan", type=click.Path(path_type=Path), help="Types from a file of `moecast plan -o`."),
        click.option("--like", type=click.Path(path_type=Path), help="Types from another GGUF file."),
    )
    @wraps(command)
    def with_goal(
        quant: str | None,
        size: int | None,
        bits_per_weight: float | None,
        bytes_per_token: int | None,
        plan: Path | None,
        like: Path | None,
        **others: Any,
    ) -> Any:
        from ..convert.plans.choose import Goal

        given = {"quant": quant, "size": size, "bpw": bits_per_weight, "plan": plan, "like": like}
        named = [f"--{name}" for name, value in given.items() if value is not None]
        if len(named) > 1:
            raise BadInput(f"{' and '.join(named)} exclude each other: give one")
        return command(goal=Goal(quant, size, bits_per_weight, plan, like, bytes_per_token), **others)

    return cast(Command, with_goal)
