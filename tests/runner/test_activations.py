"""Activations in memory and on disk hold the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from moecast.runner.activations import Activations, Workspace


def _filled(activations: Activations) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    activations[1] = torch.randn(6, 8, generator=generator)
    for _ in range(3):
        activations.add_rows(torch.randperm(12, generator=generator)[:5], torch.randn(5, 8, generator=generator))
    return torch.cat([activations[0], activations[1], activations.rows(torch.tensor([7, 0, 11]))])


def test_disk_is_like_memory(tmp_path: Path) -> None:
    found = _filled(Workspace(0, tmp_path).activations(2, 6, 8))
    assert torch.equal(found, _filled(Workspace().activations(2, 6, 8)))
    assert not list(tmp_path.iterdir())


def test_a_workspace_that_is_left_keeps_no_file_open(tmp_path: Path) -> None:
    """Even where somebody holds on to its activations."""
    with Workspace(0, tmp_path) as room:
        kept = _filled(room.activations(2, 6, 8)), room.activations(2, 6, 8)
    with pytest.raises(ValueError, match="closed file"):
        kept[1][0]


def test_more_lanes_than_a_shell_allows_files(tmp_path: Path) -> None:
    """Probes of a real model are hundreds of lanes, each with three activations."""
    resource: Any = pytest.importorskip("resource")
    allowed = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, allowed[1]))
    try:
        room = Workspace(0, tmp_path)
        lanes = [room.activations(2, 6, 8) for _ in range(400)]
        assert torch.equal(_filled(lanes[0]), _filled(lanes[-1]))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, allowed)
