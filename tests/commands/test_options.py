"""What people write after options: sizes with units, goals that exclude each other, errors in one line."""

from __future__ import annotations

from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result
from moecast.cli import main
from moecast.commands.values import Size

EXAMPLE = Path(__file__).parents[2] / "examples" / "minimax-m2-tiny"


def _run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.mark.parametrize(
    ("written", "count"),
    [
        ("0", 0),
        ("123", 123),
        ("123B", 123),
        ("500K", 500_000),
        ("4GB", 4 * 10**9),
        ("4G", 4 * 10**9),
        ("4gb", 4 * 10**9),
        (" 4 GB ", 4 * 10**9),
        ("36GiB", 36 * 2**30),
        ("36gib", 36 * 2**30),
        ("1Ki", 1024),
        ("2MiB", 2**21),
        ("1.5T", 15 * 10**11),
        ("0.5TiB", 2**39),
    ],
)
def test_sizes(written: str, count: int) -> None:
    assert Size().convert(written, None, None) == count


@pytest.mark.parametrize("written", ["", "GB", "4XB", "-3GB", "1.2.3G", "4GBs", "4 G B", "4iB", ".5G", "1e9", "nan"])
def test_what_is_no_size(written: str) -> None:
    with pytest.raises(click.BadParameter, match="expected for example 40GB or 36GiB"):
        Size().convert(written, None, None)


def test_a_bad_size_is_one_line_and_exit_code_2() -> None:
    result = _run("plan", EXAMPLE, "--size", "4XB")
    assert result.exit_code == 2
    (line,) = [line for line in result.stderr.splitlines() if "4XB" in line]
    assert line == "Error: Invalid value for '--size': '4XB' is not a size, expected for example 40GB or 36GiB"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--quant", "Q4_K_M", "--size", "2MB"], "--quant and --size exclude each other"),
        (["--size", "2MB", "--bpw", "4"], "--size and --bpw exclude each other"),
        (["--quant", "Q4_K_M", "--like", "a.gguf"], "--quant and --like exclude each other"),
    ],
)
def test_a_file_has_one_goal(options: list[str], message: str) -> None:
    result = _run("plan", EXAMPLE, *options)
    assert result.exit_code == 2 and message in result.stderr
    assert len(result.stderr.splitlines()) == 1
