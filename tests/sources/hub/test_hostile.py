"""Mirrors and proxies that lie or stall: nothing outside the folders changes, all that comes is bounded, waits end."""

from __future__ import annotations

import gzip
import json
import threading
import time
from pathlib import Path

import pytest
from hub_checkpoint import INDEX, NEEDED, SENTINEL, SHARDS, names, refusal, same, source
from hub_server import API, TREE, Fault, HubServer, _Handler
from moecast.archs.expressions import TensorInfo
from moecast.errors import BadInput, Interrupted
from moecast.progress import NoProgress
from moecast.sources.hub import connection, transfer
from moecast.sources.hub.address import HubSource
from moecast.sources.hub.connection import Connection
from moecast.sources.hub.headers import read_remote_header
from moecast.sources.hub.repository import HubCheckpoint, fetch, list_files
from moecast.sources.hub.transfer import Watch, in_parallel

pytestmark = pytest.mark.whole  # each fetches a repository or is refused one, hundreds of times
STRANGE_NAMES = [
    "../victim.safetensors", "a/../../victim.safetensors", "/etc/victim.safetensors", "..\\victim.safetensors",
    "C:victim.safetensors", "C:\\victim.safetensors", "//host/share/victim.safetensors", "./model.safetensors",
    "a//model.safetensors", "model\0.safetensors", "model\n.safetensors", "model\x1b[2J.safetensors",
    "model\u202e.safetensors", "nul.safetensors", "CON.model.safetensors", "sub/Aux.safetensors", "com1.safetensors",
    "model.safetensors:stream.safetensors", "sub /model.safetensors", "sub./model.safetensors",
    "m" * 300 + ".safetensors",
]  # fmt: skip
STRANGE_DIGESTS = [
    "../../victim", "../" * 8 + "tmp/victim", "a" * 39, "a" * 41, "a" * 40 + "\n", "A" * 40, "g" * 40, "", None, 7,
    ["a" * 40], "/victim", "a" * 38 + "/.",
]  # fmt: skip


def changed(server: HubServer, name: str, **values: object) -> bytes:
    """The listing, with other facts about one file."""
    listing = server.listing("main")
    for entry in listing:
        if entry["path"] == name:
            entry.update(values)
    return json.dumps(listing).encode()


@pytest.fixture
def victim(tmp_path: Path) -> Path:
    file = tmp_path / "victim"
    file.write_bytes(b"precious")
    return file


# --- names and digests --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("into_folder", [True, False])
@pytest.mark.parametrize("where", ["oid", "lfs"])
@pytest.mark.parametrize("digest", STRANGE_DIGESTS)
def test_checksums_become_no_paths(
    server: HubServer, tmp_path: Path, victim: Path, digest: object, where: str, into_folder: bool
) -> None:
    if digest is None and where == "lfs":
        pytest.skip("a file outside LFS")
    value = digest if where == "oid" else {"oid": digest, "size": 1, "pointerSize": 1}
    server.fail(TREE, Fault(content=changed(server, SHARDS[0], **{where: value})))
    with pytest.raises(Interrupted, match="gives a checksum"):
        fetch(source(server), folder=tmp_path / "a" / "b" if into_folder else None)
    assert victim.read_bytes() == b"precious"


@pytest.mark.parametrize("commit", STRANGE_DIGESTS)
def test_a_commit_becomes_no_path(server: HubServer, victim: Path, commit: object) -> None:
    server.fail(API, Fault(content=json.dumps({"id": "tiny/moe", "sha": commit}).encode()))
    assert "gives the commit" in refusal(server)
    assert victim.read_bytes() == b"precious" and len(server.log) == 1


@pytest.mark.parametrize("size", [-1, 1 << 60, "5", True, None, 1.5, [3]])
def test_sizes_are_numbers(server: HubServer, size: object) -> None:
    server.fail(TREE, Fault(content=changed(server, SHARDS[0], size=size)))
    assert "gives a size" in refusal(server)


@pytest.mark.parametrize("name", STRANGE_NAMES)
def test_an_index_names_plain_files(server: HubServer, checkpoint: Path, tmp_path: Path, name: str) -> None:
    """Even where the listing agrees with it."""
    (checkpoint / INDEX).write_text(json.dumps({"weight_map": {"weight.0": SHARDS[0], "weight.1": name}}))
    server.push(checkpoint)
    server.fail(TREE, Fault(content=changed(server, SHARDS[1], path=name)))
    with pytest.raises(ValueError, match=INDEX):
        fetch(source(server), folder=tmp_path / "a" / "b")
    assert not server.bodies(SHARDS[0]) and not list(tmp_path.rglob("victim*"))


@pytest.mark.parametrize("revision", ["../../victim", "refs/../../../victim", "/victim", "a\\b", "x\0"])
def test_a_revision_becomes_no_path(server: HubServer, revision: str) -> None:
    with pytest.raises(ValueError, match="--revision"):
        HubCheckpoint(source(server), revision)
    assert not server.log


def test_a_companion_larger_than_any_is_not_fetched(server: HubServer) -> None:
    server.fail(TREE, Fault(content=changed(server, "tokenizer.json", size=1 << 33)))
    assert "tokenizer.json has 8.6 GB" in refusal(server)


def test_a_card_larger_than_any_is_left_out(server: HubServer) -> None:
    server.fail(TREE, Fault(content=changed(server, "README.md", size=1 << 33)))
    assert names(fetch(source(server))) == NEEDED - {"README.md"}


# --- bytes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [SHARDS[0], "config.json", INDEX])
def test_no_more_is_kept_than_is_listed(server: HubServer, checkpoint: Path, name: str) -> None:
    content = (checkpoint / name).read_bytes()
    server.fail(name, Fault(content=content + b"x" * 50_000_000))
    assert same(fetch(source(server)), checkpoint)
    assert server.bodies(name)[0].sent < 25_000_000  # the rest was not even asked for


@pytest.mark.parametrize("name", [SHARDS[0], "config.json", TREE, API])
def test_what_is_compressed_is_not_expanded(server: HubServer, name: str) -> None:
    bomb = gzip.compress(bytes(10_000_000))
    server.fail(name, Fault(content=bomb, headers={"Content-Encoding": "gzip"}))
    assert "sends compressed what was asked for plainly" in refusal(server)


def test_nothing_compressed_is_asked_for(server: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: set[str] = set()
    answer = _Handler._answer

    def noting(handler: _Handler) -> None:
        asked.add(handler.headers["Accept-Encoding"])
        answer(handler)

    monkeypatch.setattr(_Handler, "_answer", noting)
    HubCheckpoint(source(server)).read_headers()
    fetch(source(server))
    assert asked == {"identity"}


def test_an_answer_that_never_ends(server: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "_MOST_JSON", 1000)
    server.fail(TREE, Fault(content=b"[" + b" " * 2000 + b"]"))
    assert "answers with more than" in refusal(server)


@pytest.mark.parametrize("content", [b"null", b"[1", b'{"sha": ', b"\xff\xfe", b"[" * 100_000, b'"x"', b"7"])
@pytest.mark.parametrize("call", [API, TREE])
def test_answers_that_are_something_else(server: HubServer, content: bytes, call: str) -> None:
    server.fail(call, Fault(content=content))
    assert server.endpoint in refusal(server)


@pytest.mark.parametrize(
    "header",
    [
        b"", b"\0" * 8, b"\xff" * 8, (1 << 40).to_bytes(8, "little"), (5).to_bytes(8, "little") + b"null ",
        (2).to_bytes(8, "little") + b"[]", (9).to_bytes(8, "little") + b'{"a": {}}',
    ],
)  # fmt: skip
def test_headers_of_shards_are_checked(server: HubServer, checkpoint: Path, header: bytes) -> None:
    size = (checkpoint / SHARDS[0]).stat().st_size
    found = HubCheckpoint(source(server))
    server.fail(SHARDS[0], Fault(content=header.ljust(size, b" ")))
    with pytest.raises(Interrupted, match=rf"the header of {SHARDS[0]} of .* arrived damaged"):
        found.read_headers()


@pytest.mark.parametrize(
    ("dtype", "shape", "offsets"),
    [
        ("F32", [1 << 40, 1 << 40], [0, 262144]), ("F32", [256, 256], [4, 262148]), ("F32", [256, -256], [0, 262144]),
        ("F32", [256, 256.0], [0, 262144]), ("F31", [256, 256], [0, 262144]), ("F32", [256, 256], [262144, 0]),
        ("F32", [], [0, 4]), ("F32", "256", [0, 262144]), (7, [256, 256], [0, 262144]), ("F32", [256, 256], [0]),
    ],
)  # fmt: skip
def test_shapes_are_what_the_file_has_room_for(dtype: object, shape: object, offsets: object) -> None:
    """A shape of 2^80 values is refused before anybody makes room for them."""
    with pytest.raises(BadInput if dtype == "F31" else Interrupted, match=SHARDS[0]):
        read_header_of({"weight.0": {"dtype": dtype, "shape": shape, "data_offsets": offsets}})


def test_a_sound_header() -> None:
    entry = {"dtype": "F32", "shape": [256, 256], "data_offsets": [0, 262144]}
    (tensor,) = read_header_of({"weight.0": entry, "__metadata__": {"format": "pt"}})
    assert (tensor.name, tensor.dtype, tensor.shape, tensor.length) == ("weight.0", "F32", (256, 256), 262144)


def read_header_of(entries: dict[str, object]) -> list[TensorInfo]:
    header = json.dumps(entries).encode()
    content = len(header).to_bytes(8, "little") + header + bytes(262144)
    return read_remote_header(lambda start, stop: content[start:stop], SHARDS[0], len(content), "a mirror")


@pytest.mark.parametrize("size", [0, 7, 8, 100])
def test_a_shard_that_is_listed_too_small(server: HubServer, size: int) -> None:
    """Nobody waits for a file that can never be whole."""
    server.fail(TREE, Fault(content=changed(server, SHARDS[0], size=size)))
    with pytest.raises(Interrupted, match=SHARDS[0]):
        HubCheckpoint(source(server)).read_headers()


# --- hosts and pages ----------------------------------------------------------------------------------------------


def test_pages_are_read_to_the_end(server: HubServer, checkpoint: Path) -> None:
    listing, address = server.listing("main"), f"/api/models/tiny/moe/tree/{server.commit}?page=2"
    first = Fault(content=json.dumps(listing[:3]).encode(), headers={"Link": f'<{address}>; rel="next"'})
    server.fail(TREE, first)
    server.fail(TREE, Fault(content=json.dumps(listing[3:]).encode()))
    assert {file.name for file in list_files(source(server)).files} == NEEDED


def test_pages_without_end(server: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "MOST_PAGES", 5)
    link = {"Link": f'<{server.endpoint}/api/models/tiny/moe/tree/{server.commit}>; rel="next"'}
    server.fail(TREE, Fault(content=b"[]", headers=link), times=50)
    assert "lists more than 5 pages" in refusal(server)


@pytest.mark.parametrize("address", ["{cdn}/api/models/tiny/moe/tree/x", "//localhost:{port}/x", "http://[bad/x"])
def test_a_listing_stays_on_its_host(checkpoint: Path, address: str) -> None:
    with HubServer(checkpoint, private=True, token=SENTINEL) as server:
        port = server.endpoint.rpartition(":")[2]
        link = f'<{address.format(cdn=server.cdn, port=port)}>; rel="next"'
        server.fail(TREE, Fault(content=b"[]", headers={"Link": link}))
        assert server.endpoint in refusal(server, token=SENTINEL)
        assert all(request.host.startswith("127.0.0.1") for request in server.log)


@pytest.mark.parametrize("name", [API, TREE, "config.json"])
def test_a_redirect_takes_no_token_along(checkpoint: Path, name: str) -> None:
    with HubServer(checkpoint, private=True, token=SENTINEL) as server:
        server.fail(name, Fault(status=307, headers={"Location": f"{server.cdn}/elsewhere"}))
        refusal(server, token=SENTINEL)
        assert {request.token for request in server.log if request.host.startswith("localhost")} <= {None}
        assert server.log[-1].path == "/elsewhere" or name == "config.json"


def test_redirects_in_a_circle(server: HubServer) -> None:
    address = f"{server.endpoint}/api/models/tiny/moe/revision/main"
    server.fail(API, Fault(status=302, headers={"Location": address}), times=100)
    assert server.endpoint in refusal(server)
    assert len(server.log) <= 20


# --- time ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "header", [("Retry-After", "301"), ("Retry-After", "9" * 5000), ("RateLimit", '"api";r=0;t=99999')]
)
@pytest.mark.parametrize("where", [API, TREE, SHARDS[0]])
def test_no_pause_without_end(server: HubServer, waits: list[float], where: str, header: tuple[str, str]) -> None:
    server.fail(where, Fault(status=429, headers=dict([header])))
    assert f"{server.endpoint} asks to wait " in refusal(server)
    assert all(wait < transfer.LONGEST_PAUSE for wait in waits)  # a stalled connection may have cost a short one


@pytest.mark.parametrize("value", ["²", "-5", "soon", "1e9", "Wed, 21 Oct 2015 07:28:00 GMT", ""])
def test_pauses_that_are_no_numbers(server: HubServer, checkpoint: Path, waits: list[float], value: str) -> None:
    server.fail(API, Fault(status=503, headers={"Retry-After": value.encode().decode("latin-1")}))
    assert same(fetch(source(server)), checkpoint)
    assert {*waits} == {1}  # one, or more where a busy machine stalls a connection too


@pytest.mark.parametrize("name", [SHARDS[0], "config.json"])
def test_a_stalled_connection_is_made_anew(
    server: HubServer, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(connection, "TIMEOUT", 0.5)
    server.fail(name, Fault(stall_after=10))
    assert same(fetch(source(server)), checkpoint)
    assert server.bodies(name)[1].range == "bytes=10-"


def test_a_slow_connection_is_made_anew(server: HubServer, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "WINDOW", 0.3)
    server.fail(SHARDS[0], Fault(drip=0.02))
    assert same(fetch(source(server)), checkpoint)
    assert len(server.bodies(SHARDS[0])) >= 2


def test_a_hub_that_is_always_slow_is_given_up(server: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "WINDOW", 0.1)
    server.fail(SHARDS[0], Fault(drip=0.02), times=99)
    assert "cannot be reached (ReadTimeout)" in refusal(server)
    assert len(server.bodies(SHARDS[0])) == transfer.ATTEMPTS + 1


@pytest.mark.parametrize("name", [API, TREE, SHARDS[1]])
def test_silence_is_noticed_wherever_it_is(server: HubServer, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """A thread hangs where no timeout reaches; who waits for it does not."""
    monkeypatch.setattr(transfer, "LONGEST_SILENCE", 0.5)
    monkeypatch.setattr(connection, "TIMEOUT", 1000.0)
    server.fail(name, Fault(before=server.closing.wait))
    assert "nothing has come from" in refusal(server)


def test_pauses_are_said(server: HubServer, checkpoint: Path) -> None:
    lines: list[str] = []

    class Notes(NoProgress):
        def note(self, line: str) -> None:
            lines.append(line)

    server.fail(TREE, Fault(status=429, headers={"Retry-After": "30"}))
    server.fail(SHARDS[1], Fault(status=503))
    assert same(fetch(source(server), progress=Notes()), checkpoint)
    expected = [f"{server.endpoint}: 429; trying again in 30 s", f"{server.endpoint}: 503; trying again in 1 s"]
    assert [line for line in lines if line in expected] == expected


def test_the_first_error_stops_the_other_threads() -> None:
    watch, ended = Watch(), threading.Event()

    def act(number: int) -> int:
        if number == 2:
            raise KeyError(number)
        while not watch.stopped.wait(0.01):
            pass
        ended.set()
        return number

    with pytest.raises(KeyError):
        in_parallel(act, range(8), 4, watch, "a test")
    assert ended.wait(10)


def test_what_nobody_waits_for_is_not_tried_again(waits: list[float]) -> None:
    """A download that fails after another one has ended everything says nothing, and makes no request."""
    lines: list[str] = []
    tries: list[int] = []

    class Notes(NoProgress):
        def note(self, line: str) -> None:
            lines.append(line)

    watch = Watch(Notes())

    def fail() -> None:
        tries.append(1)
        watch.stopped.set()
        raise connection.httpx2.ReadError("reset")

    for _ in range(2):
        with pytest.raises(transfer.Stopped):
            transfer.Retries("a Hub").run(fail, watch)
    assert (tries, lines, waits) == ([1], [], [])


def test_results_keep_their_order() -> None:
    def act(number: int) -> int:
        time.sleep(0.01 * (number % 3))
        return number * number

    assert in_parallel(act, range(20), 4, Watch(), "a test") == [number * number for number in range(20)]


def test_an_unreachable_hub_is_tried_once(waits: list[float]) -> None:
    """Later on, once it has answered, a refused connection is worth a pause."""
    with pytest.raises(Interrupted, match="cannot be reached"):
        fetch(HubSource("tiny/moe", endpoint="http://127.0.0.1:9"))
    assert not waits


def test_a_hub_that_goes_away_for_a_moment(
    server: HubServer, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer, refused = Connection._answer, []

    def broken(self: Connection, address: str, asked: dict[str, str]) -> object:
        if address.endswith(SHARDS[1]) and len(refused) < 3:
            refused.append(address)
            raise connection.httpx2.ConnectError("refused")
        return answer(self, address, asked)

    monkeypatch.setattr(Connection, "_answer", broken)
    folder = fetch(source(server))
    assert same(folder, checkpoint) and len(refused) == 3 and names(folder) == NEEDED
