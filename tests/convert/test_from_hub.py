"""The commands on a Hub repository: fetched through the real client, converted, compared; faults end in one line."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import checkpoints
import gguf
import pytest
from click.testing import CliRunner
from conftest import Checkpoint
from conversions import convert
from hub_server import Fault, HubServer
from huggingface_hub import constants
from moecast.cli import main
from moecast.convert import NO_CALIBRATION, Output
from moecast.convert import convert as convert_checkpoint
from moecast.sources.hub import transfer

TOKEN = "hf_SentinelTokenThatNobodyMaySee"


def _moecast(server: HubServer, home: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return _python(server, home, "-m", "moecast.cli", *arguments, **variables)


def _python(server: HubServer, home: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    environment |= {"HF_ENDPOINT": server.endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1", **variables}
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment)


@pytest.mark.slow
def test_convert_by_hub_id(minimax_fp8: Checkpoint, tmp_path: Path) -> None:
    """One shard's connection breaks on the way; the file says which commit it came from; the cache serves the rest."""
    options = ["--quant", "Q8_0", "-f", str(checkpoints.TEXT), "-c", "64", "--chunks", "2", "--json"]
    with HubServer(minimax_fp8.folder) as server:
        server.fail("model-00001-of-00007.safetensors", Fault(drop_after=100_000))
        arguments = ["convert", "tiny/moe", "--revision", "main", "-o", str(tmp_path / "out"), *options]
        result = _moecast(server, tmp_path / "home", *arguments, "--keep-source")
        assert result.returncode == 0, result.stderr
        assert len(server.bodies("model-00001-of-00007.safetensors")) == 2
        (file,) = json.loads(result.stdout)["files"]
        assert Path(file).name == "moe-Q8_0.gguf"
        fields = gguf.GGUFReader(file).fields
        assert fields["moecast.source.repository"].contents() == "tiny/moe"
        assert fields["moecast.source.revision"].contents() == server.commit
        requests = len(server.log)
        address = f"{server.endpoint}/tiny/moe/tree/main"
        parity = ["parity", address, file, *options[2:]]
        again = _moecast(server, tmp_path / "home", *parity)
        assert again.returncode == 0, again.stderr
        assert json.loads(again.stdout)["mean_kld"] == json.loads(result.stdout)["parity"]["mean_kld"]
        assert not any(request.path.endswith(".safetensors") for request in server.log[requests:])


@pytest.mark.whole
@pytest.mark.parametrize("command", ["inspect", "plan"])
def test_headers_are_enough(minimax_fp8: Checkpoint, tmp_path: Path, command: str) -> None:
    """Looking at a model fetches kilobytes of each shard, and tells what the whole checkpoint would."""
    with HubServer(minimax_fp8.folder) as server:
        result = _moecast(server, tmp_path / "home", command, "tiny/moe", "--json")
        assert result.returncode == 0, result.stderr
        sent = sum(request.sent for request in server.log)
        assert sent < sum(file.stat().st_size for file in minimax_fp8.folder.iterdir()) / 5
    local = CliRunner().invoke(main, [command, str(minimax_fp8.folder), "--json"])
    expected, found = json.loads(local.stdout), json.loads(result.stdout)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert sorted(found[key], key=str) == sorted(value, key=str) if key == "tensors" else found[key] == value


@pytest.mark.whole
def test_download(minimax_fp8: Checkpoint, tmp_path: Path) -> None:
    with HubServer(minimax_fp8.folder) as server:
        listed = _moecast(server, tmp_path / "home", "download", "hf://tiny/moe", "--dry-run", "--json")
        listing = json.loads(listed.stdout)
        assert listing["commit"] == server.commit and listing["bytes"] > 1_000_000
        assert not server.bodies("model-00000-of-00007.safetensors")
        target = tmp_path / "copy"
        result = _moecast(server, tmp_path / "home", "download", "tiny/moe", "-o", str(target), "--json")
        assert json.loads(result.stdout) == {"folder": str(target)}
        for file in listing["files"]:
            assert (target / file["name"]).read_bytes() == (minimax_fp8.folder / file["name"]).read_bytes()


@pytest.mark.whole
@pytest.mark.parametrize("command", ["convert", "inspect", "download"])
def test_gated_repository_says_what_to_do(minimax_fp8: Checkpoint, tmp_path: Path, command: str) -> None:
    with HubServer(minimax_fp8.folder, gated=True, token="hf_TheRightOne") as server:
        result = _moecast(server, tmp_path / "home", command, "tiny/moe", HF_TOKEN=TOKEN, HF_DEBUG="1")
        assert result.returncode == 2
        errors = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
        assert len(errors) == 1 and "HF_TOKEN" in errors[0]
        assert TOKEN not in result.stdout + result.stderr


@pytest.mark.whole
def test_token_option_is_used_and_never_shown(minimax_fp8: Checkpoint, tmp_path: Path) -> None:
    with HubServer(minimax_fp8.folder, private=True, token=TOKEN) as server:
        arguments = ["download", "tiny/moe", "--token", TOKEN]
        result = _moecast(server, tmp_path / "home", *arguments, HF_DEBUG="1")
        assert result.returncode == 0, result.stderr
        assert TOKEN not in result.stdout + result.stderr
        wrong = _moecast(server, tmp_path / "empty", "download", "tiny/moe")
        assert wrong.returncode == 2 and "does not exist, or is private" in wrong.stderr


@pytest.mark.whole
def test_wrong_bytes_are_refused(minimax_fp8: Checkpoint, tmp_path: Path) -> None:
    shard = "model-00000-of-00007.safetensors"
    with HubServer(minimax_fp8.folder) as server:
        size = (minimax_fp8.folder / shard).stat().st_size
        server.fail(shard, Fault(content=b"\0" * size), times=10)
        result = _moecast(server, tmp_path / "home", "convert", "tiny/moe", "-o", str(tmp_path / "out"))
        assert result.returncode == 2 and f"{shard} of {server.endpoint}/tiny/moe arrived damaged" in result.stderr
        assert not any((tmp_path / "out").rglob("*"))


def _stream(server: HubServer, tmp_path: Path, *options: str) -> subprocess.CompletedProcess[str]:
    output = str(tmp_path / "out" / "model.gguf")
    plain = ["--quant", "Q8_0", "-f", str(checkpoints.TEXT), "-c", "64", "--chunks", "2"]
    return _moecast(server, tmp_path / "home", "convert", "tiny/moe", "-o", output, *plain, "--no-report", *options)


@pytest.mark.whole
def test_streamed_conversion(minimax_fp8: Checkpoint, tmp_path: Path) -> None:
    """Every shard comes once and goes, however many files are made; these are those of conversions from a folder."""
    with HubServer(minimax_fp8.folder) as server:
        result = _stream(server, tmp_path, "--quant", "Q8_0,BF16", "-o", str(tmp_path / "out"))
        assert result.returncode == 0, result.stderr
        assert re.search(
            r"Starting: [\d.]+ MB to fetch, at most [\d.]+ MB of it on disk, [\d.]+ MB to write", result.stderr
        )
        shards = [file.name for file in minimax_fp8.folder.glob("*.safetensors")]
        assert [sum(request.range is None for request in server.bodies(shard)) for shard in shards] == [1, 1, 1]
        provenance = {"repository": "tiny/moe", "revision": server.commit}
    assert not list((tmp_path / "home").rglob("*.safetensors"))
    files = sorted((tmp_path / "out").glob("*.gguf"))
    assert [file.name for file in files] == ["moe-BF16.gguf", "moe-Q8_0.gguf"]
    for file, recipe in zip(files, ("BF16", "Q8_0"), strict=True):
        local = tmp_path / f"{recipe}.gguf"
        convert(minimax_fp8.folder, local, recipe, name="moe", verify=False, provenance=provenance)
        assert file.read_bytes() == local.read_bytes()


@pytest.mark.slow
def test_python_takes_what_the_command_takes(minimax_fp8: Checkpoint, tmp_path: Path) -> None:
    """A Hub id and a budget, and shards that come when they are read: the same file."""
    code = (
        "import sys; from moecast.convert import NO_CALIBRATION, Goal, convert\n"
        "goal = Goal(bits_per_weight=4, measure=False)\n"
        "convert('tiny/moe', sys.argv[1], goal, calibration=NO_CALIBRATION, evaluation=None)"
    )
    with HubServer(minimax_fp8.folder) as server:
        goal = ["--bpw", "4", "--no-measure", "--no-calibration", "--no-verify"]
        command = _moecast(server, tmp_path / "home", "convert", "tiny/moe", "-o", str(tmp_path / "a.gguf"), *goal)
        assert command.returncode == 0, command.stderr
        python = _python(server, tmp_path / "home", "-c", code, str(tmp_path / "b.gguf"))
        assert python.returncode == 0, python.stderr
    assert not list((tmp_path / "home").rglob("*.safetensors"))
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()


@pytest.mark.slow
def test_streamed_onnx(minimax_fp8: Checkpoint, tmp_path: Path) -> None:
    with HubServer(minimax_fp8.folder) as server:
        options = ["--to", "onnx", "--no-calibration", "--no-verify"]
        result = _moecast(server, tmp_path / "home", "convert", "tiny/moe", "-o", str(tmp_path / "out"), *options)
        assert result.returncode == 0, result.stderr
    folder, options = tmp_path / "out" / "moe-Q4_0-onnx", Output(tmp_path, "local", file_format="onnx")
    convert_checkpoint(minimax_fp8.folder, options, calibration=NO_CALIBRATION, evaluation=None)
    for file in (tmp_path / "local-Q4_0-onnx").iterdir():
        assert (folder / file.name).read_bytes() == file.read_bytes()


@pytest.mark.slow
def test_push_between_two_attempts(minimax_fp8: Checkpoint, minimax_odd: Checkpoint, tmp_path: Path) -> None:
    """What was begun from one commit is not finished from another, unless it is told which one it was."""
    shard = "model-00002-of-00007.safetensors"
    with HubServer(minimax_fp8.folder) as server:
        before = server.commit
        server.fail(shard, Fault(), times=1)  # the header is read, then
        server.fail(shard, Fault(status=403), times=9)
        stopped = _stream(server, tmp_path)
        assert stopped.returncode == 2 and "does not accept the access token" in stopped.stderr
        assert (tmp_path / "out" / ".model.gguf.part").is_file()
        server.forgive()
        server.push(minimax_odd.folder)
        refused = _stream(server, tmp_path)
        assert refused.returncode == 2
        assert f"source was tiny/moe at {before}, is now tiny/moe at {server.commit}" in refused.stderr
        fetched = len(server.bodies("model-00000-of-00007.safetensors"))
        continued = _stream(server, tmp_path, "--revision", before)
        assert continued.returncode == 0, continued.stderr
        assert len(server.bodies("model-00000-of-00007.safetensors")) == fetched + 1  # its header: all of it is used
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["model.fingerprints.json", "model.gguf"]


def test_scratch_and_keep_source_exclude_each_other(tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["convert", "tiny/moe", "--scratch", "20GB", "--keep-source"])
    assert result.exit_code == 2 and "leave one of them out" in result.stderr


@pytest.mark.parametrize(
    "options",
    [["--no-verify", "--no-calibration"], ["-f", str(checkpoints.TEXT), "-c", "64", "--chunks", "2"]],
    ids=["alone", "compared"],
)
@pytest.mark.parametrize("fault", [Fault(status=503), Fault(content=b"\0" * 300_000)], ids=["lost", "damaged"])
def test_what_the_network_stops_is_continued(
    minimax_fp8: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: Fault, options: list[str]
) -> None:
    """Whoever asks for the shard, a stream or the encoder: what was made is kept, and nothing is called damaged."""
    shard = "model-00002-of-00007.safetensors"
    monkeypatch.setattr(transfer, "ATTEMPTS", 0)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    output = tmp_path / "out" / "model.gguf"
    with HubServer(minimax_fp8.folder) as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.endpoint)
        server.fail(shard, Fault())  # the header, then
        server.fail(shard, fault, times=99)
        call = ["convert", "tiny/moe", "-o", str(output), "--quant", "Q8_0", "--no-report", *options]
        stopped = CliRunner().invoke(main, call)
        assert stopped.exit_code == 2, stopped.output
        assert "checkpoint is damaged" not in stopped.output
        assert (output.parent / ".model.gguf.part").is_file() and not output.exists(), stopped.output
        assert len((output.parent / ".model.gguf.journal" / "records").read_bytes().splitlines()) > 2
        server.forgive()
        continued = CliRunner().invoke(main, call)
        assert continued.exit_code == 0, continued.output
        provenance = {"repository": "tiny/moe", "revision": server.commit}
    local = tmp_path / "local.gguf"
    convert(minimax_fp8.folder, local, "Q8_0", name="moe", verify=False, provenance=provenance)
    assert output.read_bytes() == local.read_bytes()
    assert sorted(file.name for file in output.parent.iterdir()) == ["model.fingerprints.json", "model.gguf"]


@pytest.mark.parametrize("command", ["download", "inspect", "convert"])
def test_an_interrupt_ends_a_stalled_transfer_at_once(minimax_fp8: Checkpoint, tmp_path: Path, command: str) -> None:
    """Nothing comes any more and no timeout is near; the keyboard ends it all the same."""
    shard = "model-00001-of-00007.safetensors"
    stalled = threading.Event()
    with HubServer(minimax_fp8.folder) as server:
        server.fail(shard, Fault(before=stalled.set, stall_after=100), times=9)
        environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
        environment |= {"HF_ENDPOINT": server.endpoint, "HF_HOME": str(tmp_path), "HF_HUB_DISABLE_TELEMETRY": "1"}
        call = [sys.executable, "-c", UNHURRIED, command, "tiny/moe"]
        with subprocess.Popen(call, env=environment, cwd=tmp_path, stderr=subprocess.PIPE, text=True) as process:
            assert stalled.wait(100)
            time.sleep(0.5)  # until it waits
            process.send_signal(signal.SIGINT)
            _, errors = process.communicate(timeout=60)
        assert process.returncode == 130, errors
        assert "Interrupted: run the same command again" in errors


# Python sets no handler of its own where whoever started the tests ignores the signal.
UNHURRIED = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)
from moecast.sources.hub import connection
connection.TIMEOUT = 1000.0
from moecast.cli import main
main()
"""
