"""What moecast relies on without its owners' promise, all in one place: an upgrade that takes it away fails here."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import httpx2
import llama_library
import pytest
from huggingface_hub.errors import RepositoryNotFoundError
from moecast.quant.formats.lattice import LATTICES
from setuptools import find_packages

ROOT = Path(__file__).parent.parent
FOLDERS = [ROOT, *(ROOT / package.replace(".", "/") for package in find_packages(ROOT))]
MODULES = [file for folder in FOLDERS for file in folder.glob("*.py") if file.name != "setup.py"]

# Modules whose documentation promises every name in them that has no underscore in front.
PROMISED = {
    "click", "gguf", "google.protobuf.message", "httpx2", "huggingface_hub", "huggingface_hub.errors", "jinja2",
    "markupsafe", "matplotlib", "matplotlib.axes", "matplotlib.figure", "matplotlib.ticker", "numpy",
    "numpy.lib.format", "numpy.typing", "onnx", "onnx.helper", "onnx_ir", "onnxruntime", "rich.console",
    "rich.progress", "rich.table", "rich.text", "safetensors", "tokenizers", "tokenizers.decoders",
    "tokenizers.models", "tokenizers.normalizers", "tokenizers.pre_tokenizers", "torch", "torch.nn.functional", "yaml",
}  # fmt: skip


@dataclass(frozen=True)
class Reliance:
    """A name of a library, the file of ours that uses it, and whether it is still what that file takes it for."""

    name: str
    user: str
    holds: Callable[[Any], object]


def takes(*arguments: object, **named: object) -> Callable[[Any], object]:
    """A function can be called with these arguments."""
    return lambda function: inspect.signature(function).bind(*arguments, **named)


def has(*names: str) -> Callable[[Any], object]:
    return lambda thing: all(hasattr(thing, name) for name in names)


def has_lattices(quants: Any) -> bool:
    """The points of llama.cpp's lattices come from `init_grid`, with `grid_shape` to say how they are arranged."""
    for lattice in (getattr(quants, name) for name in LATTICES):
        lattice.init_grid()
        if lattice.grid.size != lattice.grid_shape[0] * lattice.grid_shape[1]:
            return False
    return True


def knows_errors(check: Any) -> bool:
    """An answer without its body is enough to tell what is wrong."""
    request = httpx2.Request("GET", "https://huggingface.co/api/models/owner/name")
    check(httpx2.Response(200, request=request))
    with pytest.raises(RepositoryNotFoundError):
        check(httpx2.Response(404, headers={"X-Error-Code": "RepoNotFound"}, request=request))
    return True


def takes_a_checksum(operation: Any) -> bool:
    """A file whose SHA-256 is known is not read again for it."""
    info = operation("name", __file__).upload_info
    info.sha256 = bytes(32)
    return info.is_hashed and info.sha256 == bytes(32)


def keeps_keys_by_file(writer: Any) -> bool:
    """`kv_data` is a list of what each file of a split says; there is one until it is split."""
    (keys,) = writer(None, arch="any").kv_data
    return isinstance(keys, dict) and "general.architecture" in keys


HUB = "sources/hub/repository.py"
CONNECTION = "sources/hub/connection.py"
UPLOAD = "sources/hub/upload.py"
RELIANCES = (
    Reliance("click.ParamType", "commands/values.py", lambda kind: kind[int]),
    Reliance("click.Choice", "commands/options.py", lambda kind: kind[str]),
    Reliance("gguf.quants", "quant/formats/lattice.py", has_lattices),
    Reliance("gguf.GGUFWriter", "convert/gguf/writer.py", keeps_keys_by_file),
    Reliance(
        "gguf.GGUFWriter.add_tensor_info", "convert/gguf/writer.py", takes(None, "name", [1], None, 4, raw_dtype=None)
    ),
    Reliance("gguf.quants._type_traits", "tests/quant/formats/test_dequantize.py", lambda traits: len(traits) > 20),
    Reliance("gguf.constants.GGML_QUANT_SIZES", "tests/quant/formats/test_formats.py", lambda sizes: len(sizes) > 20),
    Reliance(
        "huggingface_hub.constants",
        HUB,
        has(
            "DEFAULT_REVISION",
            "ENDPOINT",
            "HF_HUB_CACHE",
            "HF_HUB_DISABLE_SYMLINKS",
            "HF_URL_HOSTS",
            "MAX_HTTP_DOWNLOAD_SIZE",
        ),
    ),
    Reliance("huggingface_hub.constants.is_offline_mode", HUB, lambda function: function() in (True, False)),
    Reliance(
        "huggingface_hub.file_download.repo_folder_name",
        HUB,
        lambda function: function(repo_id="owner/name", repo_type="model") == "models--owner--name",
    ),
    Reliance("huggingface_hub.HfApi.resolve_revision", HUB, takes(None, "id", revision="", local_files_only=True)),
    Reliance("huggingface_hub.utils.are_progress_bars_disabled", UPLOAD, takes()),
    Reliance("huggingface_hub.utils.disable_progress_bars", UPLOAD, takes()),
    Reliance("huggingface_hub.utils.enable_progress_bars", UPLOAD, takes()),
    Reliance("huggingface_hub.CommitOperationAdd", UPLOAD, takes_a_checksum),
    Reliance(
        "huggingface_hub.HfApi.preupload_lfs_files", UPLOAD, takes(None, "id", [], revision="", free_memory=False)
    ),
    Reliance("huggingface_hub.utils.WeakFileLock", HUB, takes("file.lock", timeout=1.0)),
    Reliance("huggingface_hub.utils.get_token_to_send", HUB, lambda function: function("token") == "token"),
    Reliance("huggingface_hub.utils.get_session", CONNECTION, lambda function: has("stream")(function())),
    Reliance("huggingface_hub.utils.hf_raise_for_status", CONNECTION, knows_errors),
    Reliance("importlinter.cli.lint_imports", "tests/test_contracts.py", takes(config_filename="", no_cache=True)),
    Reliance(
        "onnxruntime.capi.onnxruntime_pybind11_state",
        "runner/engines.py",
        lambda state: has("domain", "op_name", "provider")(state.get_all_opkernel_def()[0]),
    ),
    Reliance("transformers.PretrainedConfig._attn_implementation", "tests/deepseek_checkpoints.py", bool),
    Reliance(
        "torch.cpu._is_avx512_bf16_supported", "quant/rounding/moments.py", lambda check: check() in (True, False)
    ),
)


@pytest.mark.parametrize("reliance", RELIANCES, ids=lambda reliance: reliance.name)
def test_it_is_still_there(reliance: Reliance) -> None:
    assert reliance.holds(_find(reliance.name)), f"{reliance.user} relies on {reliance.name}"


def test_llama_cpp_lays_its_structures_out_as_our_tests_know_them() -> None:
    """tests/llama_library.py describes them to ctypes, and compares every field's default with the library's."""
    llama_library.load_library()


@pytest.mark.parametrize("reliance", RELIANCES, ids=lambda reliance: reliance.name)
def test_it_is_still_used(reliance: Reliance) -> None:
    name = reliance.name.rpartition(".")[2]
    assert re.search(rf"\b{name}\b", (ROOT / reliance.user).read_text(encoding="utf-8"))


def test_nothing_else_is_relied_on() -> None:
    """Every name that the package takes from a library is one that its owners promise, or stands above."""
    known = {reliance.name for reliance in RELIANCES}
    taken = {(name, file.relative_to(ROOT).as_posix()) for file in MODULES for name in _taken_from_libraries(file)}
    assert ("huggingface_hub.utils.WeakFileLock", HUB) in taken
    assert {(name, file) for name, file in taken if not _is_promised(name) and name not in known} == set()


def _find(name: str) -> Any:
    """A module, or what it holds."""
    if find_spec(name.partition(".")[0]) is None:
        raise ModuleNotFoundError(name)
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        parent, _, last = name.rpartition(".")
        return getattr(_find(parent), last)


def _taken_from_libraries(file: Path) -> Iterator[str]:
    """Full names of what a file of ours imports, and of attributes of it that begin with an underscore."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    imported: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imported |= {name.asname or name.name: name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            imported |= {name.asname or name.name: f"{node.module}.{name.name}" for name in node.names}
    ours = {name: full for name, full in imported.items() if full.partition(".")[0] not in sys.stdlib_module_names}
    yield from ours.values()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
            first, *rest = ast.unparse(node).split(".")
            if first in ours:
                yield ".".join((ours[first], *rest))


def _is_promised(name: str) -> bool:
    module, _, last = name.rpartition(".")
    return name in PROMISED or (module in PROMISED and not last.startswith("_") and not _is_module(name))


def _is_module(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except ModuleNotFoundError:  # what holds it is no package
        return False
