"""What options and arguments may be: sizes, numbers, names of models and of importance matrices."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import click

from ..documents import exists
from ..errors import BadInput

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


class Number(click.FloatRange):
    """A finite number of at least zero."""

    def __init__(self, min_open: bool = False) -> None:
        super().__init__(min=0, min_open=min_open)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        number = float(super().convert(value, param, ctx))
        if not math.isfinite(number):
            self.fail(f"{value} is not a finite number", param, ctx)
        return number


class TypeOverride(click.ParamType[tuple[str, str]]):
    """REGEX=TYPE: a regular expression for tensor names, and a ggml type."""

    name = "regex=type"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, str]:
        pattern, _, type_name = value.rpartition("=")
        if not pattern:
            self.fail(f"{value!r}, expected REGEX=TYPE, for example ffn_down_exps=q6_k", param, ctx)
        return pattern, type_name.upper()


class ModelName(click.ParamType[str]):
    """What names a model, of which all is known to be right that can be known without a look at it."""

    name = "model"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        from ..sources.named import parse_model

        parse_model(value)
        return str(value)


class MatrixName(click.ParamType[str]):
    """What names an importance matrix: a file, or one of a repository."""

    name = "matrix"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        from ..sources.hub.address import parse_file

        if not exists(Path(value)):
            if "/" not in value:
                raise BadInput(f"--imatrix {value}: no such file")
            parse_file(value)
        return str(value)


SOURCE = ModelName()
