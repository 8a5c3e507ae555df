"""Whatever stops a conversion, the same command continues it, and the file is the one an undisturbed run makes."""

from __future__ import annotations

import errno
import json
import os
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import checkpoints
import deepseek_checkpoints
import gemma4_checkpoints
import moecast.convert.encode
import moecast.runner.passes
import pytest
import torch
from click.testing import CliRunner, Result
from conftest import Checkpoint
from conversions import convert
from gemma4_checkpoints import PER_LAYER
from hub_server import HubServer
from moecast import __version__
from moecast.archs.graph import Layer
from moecast.cli import main
from moecast.convert.calibrate import write_imatrix
from moecast.convert.conversion import Conversion
from moecast.convert.resume import fingerprint, journal
from moecast.convert.resume.journal import Journal
from moecast.convert.settings import Calibration
from moecast.errors import BadInput, Interrupted
from moecast.runner.stream import Stream
from moecast.sources.model import open_model

KILLED = Path(__file__).with_name("killed.py")
FINGERPRINT = {"source": "this", "quant": "Q4_K_M"}


@pytest.fixture(autouse=True)
def every_piece_is_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "BATCH_SECONDS", 0.0)


def _convert(folder: Path, output: Path, *options: str) -> Result:
    command = ["convert", str(folder), "-o", str(output), "--no-verify", "--no-calibration", "--no-report", *options]
    return CliRunner().invoke(main, command)


def _errors(result: Result) -> list[str]:
    return [line for line in result.stderr.splitlines() if line.startswith("Error: ")]


def _hidden(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir() if file.name.startswith("."))


LANES = {"calibration": "excerpt", "context": 64, "chunks": 3}


def _excerpt(folder: Path) -> Path:
    """A text of a few hundred tokens."""
    path = folder / "excerpt.txt"
    path.write_text(checkpoints.TEXT.read_text()[:1200])
    return path


@pytest.mark.slow
@pytest.mark.parametrize(
    ("example", "options"),
    [
        ("minimax-m2-tiny", {"padding": False, "quant": "IQ4_XS", "error_feedback": True} | LANES),
        ("nemotron-3-tiny", {"split_max_bytes": 300_000, "calibration": None, "verify": False}),
        ("a draft", {"mtp": True, "calibration": None, "verify": False}),  # it is a second file
        ("minimax-m2-tiny", {"file_format": "onnx"} | LANES),
        ("nemotron-3-tiny", {"quant": ["Q4_K_M", "Q8_0", "Q2_K"]} | LANES),  # files of one pass
        ("nemotron-3-tiny", {"size": 2_000_000} | LANES),
        ("from the Hub", {"split_max_bytes": 300_000, "calibration": None, "verify": False}),
        ("from the Hub", {"file_format": "onnx"} | LANES),
        ("layers that use keys of others", {"quant": "Q4_K_M"} | LANES),
    ],
)
def test_killed_at_random_moments(
    minimax_fp8: Checkpoint, tmp_path: Path, example: str, options: dict[str, Any]
) -> None:
    """Ten kills each, eighty together. Every finished output equals the undisturbed one, and nothing else is left."""
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    source = checkpoints.EXAMPLES / example
    if options.get("mtp"):
        source = tmp_path / "source"
        deepseek_checkpoints.save_deepseek_hub(source, deepseek_checkpoints.deepseek_model())
        deepseek_checkpoints.add_draft(source)
    if example == "layers that use keys of others":
        source = gemma4_checkpoints.save_gemma(tmp_path / "source", gemma4_checkpoints.gemma_model(**PER_LAYER))
    if options.get("calibration"):
        options = options | {
            "calibration": str(_excerpt(tmp_path)),
            "save_to": str(tmp_path / "out" / "imatrix.gguf"),
        }
    paths = os.pathsep.join(filter(None, (str(KILLED.parents[2]), os.environ.get("PYTHONPATH"))))
    environment = os.environ | {"PYTHONPATH": paths, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_TELEMETRY": "1"}
    with ExitStack() as stack:
        if example == "from the Hub":
            source = Path("tiny/moe")
            environment["HF_ENDPOINT"] = stack.enter_context(HubServer(minimax_fp8.folder)).endpoint
        arguments = [str(source), str(tmp_path / "out"), "10", str(seed), json.dumps(options)]
        call = [sys.executable, str(KILLED), *arguments]
        result = subprocess.run(call, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert report["outcomes"] >= 1 and report["wrong"] == []
    assert not any(Path(name).name.startswith(".") for name in report["expected"])


def _after(calls: int, raised: BaseException, function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, which raises from its nth call on."""
    left = iter(range(calls))

    def failing(*arguments: Any, **named: Any) -> Any:
        if next(left, None) is None:
            raise raised
        return function(*arguments, **named)

    return failing


@pytest.fixture
def expected(minimax_fp8: Checkpoint, tmp_path: Path) -> bytes:
    assert _convert(minimax_fp8.folder, tmp_path / "undisturbed.gguf").exit_code == 0
    return (tmp_path / "undisturbed.gguf").read_bytes()


def test_interrupted(minimax_fp8: Checkpoint, tmp_path: Path, expected: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C says how to go on; what is written is not computed again."""
    output = tmp_path / "out" / "model.gguf"
    quantize = moecast.convert.encode.quantize_weight
    with monkeypatch.context() as patched:
        patched.setattr(moecast.convert.encode, "quantize_weight", _after(60, KeyboardInterrupt(), quantize))
        result = _convert(minimax_fp8.folder, output)
    assert result.exit_code == 130 and "run the same command again, it continues" in result.stderr
    assert _hidden(output.parent) == [".model.gguf.journal", ".model.gguf.part"]
    calls = []
    monkeypatch.setattr(moecast.convert.encode, "quantize_weight", lambda *a: calls.append(a) or quantize(*a))
    assert _convert(minimax_fp8.folder, output).exit_code == 0
    assert output.read_bytes() == expected and _hidden(output.parent) == []
    assert len(calls) < 80  # of more than 110


def test_full_disk(minimax_fp8: Checkpoint, tmp_path: Path, expected: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """At any write: what was done is kept, and the same command finishes once there is room."""
    output = tmp_path / "out" / "model.gguf"
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    for function, calls in (("pwrite", 5), ("pwrite", 40), ("fdatasync", 31), ("pwrite", 81)):
        with monkeypatch.context() as patched:
            patched.setattr(os, function, _after(calls, full, getattr(os, function)))
            result = _convert(minimax_fp8.folder, output)
        assert result.exit_code == 2 and "cannot be written: No space left on device; free space" in result.stderr
        assert len(_errors(result)) == 1
        assert ".model.gguf.part" in _hidden(output.parent)
    assert _convert(minimax_fp8.folder, output).exit_code == 0
    assert output.read_bytes() == expected and _hidden(output.parent) == []


def test_interrupted_pass(minimax_fp8: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The lanes go on from the last whole layer: same file, same importance matrix, same parity."""
    options = LANES | {"calibration": _excerpt(tmp_path), "quant": "Q3_K_M"}

    def run(folder: Path) -> Conversion:
        return convert(minimax_fp8.folder, folder / "m.gguf", save_to=folder / "i.gguf", **options)

    undisturbed = run(tmp_path / "undisturbed")
    for pieces in (40, 35):  # ends within the first layer, then within the second
        with monkeypatch.context() as patched:
            quantize = _after(pieces, KeyboardInterrupt(), moecast.convert.encode.quantize_weight)
            patched.setattr(moecast.convert.encode, "quantize_weight", quantize)
            with pytest.raises(KeyboardInterrupt):
                run(tmp_path / "out")
    layers: list[int] = []
    advance = moecast.runner.passes.advance

    def noted(streams: list[Stream], here: list[Layer], *rest: Any) -> None:
        layers.append(here[0].index)
        advance(streams, here, *rest)

    monkeypatch.setattr(moecast.runner.passes, "advance", noted)
    continued = run(tmp_path / "out")
    assert layers == [1]
    assert continued.parity == undisturbed.parity
    for name in ("m.gguf", "i.gguf"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "undisturbed" / name).read_bytes()
    assert _hidden(tmp_path / "out") == []


def test_interrupted_calibration(minimax_fp8: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`moecast imatrix` alone goes on after the last whole layer too."""
    text, layers = Calibration(_excerpt(tmp_path), context=64), []
    files = [tmp_path / name / "i.gguf" for name in ("undisturbed", "out")]
    advance = moecast.runner.passes.advance
    undisturbed = write_imatrix(minimax_fp8.folder, files[0], text)
    with monkeypatch.context() as patched:
        patched.setattr(moecast.runner.passes, "advance", _after(1, KeyboardInterrupt(), advance))
        with pytest.raises(KeyboardInterrupt):
            write_imatrix(minimax_fp8.folder, files[1], text)
    assert _hidden(files[1].parent) == [".i.gguf.journal"]
    monkeypatch.setattr(
        moecast.runner.passes,
        "advance",
        lambda streams, here, done: layers.append(here[0].index) or advance(streams, here, done),
    )
    continued = write_imatrix(minimax_fp8.folder, files[1], text)
    assert layers == [layer.index for layer in open_model(minimax_fp8.folder).graph.layers][1:]
    assert (continued.unseen_experts, continued.fewest_tokens) == (
        undisturbed.unseen_experts,
        undisturbed.fewest_tokens,
    )
    assert files[0].read_bytes() == files[1].read_bytes() and _hidden(files[1].parent) == []


def _interrupt(folder: Path, output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quantize = moecast.convert.encode.quantize_weight
    with monkeypatch.context() as patched:
        patched.setattr(moecast.convert.encode, "quantize_weight", _after(60, KeyboardInterrupt(), quantize))
        assert _convert(folder, output).exit_code == 130


def test_another_plan_is_refused(minimax_fp8: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "out" / "model.gguf"
    _interrupt(minimax_fp8.folder, output, monkeypatch)
    result = _convert(minimax_fp8.folder, output, "--quant", "Q8_0")
    assert result.exit_code == 2 and "quant was Q4_K_M, is now Q8_0" in result.stderr
    assert "--overwrite" in result.stderr and len(_errors(result)) == 1
    assert len(_hidden(output.parent)) == 2
    assert _convert(minimax_fp8.folder, output, "--quant", "Q8_0", "--overwrite").exit_code == 0
    assert _convert(minimax_fp8.folder, tmp_path / "q8.gguf", "--quant", "Q8_0").exit_code == 0
    assert output.read_bytes() == (tmp_path / "q8.gguf").read_bytes() and _hidden(output.parent) == []


def test_another_split_leaves_nothing_of_the_first(
    minimax_fp8: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out" / "model.gguf"
    _interrupt(minimax_fp8.folder, output, monkeypatch)
    assert _convert(minimax_fp8.folder, output, "--split-max-size", "500K").exit_code == 2
    assert _convert(minimax_fp8.folder, output, "--split-max-size", "500K", "--overwrite").exit_code == 0
    assert _hidden(output.parent) == []


def test_another_version_of_the_code(
    minimax_fp8: Checkpoint, tmp_path: Path, expected: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that makes the same bytes goes on; another is refused, and the message says which one was at work."""
    output = tmp_path / "out" / "model.gguf"
    _interrupt(minimax_fp8.folder, output, monkeypatch)
    monkeypatch.setattr(journal, "__version__", "99.0")
    with monkeypatch.context() as patched:
        patched.setattr(fingerprint, "code_digest", lambda: "0123456789ab")
        result = _convert(minimax_fp8.folder, output)
    assert result.exit_code == 2 and len(_errors(result)) == 1
    assert re.search(r"the code that decides bytes was \w{12}, is now 0123456789ab", result.stderr)
    assert f"run that one again with moecast {__version__} to finish it, or use --overwrite" in result.stderr
    result = _convert(minimax_fp8.folder, output)
    assert result.exit_code == 0 and "Resuming: " in result.stderr
    assert output.read_bytes() == expected


def test_part_that_is_gone(
    minimax_fp8: Checkpoint, tmp_path: Path, expected: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it held is written again."""
    output = tmp_path / "out" / "model.gguf"
    _interrupt(minimax_fp8.folder, output, monkeypatch)
    (output.parent / ".model.gguf.part").unlink()
    result = _convert(minimax_fp8.folder, output)
    assert result.exit_code == 0 and re.search(r"(\d+) of \1 pieces are not as they were: written again", result.stderr)
    assert output.read_bytes() == expected and _hidden(output.parent) == []


@pytest.mark.parametrize("damage", [b"", b'[["x",', b"\0" * 100, b'[["x",1]]', b"[[}\n"])
def test_record_torn_at_its_end(
    minimax_fp8: Checkpoint, tmp_path: Path, expected: bytes, monkeypatch: pytest.MonkeyPatch, damage: bytes
) -> None:
    """A power cut may leave the last line in any condition."""
    output = tmp_path / "out" / "model.gguf"
    _interrupt(minimax_fp8.folder, output, monkeypatch)
    records = output.parent / ".model.gguf.journal" / "records"
    content = records.read_bytes()
    records.write_bytes(content[: -len(content.splitlines()[-1]) // 2] + damage)
    assert _convert(minimax_fp8.folder, output).exit_code == 0
    assert output.read_bytes() == expected


def test_disk_that_is_too_small(
    minimax_fp8: Checkpoint, tmp_path: Path, expected: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Refused before anything is written; what an earlier run holds already counts as free, and is kept."""
    output = tmp_path / "out" / "model.gguf"

    def free(count: int) -> Callable[[object], SimpleNamespace]:
        return lambda folder: SimpleNamespace(free=count)

    with monkeypatch.context() as patched:
        patched.setattr(shutil, "disk_usage", free(len(expected) // 2))
        result = _convert(minimax_fp8.folder, output)
        assert result.exit_code == 2
        assert re.search(rf"{output.parent} has no room: [\d.]+ MB are needed and [\d.]+ MB are free", result.stderr)
        assert _hidden(output.parent) == []
    _interrupt(minimax_fp8.folder, output, monkeypatch)
    with monkeypatch.context() as patched:
        patched.setattr(shutil, "disk_usage", free(0))
        result = _convert(minimax_fp8.folder, output)
    assert result.exit_code == 0, result.stderr
    assert "Resuming: " in result.stderr and output.read_bytes() == expected


def test_quantize_continues(minimax: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """GGUF to GGUF has a journal as well."""
    source, whole, output = tmp_path / "bf16.gguf", tmp_path / "whole.gguf", tmp_path / "q.gguf"
    assert _convert(minimax.folder, source, "--quant", "BF16").exit_code == 0
    arguments = ["quantize", str(source), "--quant", "Q5_K_M"]
    assert CliRunner().invoke(main, [*arguments, str(whole)]).exit_code == 0
    with monkeypatch.context() as patched:
        failing = _after(40, KeyboardInterrupt(), moecast.convert.encode.quantize_weight)
        patched.setattr(moecast.convert.encode, "quantize_weight", failing)
        assert CliRunner().invoke(main, [*arguments, str(output)]).exit_code == 130
    result = CliRunner().invoke(main, [*arguments[:-1], "Q4_K_M", str(output)])
    assert result.exit_code == 2 and "quant was Q5_K_M, is now Q4_K_M" in result.stderr
    result = CliRunner().invoke(main, [*arguments, str(output)])
    assert result.exit_code == 0 and "Resuming: " in result.stderr and "s in all runs" in result.stdout
    assert output.read_bytes() == whole.read_bytes()


def test_data_are_durable_before_their_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the last write of data and the line that vouches for it, the data's file is synchronized."""
    done: list[tuple[str, int]] = []
    for name in ("pwrite", "fdatasync"):
        call = getattr(os, name)
        monkeypatch.setattr(os, name, lambda file, *rest, n=name, c=call: (done.append((n, file)), c(file, *rest))[1])
    data = os.open(tmp_path / "data", os.O_RDWR | os.O_CREAT)
    with Journal(tmp_path / "out", FINGERPRINT) as record:
        done.clear()
        monkeypatch.setattr(journal, "BATCH_SECONDS", 1e9)
        for number in range(3):
            os.pwrite(data, b"x", number)
            record.add(("piece", number), 1, data)
        assert done == [("pwrite", data)] * 3
        record.commit()
        (synchronized, first), (appended, second), (sealed, third) = done[3:]
        assert (synchronized, first) == ("fdatasync", data)
        assert (appended, sealed) == ("pwrite", "fdatasync") and second == third != data
    os.close(data)


def test_two_writers_of_one_output(tmp_path: Path) -> None:
    with Journal(tmp_path / "out", FINGERPRINT):
        for overwrite in (False, True):
            with pytest.raises(BadInput, match="out is being written by another process"):
                Journal(tmp_path / "out", FINGERPRINT, overwrite)
    assert list(tmp_path.iterdir()) == []


def test_saved_tensors(tmp_path: Path) -> None:
    """States survive an interruption; one that was dropped, or whose file is gone, counts as never saved."""
    states = [torch.randn(3, 5), torch.arange(4), torch.zeros(0, dtype=torch.float64)]
    with pytest.raises(Interrupted), Journal(tmp_path / "out", FINGERPRINT) as record:
        record.save("layer-1", states)
        record.save("layer-2", iter(states))
        record.drop("layer-1")
        raise Interrupted("the connection is lost")
    with Journal(tmp_path / "out", FINGERPRINT) as record:
        assert record.continues and not record.holds("layer-1") and not record.holds("layer-3")
        assert record.holds("layer-2")
        for loaded, saved in zip(record.load("layer-2"), states, strict=True):
            assert loaded.dtype == saved.dtype and torch.equal(loaded, saved)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.whole
def test_states_that_find_no_room(tmp_path: Path) -> None:
    """The system itself refuses: no file may grow beyond a page."""
    pytest.importorskip("resource")
    code = (
        "import resource, signal, sys, torch\n"
        "from pathlib import Path\n"
        "from moecast.convert.resume.journal import Journal\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "with Journal(Path(sys.argv[1]), {'source': 'this'}) as record:\n"
        "    record.add(('piece',))\n"
        "    record.save('states', [torch.zeros(10_000)])\n"
    )
    result = subprocess.run([sys.executable, "-c", code, str(tmp_path / "out")], capture_output=True, text=True)
    assert "Interrupted" in result.stderr.splitlines()[-1] and "cannot be written: File too large" in result.stderr
    with Journal(tmp_path / "out", {"source": "this"}) as record:
        assert ("piece",) in record and not record.holds("states")
