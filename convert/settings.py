"""Settings of a conversion: what to aim at, what to calibrate with, what to write; the messages name options.

They are checked before torch is imported, so that a typo is answered at once.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import BadInput
from ..quant.planning.onnx_plan import onnx_recipe_named
from ..quant.planning.plan import Plan
from ..quant.planning.recipes import recipe_named
from ..runner.settings import Evaluation
from ..runner.texts import CALIBRATION_TEXT, DEFAULT_CONTEXT, chunk_tokens

if TYPE_CHECKING:
    from torch import Tensor

    from ..quant.planning.fit import Machine
    from ..sources.tokenizer import Tokenizer

_FILE_NAME = r'[^/\\:*?"<>|.][^/\\:*?"<>|]*'  # what every system takes

VERIFICATION = Evaluation(chunks=16)
"""What a conversion is verified on unless somebody says otherwise."""


@dataclass(frozen=True)
class Goal:
    """What the types of a file follow from: one of a recipe, a size, bits per weight, a plan, another file, a machine.

    Attributes:
        recipe: its name: Q4_K_M, Q8_0, BF16, ..., or native for what the checkpoint itself holds; where nothing is
            set, the usual one of the file format.
        size: bytes of the finished file, all parts together.
        bits_per_weight: average over all weights.
        plan: a file of `moecast plan -o`, or a plan for the model's graph, to which no `Form` applies.
        like: a GGUF file whose types to take.
        machine: whose memory llama.cpp is to make the best of, by what is typical of each role.
        bytes_per_token: with a size or bits per weight, the most that one token may touch.
        tensor_types: (regular expression, type) pairs that overrule a recipe or a plan for the tensors whose GGUF names
            match; the first that matches counts, protected weights stay as they are.
        measure: under a size or bits per weight, choose types by what measuring this model shows, which conversions
            do by default, and not by what is typical of each role.
    """

    recipe: str | None = None
    size: int | None = None
    bits_per_weight: float | None = None
    plan: str | Path | Plan | None = None
    like: str | Path | None = None
    bytes_per_token: float | None = None
    measure: bool | None = None
    machine: Machine | None = None
    tensor_types: Sequence[tuple[str, str]] = ()

    def __post_init__(self) -> None:
        given = {
            "--quant": self.recipe,
            "--size": self.size,
            "--bpw": self.bits_per_weight,
            "--plan": self.plan,
            "--like": self.like,
            "--fit": self.machine,
        }
        if self.recipe == "":
            raise BadInput("--quant is empty, expected a recipe: `moecast recipes` lists them")
        if self.recipe is not None:
            recipe_named(self.recipe)
        named = [option for option, value in given.items() if value is not None]
        if len(named) > 1:
            raise BadInput(f"{' and '.join(named)} exclude each other: give one")
        if self.bytes_per_token is not None and not self.is_budget:
            raise BadInput("--bytes-per-token is a further limit of a budget: add --size or --bpw")
        if self.tensor_types and self.is_budget:
            raise BadInput("--size and --bpw choose the type of every tensor: leave out --tensor-type, or give --quant")
        if self.measure and not self.is_budget:
            raise BadInput("--measure finds the best plan for a budget: add --size or --bpw")

    @property
    def is_recipe(self) -> bool:
        return self.plan is None and self.like is None and self.machine is None and not self.is_budget

    @property
    def is_budget(self) -> bool:
        return self.size is not None or self.bits_per_weight is not None

    @property
    def measures(self) -> bool:
        """Whether a conversion measures the model first, and so reads all of it more than once."""
        return self.is_budget and self.measure is not False


@dataclass(frozen=True)
class Calibration:
    """What shows which inputs of a weight matter, and what becomes of that.

    Attributes:
        text: runs through the model, in `chunks` chunks of `context` tokens, by default all of it; None: none does.
        imatrix: an importance matrix of llama.cpp, as GGUF or .dat, or one of the Hub, `owner/name/file`, instead.
        save_to: where to write what the text shows, as llama.cpp's importance matrix.
        min_expert_tokens: how many tokens every expert must have seen; by default those that saw few borrow from the
            layer's others.
        error_feedback: round weights so that each makes good what the rounding of those before it did to the outputs
            (GPTQ), which takes a text, and longer; by default, unless for a recipe.
    """

    text: str | Path | None = CALIBRATION_TEXT
    context: int = DEFAULT_CONTEXT
    chunks: int | None = None
    imatrix: str | Path | None = None
    save_to: str | Path | None = None
    min_expert_tokens: int = 0
    error_feedback: bool | None = None

    def __post_init__(self) -> None:
        wanting = {
            "--imatrix-out": self.save_to is not None,
            "--min-expert-tokens": self.min_expert_tokens > 0,
            "--error-feedback": self.error_feedback,
        }
        if self.chunks is not None and self.text is None:
            raise BadInput("--calibration-chunks needs calibration text: leave out --no-calibration")
        for option, given in wanting.items():
            if given and not self.runs:
                raise BadInput(f"{option} needs calibration text: leave out --imatrix and --no-calibration")

    def tokens(self, tokenizer: Tokenizer) -> Tensor:
        """Token ids, int64 [chunks, context], of the text, or of the bundled one where there is none.

        Raises BadInput for a text that cannot be read or is too short.
        """
        return chunk_tokens(tokenizer, Path(self.text or CALIBRATION_TEXT), self.context, self.chunks)

    @property
    def runs(self) -> bool:
        """Whether a text runs through the model."""
        return self.text is not None and self.imatrix is None

    @property
    def weighs(self) -> bool:
        """Whether anything shows which inputs matter."""
        return self.text is not None or self.imatrix is not None


def require_sound(goal: Goal, calibration: Calibration = Calibration(), file_format: str = "gguf") -> None:
    """Raises BadInput for a goal that the file format cannot have, and for calibration that would do nothing."""
    given = calibration.text not in (None, CALIBRATION_TEXT) or calibration.chunks is not None
    if calibration.imatrix and given and not goal.measures:
        option = "--calibration" if calibration.chunks is None else "--calibration-chunks"
        raise BadInput(f"{option} and --imatrix exclude each other unless a budget is measured: give one")
    if file_format == "gguf":
        return
    if goal.machine:
        raise BadInput(f"--fit plans for llama.cpp, which runs GGUF files: leave out --to {file_format}")
    if goal.tensor_types:
        raise BadInput(f"--tensor-type names tensors and types of GGUF files: leave it out with --to {file_format}")
    if not goal.is_recipe:
        raise BadInput(
            f"--to {file_format}: its experts have one width for all projections of a layer, so that types cannot be "
            "chosen weight by weight; use --quant"
        )
    if goal.recipe is not None:
        onnx_recipe_named(goal.recipe)


def require_one_pass(goals: Sequence[Goal], reuse: str | Path | None) -> None:
    """Raises BadInput for goals that one pass over the source cannot serve, taking what is the same from a file."""
    if not goals:
        raise BadInput("no goal is given, expected at least one recipe")
    if len(goals) > 1 and any(goal.measures for goal in goals):
        raise BadInput(
            "a budget is measured for one file alone: give it alone, with --no-measure, or as a plan that "
            "`moecast plan --measure -o` wrote"
        )
    if len(goals) > 1 and reuse:
        raise BadInput("--reuse is for one file alone: give one recipe")


NO_CALIBRATION = Calibration(text=None)


@dataclass(frozen=True)
class Output:
    """What is written, and where.

    Attributes:
        path: a .gguf file, or a folder for `<name>-<quant>.gguf` or for the folder `<name>-<quant>-onnx`.
        name: the model's name, by default that of its folder or repository.
        file_format: gguf or onnx.
        split_max_bytes: GGUF: start a new file when the data section would grow beyond this.
        pre: GGUF: llama.cpp's name of the text splitter, by default the architecture's.
        activations: ONNX: what is rounded to before products, int8 (fast, the default) or float32.
        overwrite: replace an existing output.
        reuse: GGUF: an earlier file, whose tensors are taken where type, source and weighing are the same.
        provenance: GGUF: facts about the source to store in the file, by default what is known of a Hub repository.
    """

    path: str | Path = "."
    name: str | None = None
    file_format: str = "gguf"
    split_max_bytes: int | None = None
    pre: str | None = None
    activations: str | None = None
    overwrite: bool = False
    reuse: str | Path | None = None
    provenance: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.name is not None and not (self.name.isprintable() and re.fullmatch(_FILE_NAME, self.name)):
            raise BadInput(f"--name is {self.name!r}, expected a name that files can have, such as Model-1.0")
        if self.file_format == "onnx":
            of_gguf = {"--pre": self.pre, "--split-max-size": self.split_max_bytes, "--reuse": self.reuse}
            _refuse("an ONNX model", of_gguf)
        else:
            _refuse("a GGUF file", {"--activations": self.activations})

    def places(self, name: str, quants: Sequence[str]) -> list[Path]:
        """The same for each of several, which are made in one folder. Raises BadInput where two have one name."""
        paths = [self.place(name, quant) for quant in quants]
        if len(set(paths)) == len(paths):
            return paths
        if Path(self.path).suffix == ".gguf":
            raise BadInput(f"--output is {self.path}, one file for {len(paths)}: give a folder")
        twice = next(quant for quant in quants if quants.count(quant) > 1)
        raise BadInput(f"two files are both called {twice}: convert to one of them")

    @property
    def rounded_activations(self) -> str | None:
        """What ONNX Runtime rounds activations to; None for a GGUF file, whose engine decides."""
        return (self.activations or "int8") if self.file_format == "onnx" else None

    def place(self, name: str, quant: str) -> Path:
        """The GGUF file or the ONNX folder, in a folder that exists. Raises BadInput where it cannot be made."""
        path = Path(self.path)
        if self.file_format == "onnx":
            folder = path = path / f"{name}-{quant}-onnx"
        else:
            path = path if path.suffix == ".gguf" else path / f"{name}-{quant}.gguf"
            folder = path.parent
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise BadInput(f"{folder} cannot be made: {error.strerror}; choose another --output") from None
        return path


def _refuse(what: str, options: Mapping[str, object]) -> None:
    for option, value in options.items():
        if value is not None:
            raise BadInput(f"{option} means nothing for {what}; leave it out")
