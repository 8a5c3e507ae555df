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

    from ..quant.formats import native, nvrtc
    from ..runner.placement import Need, gpu_named, names, place

    devices = names()
    gpus = [gpu_named(name) for name in devices if name.startswith("cuda")]
    try:
        compiler = nvrtc.version()
    except RuntimeError:
        compiler = None
    return {
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "features": _processor_features(),
        "kernels": native.kernel_status(),
        "kernel_paths": native.paths(),
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "nvrtc": compiler,
        "devices": devices,
        "gpus": [{"name": gpu.name, "bytes": gpu.total, "free_bytes": gpu.free} for gpu in gpus],
        "auto": place("auto", None, Need(0)).why,
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
    gpus = ", ".join(
        f"{gpu['name']} ({human_bytes(gpu['bytes'])}, {human_bytes(gpu['free_bytes'])} free)" for gpu in facts["gpus"]
    )
    engines = ", ".join(f"{name} {version or 'not installed'}" for name, version in facts["engines"].items())
    print_table(
        "This machine",
        [
            ("Processor", f"{facts['cores']} cores, {' '.join(facts['features']) or facts['processor']}"),
            ("Quantizers", facts["kernels"]),
            ("GPU", gpus or "none that torch can use"),
            ("CUDA", f"torch {facts['torch_cuda'] or 'is built without it'}, kernels {_kernels(facts['nvrtc'])}"),
            ("--device", ", ".join(("auto", *facts["devices"]))),
            ("--device auto", facts["auto"]),
            ("Memory", human_bytes(facts["memory_bytes"])),
            ("Free disk here", human_bytes(facts["disk_free_bytes"])),
            ("Free disk, Hub cache", f"{human_bytes(facts['hub_cache_free_bytes'])} at {facts['hub_cache']}"),
            ("Engines", engines),
        ],
    )


def _kernels(compiler: str | None) -> str:
    return f"by NVRTC {compiler}" if compiler else "in torch alone: install moecast[cuda] for NVRTC"


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
