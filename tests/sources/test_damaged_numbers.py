"""Numbers that no model has are named instead of copied: ids that index nothing, scales that decode to infinity."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from moecast.archs.encodings import Mxfp4, Nvfp4
from moecast.archs.expressions import Read, TensorInfo
from moecast.archs.weights import Role
from moecast.convert import convert
from moecast.errors import BadInput
from moecast.quant import quantize
from moecast.sources.decode import evaluate
from moecast.sources.model import open_model
from moecast.sources.repack import repack
from moecast.sources.storage import Storage
from safetensors.torch import load_file, save_file

EXAMPLE = Path(__file__).parents[2] / "examples" / "deepseek-v4-tiny"
TABLE = "layers.0.ffn.gate.tid2eid"


def stored(path: Path, name: str, dtype: str, data: torch.Tensor, shape: tuple[int, ...] | None = None) -> TensorInfo:
    """A tensor by itself in a file."""
    content = data.contiguous().view(torch.uint8).numpy().tobytes()
    (path / name).write_bytes(content)
    return TensorInfo(name, dtype, shape or tuple(data.shape), str(path / name), 0, len(content))


def with_table(folder: Path, change: torch.Tensor) -> Path:
    """The example with another hash table."""
    folder.mkdir()
    shutil.copy(EXAMPLE / "config.json", folder)
    tensors: dict[str, torch.Tensor] = {}
    for shard in EXAMPLE.glob("*.safetensors"):
        tensors |= load_file(shard)
    save_file(tensors | {TABLE: change}, folder / "model.safetensors")
    return folder


def table() -> torch.Tensor:
    shard = next(shard for shard in EXAMPLE.glob("*.safetensors") if TABLE in load_file(shard))
    return load_file(shard)[TABLE]


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize("wrong", [None, -1, 16, 17, 2**24 + 1, 2**31 - 1, 2**40, -(2**40)])
def test_ids_of_hash_tables_are_those_of_experts(tmp_path: Path, wrong: int | None, dtype: torch.dtype) -> None:
    experts = json.loads((EXAMPLE / "config.json").read_text())["n_routed_experts"]
    changed = table().to(dtype)
    if wrong is not None:
        if wrong not in range(torch.iinfo(dtype).min, torch.iinfo(dtype).max + 1):
            pytest.skip("does not fit")
        changed[321, 2] = wrong
    model = open_model(with_table(tmp_path / "model", changed))
    weight = next(weight for weight in model.graph.weights() if weight.role is Role.HASH_TABLE)
    if wrong is None:
        assert torch.equal(model.load(weight), table().float())
        return
    with pytest.raises(BadInput, match=rf"{TABLE} in .* holds {wrong} in row 321, expected .* 0 to {experts - 1}"):
        model.load(weight)
    with pytest.raises(BadInput, match="in row 321"):
        model.load(weight, rows=(300, 400))
    assert len(model.load(weight, rows=(0, 321))) == 321


def test_row_of_a_hash_table_names_an_expert_once(tmp_path: Path) -> None:
    changed = table()
    changed[321, -1] = changed[321, 0]
    folder = with_table(tmp_path / "model", changed)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(EXAMPLE / name, folder)
    says = rf"^{TABLE} in .*/model.safetensors holds {changed[321, 0]} twice in row 321, expected different "
    model = open_model(folder)
    weight = next(weight for weight in model.graph.weights() if weight.role is Role.HASH_TABLE)
    with pytest.raises(BadInput, match=says):
        model.load(weight, rows=(300, 400))
    with pytest.raises(BadInput, match=says) as refused:
        convert(folder, tmp_path / "out.gguf", "BF16", evaluation=None)
    assert str(refused.value).count(TABLE) == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.int8])
def test_hash_tables_are_whole_numbers(tmp_path: Path, dtype: torch.dtype) -> None:
    with pytest.raises(BadInput, match=f"{TABLE} in .* expected I64 or I32"):
        open_model(with_table(tmp_path / "model", table().to(dtype)))


def test_largest_scales_of_mxfp4_pass_with_small_codes_alone(tmp_path: Path) -> None:
    """2^127 * 1.5 is a float32, 2^127 * 2 is none; 0xFF is NaN."""
    fitting = ((252, 7), (253, 5), (254, 3))
    for scale, code in (*fitting, (253, 6), (253, 7), (254, 4), (254, 15), (255, 0)):
        fits = (scale, code) in fitting
        codes = torch.full((3, 32), 0, dtype=torch.uint8)
        codes[1, 20] = code
        scales = torch.full((3, 2), 127, dtype=torch.uint8)
        scales[1, 1] = scale
        weight = Mxfp4(stored(tmp_path, "codes", "I8", codes), stored(tmp_path, "scale", "F8_E8M0", scales))
        if scale < 255:  # as a scale of ggml's that is a number
            assert bool(torch.isfinite(evaluate(weight, Storage())).all()) == fits
        if fits:
            assert repack(weight, "MXFP4", Storage(), None, None) is not None
        else:
            with pytest.raises(BadInput, match=r"^scale in .*(infinity in row 1|NaN)"):
                repack(weight, "MXFP4", Storage(), None, None)


@pytest.mark.parametrize("type_name", ["Q8_0", "Q4_K", "Q6_K", "IQ4_NL"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_blocks_are_copied_only_where_they_decode_to_numbers(tmp_path: Path, type_name: str, bad: float) -> None:
    """One of three experts has a scale that is no number."""
    blocks = quantize(torch.randn(12, 256), type_name)
    first = {"Q8_0": 0, "IQ4_NL": 0, "Q4_K": 0, "Q6_K": blocks.shape[1] - 2}[type_name]
    blocks[7, first : first + 2] = torch.tensor([bad], dtype=torch.float16).view(torch.uint8)
    source = Read(stored(tmp_path, "blk.0.ffn_up_exps.weight", type_name, blocks, (3, 4, 256)))
    for expert in (0, 2):
        copied = repack(source, type_name, Storage(), expert, None)
        assert copied is not None and torch.equal(copied, blocks[4 * expert : 4 * expert + 4])
    with pytest.raises(BadInput, match=r"^blk\.0\.ffn_up_exps\.weight in .* in row 3 of expert 1"):
        repack(source, type_name, Storage(), 1, None)


@pytest.mark.parametrize(
    ("value", "reciprocal"), [(float("nan"), False), (float("inf"), False), (0.0, True), (float("inf"), True)]
)
def test_factor_of_a_whole_nvfp4_matrix_is_finite(tmp_path: Path, value: float, reciprocal: bool) -> None:
    parts = (
        stored(tmp_path, "codes", "U8", torch.zeros(2, 16, dtype=torch.uint8)),
        stored(tmp_path, "scale", "F8_E4M3", torch.zeros(2, 2, dtype=torch.uint8)),
        stored(tmp_path, "factor", "F32", torch.tensor([value])),
    )
    with pytest.raises(BadInput, match=r"^factor in .* expected a finite factor"):
        evaluate(Nvfp4(*parts, reciprocal=reciprocal), Storage())
