"""Options that mean the same in every command, spelled once."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Mapping
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import click

from ..documents import exists
from ..errors import BadInput, MoecastError
from .logs import ARGUMENTS, LOGGER, one_command
from .terminal import one_line, save_traceback
from .values import MatrixName, Number, Size, TypeOverride

if TYPE_CHECKING:
    from ..convert.settings import Calibration, Goal, Output
    from ..quant.planning.plan import Form
    from ..runner.settings import Compute, Opening
    from ..sources.hub.access import HubAccess

Command = TypeVar("Command", bound=Callable[..., Any])


class Commands(click.Group):
    """Turns whatever a command raises into one line: bad input exits with 2, what nobody foresaw with 3."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        ctx.meta[ARGUMENTS] = [*args]
        return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        with one_command():
            return self._invoke(ctx)

    def _invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (click.ClickException, click.Abort, click.exceptions.Exit, SystemExit, BrokenPipeError):
            raise
        except MoecastError as error:
            LOGGER.error(one_line(f"Error: {error}"))
            ctx.exit(2)
        except KeyboardInterrupt:
            LOGGER.error("Interrupted: run the same command again, it continues where it stopped.")
            ctx.exit(130)
        except BaseException as error:  # the panics of libraries are no Exception
            what, place = traceback.format_exception_only(error)[-1].strip(), save_traceback(error)
            LOGGER.error(one_line(f"Unexpected error: {what}; its traceback is in {place}"))
            LOGGER.debug("Its traceback:", exc_info=error)
            ctx.exit(3)


def shared(*options: Callable[[Command], Command]) -> Callable[[Command], Command]:
    def decorate(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


def grouped(
    name: str, make: Callable[..., Any], *options: Callable[[Command], Command]
) -> Callable[[Command], Command]:
    """Options whose values a command gets as one object under a name: what `make` makes of them, by their names."""

    def probe() -> None: ...

    shared(*options)(cast(Any, probe))
    names = [parameter.name for parameter in cast(Any, probe).__click_params__]

    def decorate(command: Command) -> Command:
        @wraps(command)
        def with_object(**values: Any) -> Any:
            own = {key: values.pop(key) for key in names}
            return command(**{name: make(**own)}, **values)

        return shared(*options)(cast(Command, with_object))

    return decorate


def require_files(given: Mapping[str, Path | None]) -> None:
    """Raises BadInput where what an option names is not there."""
    for option, path in given.items():
        if path is not None and not exists(path):
            raise BadInput(f"{option} {path}: no such file")


def _form(pad: bool | None, mtp: bool | None) -> Form:
    from ..quant.planning.plan import Form

    return Form(pad, mtp)


def _goal(**values: Any) -> Goal:
    from ..convert.settings import Goal

    goal = Goal(**values)
    require_files({"--plan": values["plan"], "--like": values["like"]})
    return goal


def _goals(recipe: str | None, **values: Any) -> tuple[Goal, ...]:
    names = [None] if recipe is None else [name.strip() for name in recipe.split(",")]
    return tuple(_goal(recipe=name, **values) for name in names)


def _calibration(
    calibration: Path | None, calibration_chunks: int | None, no_calibration: bool = False, **values: Any
) -> Calibration:
    from ..convert.settings import Calibration
    from ..runner.texts import CALIBRATION_TEXT

    if calibration and no_calibration:
        raise BadInput("--calibration and --no-calibration exclude each other: give one")
    text = None if no_calibration else calibration or CALIBRATION_TEXT
    made = Calibration(text, chunks=calibration_chunks, **values)
    require_files({"--calibration": calibration})
    return made


def _compute(**values: Any) -> Compute:
    from ..runner.settings import Compute

    return Compute(**values)


def _opening(**values: Any) -> Opening:
    from ..runner.settings import Opening

    return Opening(**values)


def _drafted(draft: bool, tokens: int | None) -> int | None:
    if tokens and not draft:
        raise BadInput("--tokens is for --draft: give both, or neither")
    return (tokens or 3) if draft else None


def _access(**values: Any) -> HubAccess:
    from ..sources.hub.access import HubAccess

    return HubAccess(**values)


def _output(**values: Any) -> Output:
    from ..convert.settings import Output

    made = Output(**values)
    require_files({"--reuse": values["reuse"]})
    return made


reuse_option = click.option(
    "--reuse",
    type=click.Path(path_type=Path),
    metavar="EARLIER.gguf",
    help="Take what is the same from an earlier output; --overwrite alone makes all anew.",
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON on standard output.")
overwrite_option = click.option("--overwrite", is_flag=True, help="Replace an existing output.")
file_format_option = click.option(
    "--to", "file_format", type=click.Choice(["gguf", "onnx"]), default="gguf", show_default=True, help="File format."
)
max_kld_option = click.option(
    "--max-kld", type=Number(), help="Exit with 1 when the mean KL divergence is above this, or token ids differ."
)

_HUB_OPTIONS = (
    click.option("--revision", help="Branch, tag or commit of a Hub repository."),
    click.option(
        "--token", envvar="HF_TOKEN", is_eager=True, help="Hub access token; by default the one `hf auth login` stored."
    ),
)
ignore_config_option = click.option(
    "--ignore-config",
    multiple=True,
    metavar="KEY",
    help="A key of config.json or GGUF metadata that moecast does not know and that changes no number; repeatable.",
)
opening_options = grouped(
    "opening",
    _opening,
    click.option(
        "--attention",
        type=click.Choice(["model", "full"]),
        default="model",
        show_default=True,
        help="With full, MODEL or CANDIDATEs attend to all tokens before, also where they pick some of them.",
    ),
    click.option("--low-memory", is_flag=True, help="ONNX: weights stay in the file; much slower."),
)
drafted_options = grouped(
    "drafted",
    _drafted,
    click.option("--draft", is_flag=True, help="How many drafted tokens REFERENCE accepts; CANDIDATE is its draft."),
    click.option("-n", "--tokens", type=click.IntRange(1, 64), help="Tokens of each draft, by default 3."),
)
hub_options = grouped("access", _access, *_HUB_OPTIONS)
source_options = grouped("access", _access, *_HUB_OPTIONS, ignore_config_option)
streaming_source_options = grouped(
    "access",
    _access,
    click.option("--scratch", type=Size(), help="Most disk for shards from the Hub; by default, that of two layers."),
    click.option("--keep-source", is_flag=True, help="Download everything from the Hub first, and keep it."),
    *_HUB_OPTIONS,
    ignore_config_option,
)


context_option = click.option(
    "-c", "--context", type=click.IntRange(4), default=512, show_default=True, help="Tokens in a chunk."
)


def chunks_option(*names: str) -> Callable[[Command], Command]:
    return click.option(*names, type=click.IntRange(1), help="Use at most this many chunks of the text.")


form_options = grouped(
    "form",
    _form,
    click.option(
        "--pad/--no-pad",
        default=None,
        help="Fill rows up with zeros to fit the recipe.  [default: those that make the file smaller]",
    ),
    click.option(
        "--mtp/--no-mtp", default=None, help="Keep multi-token prediction.  [default: if that allows padding]"
    ),
)

_DEFAULT_RECIPES = "[default: Q4_K_M, for ONNX Q4_0]"
_RECIPE_OPTION = click.option("--quant", "recipe", help=f"Recipe, as llama-quantize names it.  {_DEFAULT_RECIPES}")
_RECIPES_OPTION = click.option(
    "--quant",
    "recipe",
    metavar="NAME[,NAME...]",
    help=f"Recipe, as llama-quantize names it; several make a file each in one pass.  {_DEFAULT_RECIPES}",
)
_OTHER_GOALS = (
    click.option("--size", type=Size(), help="Best plan for a file of this size, for example 96GB."),
    click.option(
        "--bpw", "bits_per_weight", type=Number(min_open=True), help="Best plan for so many bits for each weight."
    ),
    click.option("--bytes-per-token", type=Size(), help="With --size or --bpw: most that a token may touch."),
    click.option("--plan", type=click.Path(path_type=Path), help="Types from a file of `moecast plan -o`."),
    click.option("--like", type=click.Path(path_type=Path), help="Types from another GGUF file."),
    click.option(
        "--tensor-type",
        "tensor_types",
        multiple=True,
        type=TypeOverride(),
        help="Another type for the tensors whose GGUF names match; may be repeated, the first match counts.",
    ),
)
goal_options = grouped("goal", _goal, _RECIPE_OPTION, *_OTHER_GOALS)


def measured_goal_options(help: str) -> Callable[[Command], Command]:
    """As `goal_options`, with what `help` says of --measure."""
    return grouped("goal", _goal, _RECIPE_OPTION, *_OTHER_GOALS, _measure_option(help))


def measured_goals_options(help: str) -> Callable[[Command], Command]:
    """The same for any number of recipes, or one other goal."""
    return grouped("goals", _goals, _RECIPES_OPTION, *_OTHER_GOALS, _measure_option(help))


def _measure_option(help: str) -> Callable[[Command], Command]:
    return click.option("--measure/--no-measure", default=None, help=help)


_CALIBRATION_OPTION = click.option(
    "--calibration", type=click.Path(path_type=Path), help="Calibration text; a bundled one by default."
)
imatrix_option = click.option(
    "--imatrix",
    type=MatrixName(),
    metavar="FILE",
    help="Weigh columns by this importance matrix, GGUF or .dat, or OWNER/NAME/FILE of the Hub.",
)
calibration_text_options = grouped(
    "calibration",
    _calibration,
    _CALIBRATION_OPTION,
    context_option,
    chunks_option("--calibration-chunks", "--chunks"),
)
_WEIGHING_OPTIONS = (
    _CALIBRATION_OPTION,
    click.option("--calibration-chunks", type=click.IntRange(1), help="Calibrate on at most this many of its chunks."),
    click.option("--no-calibration", is_flag=True, help="Quantize without calibration."),
    imatrix_option,
    click.option(
        "--error-feedback/--no-error-feedback",
        default=None,
        help="Compensate rounding errors within each weight (GPTQ); three to four times slower.  "
        "[default: unless --quant]",
    ),
)
weighing_options = grouped("calibration", _calibration, *_WEIGHING_OPTIONS)
calibration_options = grouped(
    "calibration",
    _calibration,
    *_WEIGHING_OPTIONS,
    click.option(
        "--imatrix-out", "save_to", type=click.Path(path_type=Path), help="Write what calibration found as GGUF."
    ),
    click.option(
        "--min-expert-tokens",
        type=click.IntRange(0),
        default=0,
        help="Stop where an expert saw fewer calibration tokens than this.",
    ),
)

output_options = grouped(
    "output",
    _output,
    click.option(
        "-o", "--output", "path", default=".", type=click.Path(path_type=Path), help="A .gguf file or a folder."
    ),
    click.option("--name", help="The model's name; by default, that of its folder or repository."),
    file_format_option,
    click.option(
        "--activations",
        type=click.Choice(["int8", "float32"]),
        help="ONNX: what activations are rounded to before products.  [default: int8]",
    ),
    click.option(
        "--split-max-size",
        "split_max_bytes",
        type=Size(),
        help="Start a new file beyond this size, for example 40G.",
    ),
    click.option("--pre", help="Name of llama.cpp's text splitter, where the automatic choice is wrong."),
    overwrite_option,
    reuse_option,
)

_THREADS_OPTION = click.option(
    "--threads", type=click.IntRange(1, 4096), help="Threads to quantize with, all cores by default."
)
_DTYPE_OPTION = click.option(
    "--compute-dtype",
    "dtype",
    type=click.Choice(["float32", "bfloat16"]),
    default="float32",
    show_default=True,
    help="What products with weights are computed in; bfloat16 is faster, and hides KL divergences below 0.001.",
)
_MEMORY_OPTION = click.option(
    "--memory", type=Size(), help="Take no more memory than this, for example 8GB; what does not fit goes to disk."
)
_DEVICE_OPTION = click.option(
    "--device",
    default="auto",
    show_default=True,
    metavar="auto|cpu|cuda|cuda:N|mps",
    help="What to compute on; auto takes a CUDA GPU that has the memory. `moecast doctor` shows which there are.",
)
_VRAM = "Take no more of a CUDA GPU's memory than this, for example 20GB; by default, nearly all that is free."


def _vram_option(help: str) -> Callable[[Command], Command]:
    return click.option("--vram", type=Size(), help=help)


_DEVICE_OPTIONS = (_DEVICE_OPTION, _vram_option(_VRAM))
_FITTING_DEVICE_OPTIONS = (
    _DEVICE_OPTION,
    _vram_option(f"{_VRAM} With --fit also the GPU memory of the machine that will run the file, 0 for no GPU."),
)
device_options = grouped("compute", _compute, *_DEVICE_OPTIONS)
quantizing_options = grouped("compute", _compute, _THREADS_OPTION, *_DEVICE_OPTIONS)
evaluating_options = grouped("compute", _compute, _DTYPE_OPTION, *_DEVICE_OPTIONS)
calibrating_options = grouped("compute", _compute, _DTYPE_OPTION, _MEMORY_OPTION, *_DEVICE_OPTIONS)
measuring_options = grouped("compute", _compute, _DTYPE_OPTION, _MEMORY_OPTION, *_FITTING_DEVICE_OPTIONS)
compute_options = grouped("compute", _compute, _THREADS_OPTION, _DTYPE_OPTION, _MEMORY_OPTION, *_FITTING_DEVICE_OPTIONS)
