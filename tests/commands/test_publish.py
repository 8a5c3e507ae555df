"""`moecast publish`: what it writes, what it refuses, and what arrives at the Hub."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

import checkpoints
import pytest
import yaml
from click.testing import CliRunner, Result
from hub_server import Fault, HubServer
from hub_uploads import COMMIT
from huggingface_hub import constants
from huggingface_hub.utils import _http
from moecast.cli import main
from moecast.quant.planning.plan_file import read_plan_file
from moecast.sources.gguf import read_gguf
from published import parity, write_folder, write_report

if TYPE_CHECKING:
    from conftest import Checkpoint

TOKEN = "hf_SentinelTokenThatNobodyMaySee"
REPOSITORY = "somebody/tiny-GGUF"


@pytest.fixture(autouse=True)
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    """One on which the repository does not exist yet."""
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(_http, "time", SimpleNamespace(sleep=lambda seconds: None))
    with HubServer(None, REPOSITORY, token=TOKEN) as server:
        for name, value in {
            "ENDPOINT": server.endpoint,
            "HF_HUB_CACHE": str(tmp_path / "cache"),
            "HF_TOKEN_PATH": str(tmp_path / "token"),
            "HF_HUB_DISABLE_XET": True,
            "HF_HUB_DISABLE_TELEMETRY": True,
        }.items():
            monkeypatch.setattr(constants, name, value)
        yield server


@pytest.fixture
def folder(minimax: Checkpoint, tmp_path: Path) -> Path:
    write_folder(minimax.folder, tmp_path / "out", "Q8_0")
    return tmp_path / "out"


def run(*arguments: object) -> Result:
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert TOKEN not in result.output
    return result


def published(hub: HubServer) -> dict[str, bytes]:
    found = hub.tree("main")
    assert found
    return {name: file.path.read_bytes() for name, file in found[1].items() if name != ".gitattributes"}


def test_a_dry_run_writes_what_would_be_published(hub: HubServer, folder: Path, tmp_path: Path) -> None:
    result = run("publish", folder, REPOSITORY, "--dry-run", "-o", tmp_path / "card", "--json")
    assert result.exit_code == 0, result.output
    said = json.loads(result.stdout)
    assert (said["repository"], said["commit"]) == (REPOSITORY, None)
    names = {"README.md", "report.html", "report.json", "plan.json"}
    assert {path.name for path in (tmp_path / "card").iterdir()} == names
    assert {file["name"] for file in said["files"]} == {*names, "tiny-Q8_0.gguf"}
    plan, (_, tensors) = read_plan_file(tmp_path / "card" / "plan.json"), read_gguf(folder / "tiny-Q8_0.gguf")
    assert plan.tensors == {tensor.name: (tensor.dtype, tensor.shape) for tensor in tensors}
    assert not hub.log


def test_everything_arrives_and_nothing_is_sent_twice(hub: HubServer, folder: Path) -> None:
    arguments = ("publish", folder, REPOSITORY, "--private", "--token", TOKEN, "--json")
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    said, there = json.loads(result.stdout), published(hub)
    assert {*said} == {"repository", "url", "commit", "files"} and hub.private
    assert (said["url"], said["commit"]) == (f"{hub.endpoint}/{REPOSITORY}", hub.commit)
    assert {file["name"]: (file["bytes"], file["sha256"], file["uploaded"]) for file in said["files"]} == {
        name: (len(content), hashlib.sha256(content).hexdigest(), True) for name, content in there.items()
    }
    assert there["tiny-Q8_0.gguf"] == (folder / "tiny-Q8_0.gguf").read_bytes()
    again = json.loads(run(*arguments).stdout)
    assert again["commit"] == said["commit"] and not any(file["uploaded"] for file in again["files"])


def test_faults_end_in_a_line_each_unless_a_reason_is_given(hub: HubServer, folder: Path, tmp_path: Path) -> None:
    unseen = [{"layer": 0, "tokens": [0], "fewest": 0, "unseen": [0]}]
    write_report(folder / "tiny-Q8_0.gguf", parity=None, experts=unseen)
    for despite in ((), ("--despite", " ")):
        result = run("publish", folder, REPOSITORY, *despite)
        assert result.exit_code == 2
        first, second, last = result.stderr.splitlines()
        assert first.startswith("Error: tiny-Q8_0: not measured") and "never saw 1 experts" in second
        assert "--despite REASON" in last
    assert not hub.log
    result = run("publish", folder, REPOSITORY, "--despite", "a *test*", "--dry-run", "-o", tmp_path / "card")
    assert result.exit_code == 0, result.output
    text = (tmp_path / "card" / "README.md").read_text(encoding="utf-8")
    assert "never saw 1 experts" in text and r"a \*test\*" in text


def test_the_model_is_named_that_was_converted(folder: Path, tmp_path: Path) -> None:
    arguments = ("publish", folder, REPOSITORY, "--dry-run", "-o", tmp_path / "card")
    assert "--base-model OWNER/NAME" in run(*arguments).stderr
    result = run(*arguments, "--base-model", "https://huggingface.co/owner/tiny")
    assert result.exit_code == 0 and "--base-model" not in result.stderr
    assert "\nbase_model: owner/tiny\n" in (tmp_path / "card" / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("none", REPOSITORY), "none: no such folder, expected one with the GGUF files"),
        ((".", REPOSITORY), "holds no GGUF file of a model"),
        ((".", "somebody"), "somebody"),
        ((".", f"{REPOSITORY}/file.gguf"), "names a file, expected the repository to publish to"),
        ((".", REPOSITORY, "--base-model", "tiny"), "'tiny' is neither"),
        (
            (".", REPOSITORY, "--base-model", "owner/tiny/a.gguf"),
            "expected the repository of --base-model",
        ),
    ],
)
def test_bad_input(arguments: tuple[str, ...], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = run("publish", *arguments)
    assert result.exit_code == 2 and message in result.stderr and len(result.stderr.splitlines()) == 1


def test_a_fault_of_the_hub_is_one_line(hub: HubServer, folder: Path) -> None:
    hub.fail(COMMIT, Fault(status=502), times=20)
    result = run("publish", folder, REPOSITORY, "--token", TOKEN)
    assert result.exit_code == 2
    assert result.stderr.splitlines()[-1].endswith("run the same again, what has arrived is not sent again")
    hub.forgive()
    assert run("publish", folder, REPOSITORY, "--token", TOKEN).exit_code == 0
    assert "tiny-Q8_0.gguf" in published(hub)


@pytest.mark.whole
def test_from_a_repository_to_another(
    hub: HubServer, minimax: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Convert what a Hub serves and publish it: the card has its figures, and the license of the source."""
    source = tmp_path / "source"
    source.mkdir()
    for path in minimax.folder.iterdir():
        (source / path.name).write_bytes(path.read_bytes())
    card = "---\nlicense: apache-2.0\nlanguage: [en]\npipeline_tag: text-generation\n---\n"
    (source / "README.md").write_text(card, encoding="utf-8")
    options = ("--quant", "Q8_0", "--no-calibration", "-f", checkpoints.TEXT, "-c", 64, "--chunks", 2, "--json")
    with HubServer(source) as server, monkeypatch.context() as patched:
        patched.setattr(constants, "ENDPOINT", server.endpoint)
        converted = run("convert", server.repository, "-o", tmp_path / "out", *options)
        assert converted.exit_code == 0, converted.output
    result = run("publish", tmp_path / "out", REPOSITORY, "--token", TOKEN)
    assert result.exit_code == 0, result.output
    text = published(hub)["README.md"].decode()
    metadata = yaml.safe_load(text.split("---\n")[1])
    assert (metadata["base_model"], metadata["base_model_relation"]) == ("tiny/moe", "quantized")
    assert (metadata["license"], metadata["language"]) == ("apache-2.0", ["en"])
    assert metadata["pipeline_tag"] == "text-generation" and metadata["quantized_by"] == "somebody"
    found = json.loads(converted.stdout)["parity"]
    assert f"{found['mean_kld']:.5f} ± {found['mean_kld_error']:.5f}" in text and server.commit in text
    assert "moecast convert tiny/moe" in text and parity()["kld_999"] != found["kld_999"]
