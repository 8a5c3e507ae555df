"""What may change of the code while a conversion is interrupted, and what may not."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from moecast.convert.resume import fingerprint
from moecast.quant.formats.kernel_sources import digest

ROOT = Path(fingerprint.__file__).parents[2]
unchanged_digest = fingerprint.code_digest
code_digest = fingerprint.code_digest.__wrapped__  # without its memory
PACKAGES = ("archs", "quant", "sources", "runner", "convert", "reports", "commands")


@pytest.fixture
def program(tmp_path: Path) -> Path:
    """A copy of the code, to be edited."""
    for package in PACKAGES:
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    return tmp_path


def test_a_copy_is_the_same(program: Path) -> None:
    assert code_digest(program) == code_digest() == unchanged_digest()


def _edit(file: Path, old: str, new: str) -> None:
    text = file.read_text(encoding="utf-8")
    assert old in text
    file.write_text(text.replace(old, new, 1), encoding="utf-8")


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("quant/formats/lanes.py", '"""', '"""Said better: '),
        ("quant/formats/lanes.py", "def spread(", "# A reason.\ndef spread("),
        ("quant/formats/lanes.py", "def spread(value: Tensor)", "def spread(\n    value: Tensor,\n)"),
        ("commands/report.py", "8192", "4096"),
        ("quant/planning/recipes.py", "def recipe_named", "NEW_RECIPES = 1\n\n\ndef recipe_named"),
        ("sources/tokenizer.py", "class Tokenizer", "NEW = 1\n\n\nclass Tokenizer"),
        ("sources/hub/connection.py", "TIMEOUT = 10.0", "TIMEOUT = 20.0"),
        ("convert/resume/journal.py", "BATCH_SECONDS = 2.0", "BATCH_SECONDS = 3.0"),
    ],
)
def test_edits_that_change_no_byte(program: Path, file: str, old: str, new: str) -> None:
    _edit(program / file, old, new)
    assert code_digest(program) == unchanged_digest()


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("quant/formats/lanes.py", "REFINEMENTS: Final = 1", "REFINEMENTS: Final = 2"),
        ("quant/rounding/feedback.py", "def quantize_weight", "NEW = 1\n\n\ndef quantize_weight"),
        ("sources/fp4.py", "def ", "NEW = 1\n\n\ndef "),
        ("runner/blocks/rotary.py", "def ", "NEW = 1\n\n\ndef "),
        ("convert/encode.py", "view(torch.uint8)", "view(torch.int8)"),
        ("convert/onnx/unpack.py", "def ", "NEW = 1\n\n\ndef "),
    ],
)
def test_edits_that_may_change_bytes(program: Path, file: str, old: str, new: str) -> None:
    _edit(program / file, old, new)
    assert code_digest(program) != unchanged_digest()


def test_a_new_file_counts(program: Path) -> None:
    (program / "quant" / "formats" / "new.py").write_text("STEP = 2\n", encoding="utf-8")
    assert code_digest(program) != unchanged_digest()


@pytest.mark.parametrize("pattern", (*fingerprint._DECIDING, *fingerprint._NEUTRAL))
def test_what_is_listed_is_there(pattern: str) -> None:
    """A file that was moved must be listed anew, or it would silently count or not count."""
    assert list(ROOT.glob(pattern))


def test_kernels_count_by_their_code(program: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = program / "quant" / "kernels"
    before = digest(kernels)
    _edit(kernels / "lanes.h", "constexpr int REFINEMENTS", "// A reason.\n\nconstexpr  int REFINEMENTS")
    assert digest(kernels) == before == digest(ROOT / "quant" / "kernels")
    _edit(kernels / "lanes.h", "REFINEMENTS = 1", "REFINEMENTS = 2")
    assert digest(kernels) != before
    known = code_digest()
    monkeypatch.setattr(fingerprint.native, "sources", lambda: str(digest(kernels)))
    assert code_digest() != known
