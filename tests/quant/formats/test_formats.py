"""The table of formats against gguf-py's."""

import subprocess
import sys

import pytest
from gguf.constants import GGML_QUANT_SIZES
from moecast.errors import BadInput
from moecast.quant import FORMATS, Format, format_named, format_with_id

NEVER_STORED = {"Q8_1", "Q8_K"}


def test_table_equals_ggufs() -> None:
    theirs = {type.name: Format(type.name, int(type), *sizes) for type, sizes in GGML_QUANT_SIZES.items()}
    newer = set(FORMATS) - set(theirs)
    assert newer <= {"Q1_0", "Q2_0"}
    assert {name: FORMATS[name] for name in FORMATS if name not in newer} == {
        name: format for name, format in theirs.items() if name not in NEVER_STORED
    }


def test_lookups() -> None:
    for format in FORMATS.values():
        assert format_named(format.name) is format_with_id(format.id) is format
    assert format_named("Q4_K").bits_per_weight == 4.5
    assert format_named("Q4_K").row_bytes(512) == 288


def test_bad_lookups_say_what_is_wrong() -> None:
    with pytest.raises(BadInput, match=r"unknown tensor type 'Q4_M'; known types: F32, F16, .*Q4_K"):
        format_named("Q4_M")
    with pytest.raises(BadInput, match="unknown tensor type number 99"):
        format_with_id(99)
    with pytest.raises(BadInput, match="in blocks of 256 values, which 2688 columns do not divide into"):
        format_named("Q4_K").row_bytes(2688)


def test_importing_the_package_loads_no_torch() -> None:
    code = "import sys, moecast.quant; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
