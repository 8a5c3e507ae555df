"""Importance matrices of several texts in one, and what a file says of itself."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
from click.testing import CliRunner, Result
from conftest import Checkpoint
from moecast.cli import main
from moecast.convert.calibrate import write_imatrix
from moecast.convert.conversion import InputFile
from moecast.convert.gguf.imatrix import merge_imatrices
from moecast.convert.settings import Calibration
from moecast.errors import BadInput, OutputExists
from moecast.runner.texts import CALIBRATION_TEXT, EVALUATION_TEXT

DATA = Path(__file__).parents[2] / "data" / "imatrix"
TEXTS = (CALIBRATION_TEXT, EVALUATION_TEXT)
PROVENANCE = {"repository": "owner/name", "revision": "a" * 40}


def _run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [*map(str, arguments)])


def _tensors(path: Path) -> dict[str, np.ndarray]:
    return {tensor.name: np.array(tensor.data) for tensor in gguf.GGUFReader(path).tensors}


@pytest.fixture
def parts(minimax: Checkpoint, tmp_path: Path) -> list[Path]:
    """Of one model on two texts."""
    paths = [tmp_path / f"{text.stem}.gguf" for text in TEXTS]
    for path, text in zip(paths, TEXTS, strict=True):
        write_imatrix(minimax.folder, path, Calibration(text, 32, 3), provenance=PROVENANCE)
    return paths


def test_merged_sums_are_those_of_both(parts: list[Path], tmp_path: Path) -> None:
    merged = tmp_path / "merged.gguf"
    merge_imatrices(parts, merged)
    first, second, both = map(_tensors, (*parts, merged))
    assert first.keys() == second.keys() == both.keys()
    for name, found in both.items():
        np.testing.assert_allclose(found, first[name] + second[name], rtol=1e-6)
    fields = gguf.GGUFReader(merged).fields
    assert fields["imatrix.datasets"].contents() == [text.name for text in TEXTS]
    assert fields["imatrix.chunk_count"].contents() == 6 and fields["imatrix.chunk_size"].contents() == 32
    with pytest.raises(OutputExists):
        merge_imatrices(parts, merged)


def test_a_file_says_what_it_is_of(parts: list[Path], tmp_path: Path) -> None:
    merged = tmp_path / "merged.gguf"
    assert _run("imatrix", "--merge", *parts, "-o", merged).exit_code == 0
    shown = json.loads(_run("inspect", merged, "--json").stdout)
    assert shown["sha256"] == [InputFile.of(text).sha256 for text in TEXTS]
    assert shown["source"]["moecast.source.repository"] == "owner/name"
    assert (shown["tokens"], shown["chunks"], shown["datasets"]) == (192, 6, [text.name for text in TEXTS])
    counts = [data for name, data in _tensors(merged).items() if name.endswith("gate_exps.weight.counts")]
    assert shown["experts"] == sum(data.size for data in counts)
    assert shown["unseen_experts"] == sum(int((data == 0).sum()) for data in counts)
    assert shown["fewest_tokens"] == min(data.min() for data in counts)
    table = _run("inspect", merged).stdout
    assert "owner/name" in table and TEXTS[0].name in table


def test_llama_cpps_own_files_are_shown_too() -> None:
    shown = json.loads(_run("inspect", DATA / "im.gguf", "--json").stdout)
    assert shown["datasets"] == ["t.txt"] and shown["sha256"] == [] and shown["experts"] == 32


def test_what_does_not_belong_together_is_refused(parts: list[Path], minimax: Checkpoint, tmp_path: Path) -> None:
    output, other, longer = (tmp_path / name for name in ("merged.gguf", "other.gguf", "longer.gguf"))
    write_imatrix(minimax.folder, other, Calibration(TEXTS[0], 32, 1), provenance={"repository": "owner/other"})
    write_imatrix(minimax.folder, longer, Calibration(TEXTS[0], 48, 1), provenance=PROVENANCE)
    for files, message in (
        ([parts[0], other], "merge those of one model"),
        ([parts[0], longer], "chunks of 48 tokens"),
        ([DATA / "im.dat", parts[0]], "older form"),
    ):
        with pytest.raises(BadInput, match=message):
            merge_imatrices(files, output)
    assert not output.exists()
    refused = _run("imatrix", *parts, "-o", output)
    assert refused.exit_code == 2 and "--merge" in refused.output
