"""Many candidates in one pass: the numbers of each alone, one reading of the reference, and who beats whom."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import checkpoints
import pytest
from conftest import Checkpoint
from conversions import convert
from moecast.archs.expressions import TensorInfo
from moecast.errors import BadInput
from moecast.runner import compare, parity
from moecast.runner.measure import candidates
from moecast.runner.measure.evaluate import Parity
from moecast.runner.settings import Compute, Evaluation
from moecast.sources.storage import Storage

EVALUATION = Evaluation(checkpoints.TEXT, 64, 3)
QUANTS = ("Q8_0", "Q2_K", "Q4_K_M")
MEASURED = """
import sys
from moecast.cli import main
from moecast.files import peak_rss_bytes
try:
    main()
finally:
    print(peak_rss_bytes(), file=sys.stderr)
"""


@pytest.fixture(scope="module")
def made(minimax: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Results of conversions by recipe, one of them for ONNX Runtime."""
    folder = tmp_path_factory.mktemp("made")
    options: dict[str, Any] = {"calibration": None, "verify": False}
    results = {quant: convert(minimax.folder, folder / f"{quant}.gguf", quant, **options) for quant in QUANTS}
    pytest.importorskip("onnxruntime")
    return results | {"onnx": convert(minimax.folder, folder / "onnx", file_format="onnx", **options)}


def _numbers(parity: Parity) -> dict[str, Any]:
    """All that was measured, flat."""
    values = asdict(parity)
    slices = values.pop("slices")
    flat = {f"{key} {part['name']} {what}": part[what] for key in slices for part in slices[key] for what in part}
    return {name: value for name, value in (values | flat).items() if isinstance(value, int | float)} | {
        f"layer {index}": error for index, error in enumerate(values["layer_errors"])
    }


@pytest.mark.parametrize("onnx_reference", [False, True], ids=["checkpoint", "ONNX reference"])
def test_each_has_the_numbers_it_has_alone(minimax: Checkpoint, made: dict[str, Any], onnx_reference: bool) -> None:
    files = [result.files[0] for result in made.values()]
    reference = files[-1].parent if onnx_reference else minimax.folder
    found = compare(reference, files, EVALUATION)
    assert [candidate.bytes for candidate in found] == sorted(candidate.bytes for candidate in found)
    assert {candidate.path for candidate in found} == {*files[:-1], files[-1].parent}
    for candidate in found:
        alone = parity(reference, candidate.path, EVALUATION)
        assert _numbers(candidate.parity) == pytest.approx(_numbers(alone), rel=1e-4, abs=1e-6)
        assert candidate.parity.tokenization == alone.tokenization


def test_size_is_what_conversion_says(minimax: Checkpoint, made: dict[str, Any]) -> None:
    found = {
        candidate.path: candidate
        for candidate in compare(minimax.folder, [made[q].files[0] for q in QUANTS], EVALUATION)
    }
    for quant in QUANTS:
        candidate = found[made[quant].files[0]]
        assert candidate.bytes == made[quant].bytes
        assert candidate.bits_per_weight == pytest.approx(made[quant].bits_per_weight, rel=1e-6)


def test_reference_is_read_once_for_all(
    minimax: Checkpoint, made: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []
    original = Storage.read

    def counted(storage: Storage, tensor: TensorInfo, start: int = 0, stop: int | None = None) -> Any:
        data = original(storage, tensor, start, stop)
        if Path(tensor.file).parent == minimax.folder:
            read.append(data.numel() * data.element_size())
        return data

    monkeypatch.setattr(Storage, "read", counted)
    sizes = []
    for quants in (QUANTS[:1], QUANTS):
        read.clear()
        compare(minimax.folder, [made[quant].files[0] for quant in quants], EVALUATION)
        sizes.append(sum(read))
    assert sizes[0] == sizes[1] > 100_000


def test_what_memory_is_needed_is_said(minimax: Checkpoint, made: dict[str, Any]) -> None:
    """More for more candidates; with that much, the numbers are the same."""
    needed = []
    for count in (1, 3):
        files = [made[quant].files[0] for quant in QUANTS[:count]]
        with pytest.raises(BadInput, match=r"takes is .* or compare fewer models at once") as refusal:
            compare(minimax.folder, files, EVALUATION, Compute(memory=1 << 20))
        needed.append(float(str(refusal.value).split("takes is ")[1].split(" GB")[0]))
    assert needed[0] <= needed[1]
    enough = Compute(memory=int(needed[1] * 1e9) + (200 << 20))
    bounded, free = (compare(minimax.folder, files, EVALUATION, compute) for compute in (enough, Compute()))
    assert [of.parity.mean_kld for of in bounded] == [of.parity.mean_kld for of in free]


@pytest.mark.parametrize(
    ("files", "dominated"),
    [
        ([(10, 0.3), (20, 0.2), (30, 0.1)], []),
        ([(10, 0.1), (20, 0.2), (30, 0.1)], [20, 30]),
        ([(10, 0.2), (10, 0.2), (10, 0.3)], [10]),  # equals do not beat each other
        ([(10, float("nan")), (20, 0.2), (30, float("nan"))], [30]),
    ],
)
def test_what_another_file_beats_is_marked(
    files: list[tuple[int, float]], dominated: list[int], minimax: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    same = parity(minimax.folder, minimax.folder, EVALUATION)
    sizes = iter(files)
    monkeypatch.setattr(candidates, "parities", lambda *_: [replace(same, mean_kld=kld) for _, kld in files])
    monkeypatch.setattr(candidates, "_bytes_of", lambda _: next(sizes)[0])
    found = compare(minimax.folder, [minimax.folder] * len(files), EVALUATION)
    assert [candidate.bytes for candidate in found if candidate.dominated] == dominated


@pytest.mark.slow
def test_many_stay_within_memory(tmp_path: Path) -> None:
    """Streams that do not fit beside each other go to disk, and the numbers are the same."""
    example = checkpoints.EXAMPLES / "minimax-m2-tiny"
    options: dict[str, Any] = {"calibration": None, "verify": False}
    files = [convert(example, tmp_path / f"{quant}.gguf", quant, **options).files[0] for quant in QUANTS]
    command = [sys.executable, "-c", MEASURED, "parity", *map(str, (example, *files)), "--chunks", "40", "--json"]
    refused = subprocess.run([*command, "--memory", "100MB"], capture_output=True, text=True)
    found = re.search(r"the least that this model takes is ([\d.]+) GB", refused.stderr)
    assert refused.returncode == 2 and found
    memory = int(float(found[1]) * 1e9) + 30_000_000
    bounded, free = (
        subprocess.run([*command, *limit], capture_output=True, text=True, check=True)
        for limit in (["--memory", str(memory)], [])
    )
    assert int(bounded.stderr.split()[-1]) < memory < int(free.stderr.split()[-1])
    assert bounded.stdout == free.stdout
