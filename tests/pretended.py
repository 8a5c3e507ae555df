"""A device that is not there, for tensors without numbers, which refuse to meet those of another device."""

from __future__ import annotations

import sys
from functools import cache

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.backend_registration import _DummyBackendModule, _DummyDeviceGuard

DEVICE = torch.device("privateuseone")  # torch built for CPUs lets tensors pretend to lie on no GPU


def pretend(patch: pytest.MonkeyPatch) -> FakeTensorMode:
    """A mode in which tensors can lie on DEVICE; all others become such without numbers too."""
    known_to_torch(patch)
    patch.setattr(FakeTensorMode, "avoid_device_init", True)  # as where torch has no GPU
    return FakeTensorMode(allow_non_fake_inputs=True)


def known_to_torch(patch: pytest.MonkeyPatch) -> None:
    """Tensors can say that they lie on DEVICE."""
    _register()
    module = _DummyBackendModule()
    patch.setattr(torch, DEVICE.type, module, raising=False)
    patch.setitem(sys.modules, f"torch.{DEVICE.type}", module)  # type: ignore[arg-type]


@cache
def _register() -> None:
    torch._C._acc.register_python_privateuseone_device_guard(_DummyDeviceGuard())
