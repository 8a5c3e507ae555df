"""What tests of the trained examples share: how families are read without moecast."""

from __future__ import annotations

from typing import Any

import families
import pytest
import torch
from families import Family, Tensors
from trained_examples import evaluation_chunks


@pytest.fixture(scope="module", params=families.FAMILIES, ids=lambda family: family.folder.name)
def family(request: pytest.FixtureRequest) -> Family:
    return request.param


@pytest.fixture(scope="module")
def config(family: Family) -> dict[str, Any]:
    return family.config()


@pytest.fixture(scope="module")
def tensors(family: Family) -> Tensors:
    return families.read_tensors(family.folder)


@pytest.fixture(scope="module")
def chunks(family: Family) -> torch.Tensor:
    return evaluation_chunks(family.folder)


@pytest.fixture(scope="module")
def model(family: Family, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Transformers' model with the stored values, decoded by hand where it cannot read them itself."""
    return family.load(family.folder, tmp_path_factory.mktemp("decoded"))


@pytest.fixture(scope="module")
def reference(model: Any, chunks: torch.Tensor) -> float:
    """The perplexity of the model as it is."""
    return families.perplexity(model, chunks)
