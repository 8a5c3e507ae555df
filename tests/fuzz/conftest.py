"""Whole files that the fuzz tests damage; made once."""

from __future__ import annotations

from pathlib import Path

import pytest
from fuzzing import EXAMPLES, FAMILIES, Samples


@pytest.fixture(scope="session")
def samples(tmp_path_factory: pytest.TempPathFactory) -> Samples:
    from conversions import convert
    from moecast.quant.planning.file_formats import plan_format
    from moecast.quant.planning.plan import Form
    from moecast.quant.planning.plan_file import write_plan_file
    from moecast.sources.model import open_model

    folder, checkpoint = tmp_path_factory.mktemp("samples"), EXAMPLES / "minimax-m2-tiny"
    options = {"verify": False, "calibration": None, "padding": False}
    gguf = convert(checkpoint, folder / "model.gguf", "Q4_0", **options).files[0]
    families = [convert(EXAMPLES / name, folder / f"{name}.gguf", "Q8_0", **options).files[0] for name in FAMILIES]
    split = convert(checkpoint, folder / "split.gguf", "Q4_0", split_max_bytes=1 << 20, **options).files[0]
    onnx = convert(checkpoint, folder, "Q4_0", file_format="onnx", **options).files[0].parent
    write_plan_file(
        plan_format("gguf", open_model(checkpoint).graph, "Q4_K_M", Form(padding=False)), folder / "plan.json"
    )
    matrices = Path(__file__).parents[1] / "data" / "imatrix"
    return Samples(
        checkpoint,
        gguf,
        tuple(families),
        split,
        folder / "plan.json",
        (matrices / "im.gguf", matrices / "im.dat"),
        onnx,
    )
