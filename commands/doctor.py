"""What this machine offers moecast: processor, kernels, accelerators, memory, disk, engines."""

from __future__ import annotations

import os
import platform
import shutil
from importlib import metadata
from pathlib import Path
from typing import Any

from ..files import memory_bytes
from .console import human_bytes, print_json, print_table

ENGINES = ("xllamacpp", "onnxruntime", "onnxruntime-genai")
_FEATURES = ("avx2", "f16c", "avx512f", "avx512bw", "avx512_bf16", "amx_bf16", "asimd", "sve")


def examine(folder: Path) -> dict[str, Any]:
    """Facts about this machine; `folder` is where outputs would go."""
    import torch
    from huggingface_hub import constants

    from ..quant.formats import native

    gpus = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return {
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "features": _processor_features(),
        "kernels": native.kernel_status(),
        "kernel_paths": native.paths(),
        "torch": torch.__version__,
        "gpus": [{"name": gpu.name, "bytes": gpu.total_memory} for gpu in gpus],
        "memory_bytes": memory_bytes(),
        "disk_free_bytes": shutil.disk_usage(folder).free,
        "hub_cache": constants.HF_HUB_CACHE,
        "hub_cache_free_bytes": shutil.disk_usage(_existing(Path(constants.HF_HUB_CACHE))).free,
        "engines": {name: _version(name) for name in ENGINES},
    }


def show(facts: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print_json(facts)
        return
    gpus = ", ".join(f"{gpu['name']} ({human_bytes(gpu['bytes'])})" for gpu in facts["gpus"])
    engines = ", ".join(f"{name} {version or 'not installed'}" for name, version in facts["engines"].items())
    print_table(
        "This machine",
        [
            ("Processor", f"{facts['cores']} cores, {' '.join(facts['features']) or facts['processor']}"),
            ("Quantizers", facts["kernels"]),
            ("GPU", gpus or "none that torch can use"),
            ("Memory", human_bytes(facts["memory_bytes"])),
            ("Free disk here", human_bytes(facts["disk_free_bytes"])),
            ("Free disk, Hub cache", f"{human_bytes(facts['hub_cache_free_bytes'])} at {facts['hub_cache']}"),
            ("Engines", engines),
        ],
    )


def _processor_features() -> list[str]:
    """The instruction sets that matter here, as Linux names them."""
    try:
        words = set(Path("/proc/cpuinfo").read_text().split())
    except OSError:
        return []
    return [feature for feature in _FEATURES if feature in words]


def _existing(path: Path) -> Path:
    """The nearest folder above that is there already."""
    return next(folder for folder in (path, *path.parents) if folder.is_dir())


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
