"""Reading blocks: equal to gguf-py and to ggml to the last bit, whatever the bytes."""

import ggml
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, quants
from moecast.errors import BadInput
from moecast.quant import dequantize, format_named

IN_GGUF = (
    "F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "TQ1_0",
    "TQ2_0", "MXFP4", "NVFP4", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ1_S", "IQ1_M", "IQ4_NL", "IQ4_XS",
)  # fmt: skip
IN_GGML_ONLY = ("Q1_0", "Q2_0")
pytestmark = pytest.mark.usefixtures("path")


def random_bytes(name: str, rows: int) -> np.ndarray:
    """Any bytes: all codes, scales of any sign and size, infinite and not a number among them."""
    return np.random.default_rng(0).integers(0, 256, (rows, format_named(name).block_bytes * 8), np.uint8)


def test_these_are_all_that_gguf_reads() -> None:
    assert {type.name for type in quants._type_traits} | {"F32", "F16"} == set(IN_GGUF)


@pytest.mark.parametrize("name", IN_GGUF)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_equals_gguf(name: str) -> None:
    data = random_bytes(name, 33)
    theirs = quants.dequantize(data, GGMLQuantizationType[name])
    ours = dequantize(data, name)
    assert ours.dtype == np.float32
    np.testing.assert_array_equal(ours, theirs)
    np.testing.assert_array_equal(np.signbit(ours[ours == 0]), np.signbit(theirs[theirs == 0]))
    np.testing.assert_array_equal(dequantize(torch.from_numpy(data), name).numpy(), ours)


@pytest.mark.parametrize("name", IN_GGML_ONLY)
def test_equals_ggml(name: str) -> None:
    data = random_bytes(name, 33)
    np.testing.assert_array_equal(dequantize(data, name), ggml.dequantize(data, name))


@pytest.mark.parametrize("name", (*IN_GGUF, *IN_GGML_ONLY))
def test_bfloat16_is_the_nearest(name: str) -> None:
    data = torch.from_numpy(random_bytes(name, 33))
    values = dequantize(data, name, type=torch.bfloat16)
    torch.testing.assert_close(values, dequantize(data, name).to(torch.bfloat16), rtol=0, atol=0, equal_nan=True)


def test_bad_input() -> None:
    data = np.zeros((1, 144), np.uint8)
    with pytest.raises(BadInput, match="I32 holds no weights to dequantize"):
        dequantize(data, "I32")
    with pytest.raises(BadInput, match="Q5_K rows are uint8 in multiples of 176 bytes, not 144"):
        dequantize(data, "Q5_K")
    with pytest.raises(BadInput, match=r"Q4_K rows are uint8 .* not 144 of torch.float32"):
        dequantize(data.astype(np.float32), "Q4_K")
