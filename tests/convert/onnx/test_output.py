"""What ONNX Runtime and onnxruntime-genai make of our ONNX folders."""

from __future__ import annotations

import json
from pathlib import Path

import onnx
import onnxruntime
import onnxruntime_genai
import pytest
import torch
from checkpoints import EXAMPLES, TEXT
from conftest import Checkpoint
from conversions import convert
from forward import relative_error, runner_logits
from moecast.runner.generate import generate
from moecast.runner.measure.evaluate import parity, perplexity
from moecast.runner.settings import Evaluation
from moecast.sources.model import open_model
from onnx_models import Cast, cast, onnx_logits
from trained_examples import evaluation_chunks

pytestmark = pytest.mark.numeric

EXACT, ROUNDED = 1e-5, 3e-2  # relative errors of logits: float32 activations, and activations of 8 bits
FOR_GENAI = ("minimax-m2-tiny", "nemotron-3-tiny")
MODELS = (*FOR_GENAI, "deepseek-v4-tiny")
PROMPT, COUNT = "And the Lord said", 24


@pytest.fixture(scope="module", params=MODELS)
def example(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Cast:
    return cast(EXAMPLES / request.param, tmp_path_factory.mktemp("onnx"))


def _tokens(vocabulary: int, count: int = 48) -> torch.Tensor:
    return torch.randint(vocabulary, (count,), generator=torch.Generator().manual_seed(0))


def test_float_model_is_transformers(minimax: Checkpoint, tmp_path: Path) -> None:
    tokens = _tokens(minimax.oracle.config.vocab_size)
    with torch.no_grad():
        expected = minimax.oracle(tokens[None]).logits[0]
    engine = cast(minimax.folder, tmp_path, "F32").engine()
    assert relative_error(onnx_logits(engine, tokens), expected) < EXACT


@pytest.mark.parametrize(("quant", "activations", "tolerance"), [
    ("Q4_0", "float32", EXACT), ("Q3_K_S", "float32", EXACT), ("Q4_0", "int8", ROUNDED), ("Q8_0", "int8", ROUNDED),
    ("Q6_K", "int8", ROUNDED), ("Q5_0", "int8", ROUNDED), ("Q2_0", "int8", ROUNDED),
])  # fmt: skip
def test_same_numbers_as_the_gguf_of_its_plan(
    minimax: Checkpoint, tmp_path: Path, quant: str, activations: str, tolerance: float
) -> None:
    result = cast(minimax.folder, tmp_path, quant, activations)
    tokens = _tokens(minimax.oracle.config.vocab_size)
    expected = runner_logits(open_model(result.gguf), tokens[None])[0]
    assert relative_error(onnx_logits(result.engine(), tokens), expected) < tolerance


def test_example_computes_what_its_weights_say(example: Cast) -> None:
    model = open_model(example.gguf)
    tokens = _tokens(model.graph.vocabulary_size)
    found = onnx_logits(example.engine(), tokens)
    assert relative_error(found, runner_logits(model, tokens[None])[0]) < EXACT


@pytest.mark.parametrize("name", MODELS)
def test_rounded_activations_stay_near(name: str, tmp_path: Path) -> None:
    """As a folder is made by default. Left out are the few tokens in which a router chooses another expert."""
    result = cast(EXAMPLES / name, tmp_path, "Q4_0", "int8")
    tokens = evaluation_chunks(EXAMPLES / name)[0, :256]
    expected = runner_logits(open_model(result.gguf), tokens[None])[0]
    errors = (onnx_logits(result.engine(), tokens) - expected).norm(dim=1) / expected.norm(dim=1)
    assert errors.quantile(0.8) < ROUNDED


@pytest.mark.parametrize("pieces", [1, 7])
def test_pieces_of_a_text_are_the_whole_text(example: Cast, pieces: int) -> None:
    engine = example.engine()
    tokens = _tokens(engine.vocabulary_size)
    assert relative_error(onnx_logits(engine, tokens, pieces), onnx_logits(engine, tokens)) < EXACT


def test_mapped_weights_give_the_same_logits(example: Cast) -> None:
    tokens = _tokens(example.engine().vocabulary_size)
    found = onnx_logits(example.engine(low_memory=True), tokens)
    assert relative_error(found, onnx_logits(example.engine(), tokens)) < EXACT


def test_model_passes_the_checker(example: Cast) -> None:
    """Shapes and types follow through the whole graph, as far as the checker knows the operators."""
    onnx.checker.check_model(example.folder / "model.onnx", full_check=True)
    model = onnx.load(example.folder / "model.onnx", load_external_data=False)
    assert model.ir_version == 11
    assert {entry.domain: entry.version for entry in model.opset_import} == {"": 24, "com.microsoft": 1}


def test_runtime_knows_the_shape_of_what_passes_between_layers(example: Cast) -> None:
    """Where it does not, it looks for memory to use again among all buffers: minutes before a deep model is loaded."""
    model = onnx.load(example.folder / "model.onnx")
    norms = [node.output[0] for node in model.graph.node if node.op_type == "RMSNormalization" and len(node.input) > 1]
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in norms)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    shapes = {port.name: port.shape for port in session.get_outputs()}
    hidden = [shapes[name] for name in norms if shapes[name][-1] == example.plan.graph.hidden_size]
    assert len(hidden) > len(example.plan.graph.layers)
    assert all(shape[:2] == ["batch", "sequence"] for shape in hidden)


def test_files_are_as_large_as_planned(example: Cast) -> None:
    sizes = {name: (example.folder / name).stat().st_size for name in example.plan.files}
    assert sizes == example.plan.files and sum(sizes.values()) == example.plan.bytes
    arrays = [array for placement in example.plan.placements.values() for array in placement.arrays]
    assert all(array.offset % 4096 == 0 for array in arrays)
    assert sum(map(example.plan.bytes_of, example.plan.tensors)) == sum(
        {array: array.bytes for array in arrays}.values()
    )


def test_continues_a_text_as_our_runner_does(example: Cast) -> None:
    found, expected = (list(generate(model, PROMPT, COUNT)) for model in (example.engine(), open_model(example.gguf)))
    assert found == expected


@pytest.mark.parametrize("example", FOR_GENAI, indirect=True)
def test_genai_continues_a_text_as_we_do(example: Cast) -> None:
    model = onnxruntime_genai.Model(str(example.folder))
    tokenizer = onnxruntime_genai.Tokenizer(model)
    ids = tokenizer.encode(PROMPT)
    parameters = onnxruntime_genai.GeneratorParams(model)
    parameters.set_search_options(max_length=len(ids) + COUNT, do_sample=False)
    generator = onnxruntime_genai.Generator(model, parameters)
    generator.append_tokens(ids)
    while not generator.is_done():
        generator.generate_next_token()
    expected = tokenizer.decode(generator.get_sequence(0)[len(ids) :])
    assert "".join(generate(example.engine(), PROMPT, COUNT)) == expected


@pytest.mark.parametrize("example", ["deepseek-v4-tiny"], indirect=True)
def test_no_settings_for_genai_where_it_lacks_the_states(example: Cast) -> None:
    assert not (example.folder / "genai_config.json").exists()


def test_drawn_text_repeats_with_its_seed(example: Cast) -> None:
    texts = ["".join(generate(example.engine(), "And", 24, temperature=1.0, seed=seed)) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_parity_reads_onnx_folders_on_either_side(example: Cast) -> None:
    """The GGUF file and the ONNX folder of a plan are the same distance from the source, and none from each other."""
    same = parity(example.gguf, example.folder, Evaluation(TEXT, 64, 2))
    assert abs(same.mean_kld) < 1e-6 and same.top1_agreement == 1 and same.layer_errors == ()
    far = [parity(example.checkpoint, model, Evaluation(TEXT, 64, 2)) for model in (example.gguf, example.folder)]
    assert far[0].mean_kld == pytest.approx(far[1].mean_kld, rel=1e-3) and far[0].mean_kld > 1e-3
    assert far[0].perplexity_candidate == pytest.approx(far[1].perplexity_candidate, rel=1e-6)
    found = perplexity(example.folder, Evaluation(TEXT, 64, 2))
    assert found.perplexity == pytest.approx(perplexity(example.gguf, Evaluation(TEXT, 64, 2)).perplexity, rel=1e-6)
    assert found.perplexity == pytest.approx(far[1].perplexity_candidate, rel=1e-9)


@pytest.mark.whole
def test_convert_makes_a_folder_that_stands_alone(minimax: Checkpoint, tmp_path: Path) -> None:
    quick = {"context": 64, "chunks": 2, "calibration_chunks": 2, "threads": 1}
    result = convert(minimax.folder, tmp_path, file_format="onnx", file=TEXT, **quick)
    folder = tmp_path / f"{minimax.folder.name}-Q4_0-onnx"
    assert result.files[0] == folder / "model.onnx" and {*result.files} == {*folder.iterdir()}
    assert result.bytes == sum(file.stat().st_size for file in folder.iterdir())
    assert result.parity and 0 < result.parity.mean_kld < 0.1
    assert (folder / "tokenizer.json").read_bytes() == (minimax.folder / "tokenizer.json").read_bytes()
    description = json.loads((folder / "moecast.json").read_text())
    assert description["quant"] == "Q4_0" and len(description["states"]) == 2 * 2
