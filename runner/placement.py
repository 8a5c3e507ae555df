"""Where a run computes: on a CPU or a GPU, and how much of the GPU's memory there is for it.

What differs between kinds of devices is here and in the kernels of quant/formats; all else asks tensors where they lie.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from ..errors import BadInput

CPU: Final = torch.device("cpu")
# Of a GPU's memory, what torch's allocator does not see. The driver keeps the largest stack of any kernel for every
# thread that the GPU can run at once, and those that encode and choose levels have 6 to 14 KB.
_STACK: Final = 14 << 10
_LIBRARIES: Final = 512 << 20  # CUDA's context, and what its libraries work in
_USABLE: Final = 0.9  # of what is free, because freed memory is in pieces
_EXPERTS_SHARE: Final = 0.9  # of what is left, for experts that are done together; the rest is for activations
_MOST_EXPERTS: Final = 32  # beyond which kernels have all the lanes that they can use


@dataclass(frozen=True)
class Placement:
    """A device to compute on.

    Attributes:
        device: where weights are decoded, multiplied and quantized.
        room: bytes of its own memory that are left for activations; 0 where it computes in the process's memory.
        why: the choice in a line.
        experts_at_once: how many experts are multiplied with and quantized together. A GPU has thousands of threads to
            keep busy; a CPU gains nothing by more than one.
    """

    device: torch.device = CPU
    room: int = 0
    why: str = "Computing on the CPU"
    experts_at_once: int = 1

    @property
    def has_own_memory(self) -> bool:
        """Whether what lies there is not in the process's memory."""
        return self.device.type not in ("cpu", "mps")


@dataclass(frozen=True)
class Gpu:
    """A GPU with memory of its own: bytes in all, free now, and what the driver and its libraries will take of it."""

    device: torch.device
    name: str
    total: int
    free: int
    overhead: int

    def room(self, vram: int | None) -> int:
        """Bytes that tensors may take within `vram` bytes, by default within what is free."""
        bound = int(self.free * _USABLE) if vram is None else min(self.free, vram)
        return bound - self.overhead

    def __str__(self) -> str:
        return f"{self.device} ({self.name}, {_gb(self.free)} of {_gb(self.total)} free)"


@dataclass(frozen=True)
class Need:
    """Bytes that tensors of a run take where it computes, without activations.

    Attributes:
        least: with one expert at a time.
        expert: each further expert that is done together with it.
        experts: how many there are in a layer.
    """

    least: int
    expert: int = 0
    experts: int = 1


def place(wanted: str, vram: int | None, need: Need) -> Placement:
    """The device for a run.

    Args:
        wanted: its name as `Compute.device` has it.
        vram: most bytes of a GPU's memory that the run may take; by default nearly all that is free.
        need: what the run takes.

    Raises BadInput for a device that is not there, and for one asked for by name that has less memory than it takes.
    """
    there = names()
    if wanted == "auto":
        return _best([gpu_named(name) for name in there if name.startswith("cuda")], vram, need)
    name = "cuda:0" if wanted == "cuda" else wanted
    if name not in there:
        reason = "" if torch.version.cuda or name == "mps" else ", and this torch is built without CUDA"
        raise BadInput(f"--device is {wanted}, but here are only {', '.join(there)}{reason}: choose one of them")
    if not name.startswith("cuda"):
        return Placement(torch.device(name), 0, f"Computing on {name}, as --device says")
    gpu = gpu_named(name)
    if gpu.room(vram) < need.least:
        raise BadInput(
            f"{_bound(gpu, vram)}, but the least that this model takes there is {_gb(_floor(gpu, vram, need.least))}; "
            "give it that, a smaller --context, or --device cpu"
        )
    return _placed(gpu, vram, need, f"Computing on {gpu}, as --device says")


def names() -> list[str]:
    """The devices that torch can compute on here."""
    gpus = [f"cuda:{number}" for number in range(torch.cuda.device_count() if torch.cuda.is_available() else 0)]
    return ["cpu", *gpus, *(["mps"] if torch.backends.mps.is_available() else [])]


def gpu_named(name: str) -> Gpu:
    """What is known of an NVIDIA GPU that is there."""
    device = torch.device(name)
    properties, (free, total) = torch.cuda.get_device_properties(device), torch.cuda.mem_get_info(device)
    threads = properties.multi_processor_count * properties.max_threads_per_multi_processor
    return Gpu(device, properties.name, total, free, _STACK * threads + _LIBRARIES)


def wide(values: Tensor) -> Tensor:
    """float64 of what sums of many parts are made of, on the same device, or on the CPU where the device has none."""
    return (values.cpu() if values.device.type == "mps" else values).double()


def fetched(values: Tensor) -> Tensor:
    """The same in the process's memory; from a GPU through pinned memory, which is ten times faster."""
    if values.device.type != "cuda":
        return values.cpu()
    return torch.empty_like(values, device="cpu", pin_memory=True).copy_(values)


def _best(gpus: list[Gpu], vram: int | None, need: Need) -> Placement:
    """The first GPU that has the memory."""
    for gpu in gpus:
        if gpu.room(vram) >= need.least:
            return _placed(gpu, vram, need, f"Computing on {gpu}: the model takes at least {_gb(need.least)} there")
    if not gpus:
        return Placement(why=f"Computing on the CPU: torch {torch.__version__} finds no NVIDIA GPU")
    floor = _gb(_floor(gpus[0], vram, need.least))
    return Placement(why=f"Computing on the CPU: {_bound(gpus[0], vram)}, and the model takes at least {floor} there")


def _placed(gpu: Gpu, vram: int | None, need: Need, why: str) -> Placement:
    torch.backends.cudnn.allow_tf32 = False  # float32 is what settings say
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    if vram:  # what torch has freed counts too
        torch.cuda.set_per_process_memory_fraction(min(1.0, gpu.room(vram) / gpu.total), gpu.device)
    room = gpu.room(vram) - need.least
    experts = _experts_at_once(int(room * _EXPERTS_SHARE), need)
    return Placement(gpu.device, room - (experts - 1) * need.expert, why, experts)


def _experts_at_once(memory: int, need: Need) -> int:
    """A power of two, so that a little more or less memory on another day seldom changes it."""
    most = min(_MOST_EXPERTS, need.experts, 1 + memory // need.expert if need.expert else 1)
    return 1 << most.bit_length() - 1


def _floor(gpu: Gpu, vram: int | None, least: int) -> int:
    """What --vram or the free memory would have to be."""
    return int((least + gpu.overhead) / (_USABLE if vram is None else 1.0))


def _bound(gpu: Gpu, vram: int | None) -> str:
    if vram is not None and vram <= gpu.free:
        return f"--vram is {_gb(vram)}"
    return f"{gpu.device} has {_gb(gpu.free)} free"


def _gb(size: int) -> str:
    return f"{size / 1e9:.2f} GB"
