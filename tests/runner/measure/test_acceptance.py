"""How many drafted tokens a model accepts: what llama.cpp's drafts and its speculative decoding come to."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import deepseek_checkpoints
import deltanet_checkpoints as deltanet
import llama_drafts
import pytest
import torch
from click.testing import CliRunner
from conversions import convert
from forward import random_tokens
from moecast.cli import main
from moecast.errors import BadInput
from moecast.runner.activations import Workspace
from moecast.runner.drafts import MultiTokenPrediction, most_probable
from moecast.runner.generate import engine_of
from moecast.runner.measure.acceptance import acceptance
from moecast.runner.settings import Evaluation
from moecast.runner.stream import Stream
from moecast.runner.weights import ModelWeights
from moecast.sources.model import Model, open_model
from safetensors.torch import load_file, save_file
from torch import Tensor

pytestmark = pytest.mark.numeric

CONTEXT, PROMPT, MOST = 64, 24, 3


@dataclass(frozen=True)
class Given(Evaluation):
    """Tokens in place of a text."""

    ids: Tensor | None = None

    def tokens(self, tokenizer: object) -> Tensor:
        assert self.ids is not None
        return self.ids


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of a model that mostly says what follows a token in a table, as its block does."""
    root = tmp_path_factory.mktemp("acceptance")
    model = deltanet.model_of("qwen3_5")
    with torch.no_grad():
        table = torch.randperm(512, generator=torch.Generator().manual_seed(3))
        model.lm_head.weight.copy_(model.model.embed_tokens.weight[table] / 16)
    deltanet.save_published(root / "model", model)
    for file in (root / "model").glob("*.safetensors"):
        tensors = load_file(file)
        for name, tensor in tensors.items():
            if name == "mtp.fc.weight":
                tensor.copy_(torch.cat((torch.eye(256), 1.1 * torch.eye(256)), dim=1))
            elif name in ("mtp.pre_fc_norm_embedding.weight", "mtp.pre_fc_norm_hidden.weight"):
                tensor.zero_()
            elif name == "mtp.norm.weight":
                tensor.copy_(model.model.norm.weight)
        save_file(tensors, file)
    return convert(root / "model", root, "F32", calibration=None, verify=False).files[0]


def _continued(model: Model, prompt: list[int]) -> list[int]:
    """With the most probable token every time."""
    engine, ids, last = engine_of(model, CONTEXT), [*prompt], prompt
    while len(ids) < CONTEXT:
        last = [int(engine(torch.tensor(last)).argmax())]
        ids += last
    return ids


def test_counts_are_those_of_llamas_drafts(path: Path) -> None:
    """Of a text that the model might have written, with other tokens here and there."""
    model = open_model(path)
    tokens = torch.tensor([_continued(model, prompt) for prompt in random_tokens(2, 24).tolist()])
    tokens[:, 0] = model.tokenizer.bos or 0
    tokens[:, 11::13] = 7
    found = acceptance(model, None, MOST, Given(context=CONTEXT, ids=tokens))
    places = [(chunk, place) for chunk in range(2) for place in range(CONTEXT // 2, CONTEXT - MOST + 1, MOST)]
    theirs = llama_drafts.run_isolated(path, path, [tokens[chunk, : last + 1].tolist() for chunk, last in places], MOST)
    (whole, other) = llama_drafts.run_isolated(path, path, tokens.tolist(), 1)
    said = [text.model.argmax(axis=1) for text in (whole, other)]
    drafts, accepted = [0] * MOST, [0] * MOST
    for (chunk, last), draft in zip(places, theirs, strict=True):
        for step in range(MOST):
            drafts[step] += 1
            if draft.tokens[step] != said[chunk][last + step]:
                break
            accepted[step] += 1
            if draft.tokens[step] != tokens[chunk, last + step + 1]:
                break
    assert [(token.drafts, token.accepted) for token in found.tokens] == [*zip(drafts, accepted, strict=True)]
    assert 0 < accepted[-1] <= drafts[-1] < accepted[0] < drafts[0]
    first, second, third = (count / all_of_them for count, all_of_them in zip(accepted, drafts, strict=True))
    assert found.tokens_per_pass == pytest.approx(1 + first + first * second + first * second * third)


def test_speculative_decoding(path: Path) -> None:
    """llama.cpp's server drafts and accepts as many tokens of its answer as our drafts of it let expect."""
    xllamacpp = pytest.importorskip("xllamacpp")
    model, prompt = open_model(path), random_tokens(1, PROMPT)[0].tolist()
    text = _continued(model, prompt)
    settings = xllamacpp.CommonParams()
    settings.model.path, settings.n_ctx, settings.n_parallel, settings.warmup = str(path), 256, 1, False
    settings.n_gpu_layers, settings.no_extra_bufts, settings.load_mtp = 0, True, True
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = 1
    settings.speculative.types = [xllamacpp.common_speculative_type.COMMON_SPECULATIVE_TYPE_DRAFT_MTP]
    settings.speculative.draft.n_max = MOST
    request = {"prompt": prompt, "n_predict": CONTEXT - PROMPT, "temperature": 0, "cache_prompt": False}
    timings = xllamacpp.Server(settings).handle_completions({**request, "ignore_eos": True})["timings"]
    stream = Stream(model, torch.tensor([text]))
    for layer in model.graph.layers:
        stream.advance(layer)
    assert model.draft
    places = range(PROMPT, CONTEXT)
    drafting = MultiTokenPrediction(model.draft, ModelWeights(model.draft), stream, places, Workspace())
    drafts: list[Tensor] = []
    for _ in range(MOST):
        if drafts:
            drafting.take(drafts[-1])
        drafts.append(most_probable(*drafting.states()))
    place, drafted, accepted = PROMPT, 0, 0
    while place < CONTEXT - 1:
        here = [int(step[0, place - PROMPT]) for step in drafts][: CONTEXT - 2 - place]
        right = next((n for n, token in enumerate(here) if token != text[place + 1 + n]), len(here))
        drafted, accepted, place = drafted + len(here), accepted + right, place + right + 1
    assert timings["predicted_n"] == CONTEXT - PROMPT
    assert (timings["draft_n"], timings["draft_n_accepted"]) == (drafted, accepted)


def test_command(path: Path) -> None:
    """The same figures as JSON; a table where there is none of that."""
    arguments = ["parity", str(path), "--draft", "-c", "64", "--chunks", "2"]
    result = CliRunner().invoke(main, [*arguments, "--tokens", "2", "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    expected = acceptance(open_model(path), None, 2, Evaluation(context=64, chunks=2))
    assert found["tokens_per_pass"] == expected.tokens_per_pass
    assert [(one["accepted"], one["reached"]) for one in found["tokens"]] == [
        (token.accepted, reached) for token, reached in zip(expected.tokens, expected.reached, strict=True)
    ]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0 and "Tokens that a pass of the model says" in result.stdout


@pytest.mark.slow
def test_a_draft_with_a_file_of_its_own(tmp_path: Path) -> None:
    """The checkpoint's and the file's count alike, in blocks and one by one; a draft of another model is refused."""
    files, few = {}, Evaluation(context=40, chunks=2)
    for name, add in (("blocks", deepseek_checkpoints.add_blocks), ("one", deepseek_checkpoints.add_draft)):
        deepseek_checkpoints.save_deepseek_hub(tmp_path / name, deepseek_checkpoints.deepseek_model())
        add(tmp_path / name)
        files[name] = convert(tmp_path / name, tmp_path, "F32", calibration=None, verify=False, mtp=True).files
        found = acceptance(files[name][0], files[name][1], 5, few)
        assert found == acceptance(tmp_path / name, None, 5, few)
        assert found.tokens[0].drafts == 2 * 4 and len(found.tokens) == 5
        assert (found.tokens[0].confidence is None) == (name == "one")
    model, draft = files["blocks"]
    with pytest.raises(BadInput, match="--tokens is 6, expected at most 5: so long is a draft's block"):
        acceptance(model, draft, 6)
    with pytest.raises(BadInput, match="holds layers and no draft"):
        acceptance(model, model)
    with pytest.raises(BadInput, match="architecture is 'dflash', expected one of"):
        acceptance(draft)
    with pytest.raises(BadInput, match="holds no first layer: it is a draft that runs beside its model only"):
        acceptance(files["one"][1])


def test_what_cannot_be_measured(path: Path, tmp_path: Path) -> None:
    model = open_model(path)
    with pytest.raises(BadInput, match="--context is 4, expected at least 6 for drafts of 3 tokens"):
        acceptance(model, evaluation=Evaluation(context=4))
    plain = convert(path.parent / "model", tmp_path, "F32", calibration=None, verify=False, mtp=False).files[0]
    with pytest.raises(BadInput, match="has no block that drafts tokens"):
        acceptance(plain)
    with pytest.raises(BadInput, match="drafts of qwen35 have no file of their own, leave it out"):
        acceptance(path, path)
