"""What a finished GGUF file was made from, tensor by tensor, in the file NAME.fingerprints.json beside it.

{"version": 1, "checksum": 305419896, "content": {"moecast": "0.1.0", "made from": {"source": {...}, "importance":
 {...}, "code": "0123456789ab"}, "tensors": {"token_embd.weight": ["ba9876543210", [pieces' CRC-32], [rounding
 error, size]], ...}, "expert tokens": {"0": [...]}, "problems": [], "measured": {"facts": {...}, "damage": {...}}}}
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

from ... import __version__
from ...archs.expressions import TensorInfo, stored_tensors
from ...documents import is_file, read_json
from ...errors import BadInput
from ...files import write_whole
from ...progress import Progress
from ...quant.planning.allocation import Damage
from ...quant.planning.plan import PlannedTensor
from .fingerprint import differences, digest, facts_of_file

_VERSION = 1
_PART = re.compile(r"-\d{5}-of-\d{5}$")
_CALIBRATION = "calibration"


@dataclass(frozen=True)
class MadeFrom:
    """What all tensors of a file are made from, in facts that can be compared.

    Attributes:
        source: see `source_identity`.
        importance: what weighs the columns of quantized tensors, see `importance_facts`.
        code: see `code_digest`.
    """

    source: Mapping[str, str]
    importance: Mapping[str, str]
    code: str

    def changes(self, earlier: MadeFrom) -> list[str]:
        """What was otherwise for an earlier file, a line each."""
        now = {**self.source, **self.importance, "the code that decides bytes": self.code}
        before = {**earlier.source, **earlier.importance, "the code that decides bytes": earlier.code}
        return [*differences(before, now).values()]

    def weighs_as(self, earlier: MadeFrom) -> bool:
        """Whether columns are weighed as they were; what calibration finds depends on all of the source."""
        same_source = _CALIBRATION not in self.importance or not differences(earlier.source, self.source)
        return self.importance == earlier.importance and same_source

    def gives_same(self, tensor: PlannedTensor, earlier: MadeFrom) -> bool:
        """Whether a tensor of one digest has the bytes that it had when it was made from something earlier."""
        if self.code != earlier.code:
            return False
        changed = differences(earlier.source, self.source).keys()
        if tensor.type.block_size > 1 and not self.weighs_as(earlier):
            return False
        files = {stored.file for stored in stored_tensors(tensor.weight.source)}
        return not any(changed & facts_of_file(file, self.source) for file in files)


def importance_facts(identity: Mapping[str, str], calibrated: bool, by_matrix: bool) -> dict[str, str]:
    """What of a conversion's fingerprint decides how columns are weighed: by a text that runs through the model, whose
    statistics depend on what computes them; by an importance matrix; or not at all."""
    if calibrated:
        return {name: identity[name] for name in (_CALIBRATION, "compute dtype", "error feedback", "device")}
    return {"importance matrix": identity["importance matrix"]} if by_matrix else {}


@dataclass(frozen=True)
class Measured:
    """What was measured of a model to choose types, and the facts that it depends on."""

    facts: Mapping[str, str]
    damage: Damage


@dataclass(frozen=True)
class TensorRecord:
    """What is known of a finished tensor.

    Attributes:
        digest: see `tensor_digest`.
        checksums: the CRC-32 of each of its `pieces`.
        squares: what rounding has changed of it, see `Findings`; None where that is not known.
    """

    digest: str
    checksums: tuple[int, ...]
    squares: tuple[float, float] | None


@dataclass(frozen=True)
class Fingerprints:
    """What a finished file was made from.

    Attributes:
        made_from: all of it.
        tensors: each tensor, by name.
        expert_tokens: see `Findings`.
        problems: what could not be written as it was, a line each, which begins with the name of a tensor or does not.
        measured: what was measured to choose types.
    """

    made_from: MadeFrom
    tensors: Mapping[str, TensorRecord]
    expert_tokens: Mapping[int, list[int]] = field(default_factory=dict)
    problems: tuple[str, ...] = ()
    measured: Measured | None = None


def tensor_digest(tensor: PlannedTensor) -> str:
    """A digest of what a tensor is: name, role, type and shape, and where in which files its numbers lie."""
    weight = tensor.weight
    return digest([weight.name, weight.role.value, tensor.type.name, weight.shape, _described(weight.source)])


def _described(part: object) -> object:
    """An expression as JSON can hold it; files go by their names, because a source may move."""
    if isinstance(part, tuple):
        return [_described(member) for member in part]
    if not is_dataclass(part):
        return part
    members = {member.name: getattr(part, member.name) for member in fields(part)}
    if isinstance(part, TensorInfo):
        members["file"] = Path(part.file).name
    return [type(part).__name__, *map(_described, members.values())]


def sidecar_of(file: Path) -> Path:
    """Where a GGUF file's fingerprints lie; of a split, those of all parts."""
    return file.with_name(f"{_PART.sub('', file.stem)}.fingerprints.json")


def keep_fingerprints(fingerprints: Fingerprints, file: Path, progress: Progress) -> None:
    """Write what a finished file was made from beside it; the file stands without it too."""
    content = {
        "moecast": __version__,
        "made from": asdict(fingerprints.made_from),
        "tensors": {name: [*vars(record).values()] for name, record in fingerprints.tensors.items()},
        "expert tokens": {str(layer): tokens for layer, tokens in fingerprints.expert_tokens.items()},
        "problems": fingerprints.problems,
        "measured": asdict(fingerprints.measured) if fingerprints.measured else None,
    }
    checksum = _checksum(content)
    text = json.dumps({"version": _VERSION, "checksum": checksum, "content": content}, separators=(",", ":"))
    try:
        write_whole(sidecar_of(file), text + "\n")
    except OSError as error:
        progress.note(f"{sidecar_of(file)} cannot be written: {error.strerror}; --reuse needs it")


def read_fingerprints(file: Path) -> Fingerprints:
    """What a finished file was made from. Raises BadInput where that is not there, or not as it was written."""
    path = sidecar_of(file)
    if not is_file(path):
        raise BadInput(f"{path} is missing, in which `convert` writes what {file.name} is made from: leave out --reuse")
    value = read_json(path)
    content, version = value.get("content"), value.get("version")
    if version != _VERSION or value.get("checksum") != _checksum(content) or not isinstance(content, dict):
        what = f"has version {version!r}" if version != _VERSION else "is not as it was written"
        raise BadInput(f"{path} {what}, expected what `convert` wrote beside {file.name}: leave out --reuse")
    tensors = {name: _record(*values) for name, values in content["tensors"].items()}
    measured = content["measured"]
    return Fingerprints(
        MadeFrom(**content["made from"]),
        tensors,
        {int(layer): tokens for layer, tokens in content["expert tokens"].items()},
        tuple(content["problems"]),
        Measured(measured["facts"], Damage(**measured["damage"])) if measured else None,
    )


def _record(digest: str, checksums: list[int], squares: list[float] | None) -> TensorRecord:
    return TensorRecord(digest, tuple(checksums), (squares[0], squares[1]) if squares else None)


def _checksum(content: Any) -> int:
    return zlib.crc32(json.dumps(content, separators=(",", ":")).encode())
