"""The llama.cpp binding against transformers and tokenizers, on a tiny MiniMax M2 written with gguf-py."""

from __future__ import annotations

import ctypes
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gguf
import numpy as np
import pytest
import torch
from llama import Engine, FloatArray, mean_divergence, perplexity, run_isolated
from llama_library import check_layout
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

if TYPE_CHECKING:
    from transformers import MiniMaxM2ForCausalLM

pytestmark = pytest.mark.numeric

TEXT = "".join(f"Fox {n} counts {37 * n} stars, isn't tired and calls it a naïve café.\n" for n in range(20))
BEGINNING, END = "<s>", "</s>"
HEAD, ROTARY, ROPE_BASE = 64, 32, 10000.0


@dataclass(frozen=True)
class Fixture:
    path: Path
    model: MiniMaxM2ForCausalLM
    tokenizer: Tokenizer

    def logits(self, tokens: list[int]) -> FloatArray:
        with torch.no_grad():
            output = self.model(torch.tensor([tokens])).logits[0]
        return np.asarray(output.numpy(), np.float32)


def train_tokenizer() -> Tokenizer:
    """A byte-level BPE like GPT-2's: two control tokens, 256 bytes, a few merges."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=288,
        special_tokens=[AddedToken(BEGINNING, special=True), AddedToken(END, special=True)],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    return tokenizer


def random_model(vocabulary: int) -> MiniMaxM2ForCausalLM:
    """16 experts, 2 layers, hidden size 256; weights large enough that every part moves the logits."""
    from transformers import MiniMaxM2Config, MiniMaxM2ForCausalLM

    torch.manual_seed(0)
    config = MiniMaxM2Config(
        vocab_size=vocabulary,
        hidden_size=256,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=HEAD,
        num_local_experts=16,
        num_experts_per_tok=4,
        max_position_embeddings=1024,
        bos_token_id=0,
        eos_token_id=1,
        rope_parameters={"rope_type": "default", "rope_theta": ROPE_BASE, "partial_rotary_factor": ROTARY / HEAD},
    )
    model: MiniMaxM2ForCausalLM = MiniMaxM2ForCausalLM(config).train(False)
    with torch.no_grad():
        for name, parameter in [*model.named_parameters(), *model.named_buffers()]:
            if name.endswith("norm.weight"):
                parameter.uniform_(0.5, 1.5)
            elif name.endswith("e_score_correction_bias"):
                parameter.normal_(0, 0.2)
            elif not name.endswith("inv_freq"):
                parameter.normal_(0, 0.1)
    return model


def write_gguf(path: Path, model: MiniMaxM2ForCausalLM, tokenizer: Tokenizer, leave_out: str = "") -> None:
    """The model in float32, with the names and keys of llama.cpp's minimax-m2, one key left out where asked."""
    config = model.config
    writer = gguf.GGUFWriter(path, "minimax-m2")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_expert_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(ROTARY)
    writer.add_rope_freq_base(ROPE_BASE)
    writer.add_expert_count(config.num_local_experts)
    writer.add_expert_used_count(config.num_experts_per_tok)
    writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)
    add_tokenizer(writer, tokenizer)
    if leave_out:
        del writer.kv_data[0][leave_out]
    for name, tensor in tensors(model):
        writer.add_tensor(name, tensor.detach().contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_tokenizer(writer: gguf.GGUFWriter, tokenizer: Tokenizer) -> None:
    vocabulary = tokenizer.get_vocab()
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    control, normal = gguf.TokenType.CONTROL, gguf.TokenType.NORMAL
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([control if token in (BEGINNING, END) else normal for token in tokens])
    writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_bos_token_id(vocabulary[BEGINNING])
    writer.add_eos_token_id(vocabulary[END])
    writer.add_add_bos_token(True)


def tensors(model: MiniMaxM2ForCausalLM) -> Iterator[tuple[str, torch.Tensor]]:
    yield "token_embd.weight", model.model.embed_tokens.weight
    yield "output_norm.weight", model.model.norm.weight
    yield "output.weight", model.lm_head.weight
    for number, layer in enumerate(model.model.layers):
        attention, experts = layer.self_attn, layer.mlp.experts
        gate, up = experts.gate_up_proj.chunk(2, dim=1)
        for name, tensor in {
            "attn_norm.weight": layer.input_layernorm.weight,
            "attn_q.weight": attention.q_proj.weight,
            "attn_k.weight": attention.k_proj.weight,
            "attn_v.weight": attention.v_proj.weight,
            "attn_output.weight": attention.o_proj.weight,
            "attn_q_norm.weight": attention.q_norm.weight,
            "attn_k_norm.weight": attention.k_norm.weight,
            "ffn_norm.weight": layer.post_attention_layernorm.weight,
            "ffn_gate_inp.weight": layer.mlp.gate.weight,
            "exp_probs_b.bias": layer.mlp.e_score_correction_bias,
            "ffn_gate_exps.weight": gate,
            "ffn_up_exps.weight": up,
            "ffn_down_exps.weight": experts.down_proj,
        }.items():
            yield f"blk.{number}.{name}", tensor


@pytest.fixture(scope="module")
def fixture(tmp_path_factory: pytest.TempPathFactory) -> Fixture:
    tokenizer = train_tokenizer()
    model = random_model(tokenizer.get_vocab_size())
    path = tmp_path_factory.mktemp("llama") / "tiny.gguf"
    write_gguf(path, model, tokenizer)
    return Fixture(path, model, tokenizer)


@pytest.fixture
def tokens(fixture: Fixture) -> list[int]:
    return fixture.tokenizer.encode(TEXT).ids[:200]


def test_logits_equal_those_of_transformers(fixture: Fixture, tokens: list[int]) -> None:
    expected = fixture.logits(tokens)
    with Engine(fixture.path) as engine:
        logits = engine.logits(tokens)
        assert engine.vocabulary == fixture.model.config.vocab_size
    assert logits.shape == expected.shape and logits.dtype == np.float32
    assert mean_divergence(expected, logits) < 1e-9
    assert mean_divergence(expected, np.roll(logits, 1, axis=0)) > 0.1, "the model is too dull to tell positions apart"


def test_each_call_starts_from_an_empty_cache(fixture: Fixture, tokens: list[int]) -> None:
    with Engine(fixture.path, context=len(tokens)) as engine:
        first = engine.logits(tokens)
        engine.logits(tokens[50:60])
        np.testing.assert_array_equal(engine.logits(tokens), first)


@pytest.mark.parametrize(
    ("options", "least", "most"),
    [
        ({"kv_type": "f16"}, 1e-9, 1e-5),
        ({"kv_type": "bf16"}, 1e-6, 1e-2),
        ({"flash_attention": True}, 1e-9, 1e-5),
        ({"kv_type": "q8_0", "flash_attention": True}, 1e-5, 1e-1),
        ({"threads": 2}, 0, 1e-9),
    ],
)
def test_options_reach_llama_cpp(
    fixture: Fixture, tokens: list[int], options: dict[str, Any], least: float, most: float
) -> None:
    """A coarser cache or another kernel changes the numbers, and only as much as its precision explains."""
    expected = fixture.logits(tokens)
    with Engine(fixture.path, **options) as engine:
        assert least <= mean_divergence(expected, engine.logits(tokens)) <= most


def test_tokenizes_like_the_tokenizers_library(fixture: Fixture) -> None:
    with Engine(fixture.path, vocab_only=True) as engine:
        assert engine.vocabulary == fixture.tokenizer.get_vocab_size()
        assert engine.bos_token == fixture.tokenizer.token_to_id(BEGINNING)
        assert engine.tokenize("", add_special=False) == []
        for text in (TEXT, " two  spaces\t\n\n", "émigré 東京 🦊", "a\0b"):
            expected = fixture.tokenizer.encode(text).ids
            assert engine.tokenize(text, add_special=False) == expected
            assert engine.tokenize(text, add_special=True) == [engine.bos_token, *expected]


def test_control_tokens_are_parsed_only_on_request(fixture: Fixture) -> None:
    with Engine(fixture.path, vocab_only=True) as engine:
        assert engine.tokenize(END, add_special=False, parse_special=True) == [fixture.tokenizer.token_to_id(END)]
        assert len(engine.tokenize(END, add_special=False)) == len(END)


def test_perplexity_equals_the_loss_of_transformers(fixture: Fixture) -> None:
    context = 96
    with Engine(fixture.path, context=context) as engine:
        tokens = engine.tokenize(TEXT, add_special=True)
        value, count = perplexity(engine, tokens, context)
    losses = []
    for start in range(0, len(tokens) // context * context, context):
        chunk = torch.tensor([tokens[start : start + context]])
        labels = chunk.clone()
        labels[:, : context // 2 + 1] = -100  # transformers shifts the labels: position j is predicted from j - 1
        chunk[0, 0] = tokens[0]  # BOS
        with torch.no_grad():
            losses.append(fixture.model(chunk, labels=labels).loss.item())
    assert len(losses) > 2 and len(tokens) % context
    assert count == len(losses) * (context // 2 - 1)
    assert value == pytest.approx(np.exp(np.mean(losses)), rel=1e-5)


def test_perplexity_needs_two_chunks(fixture: Fixture, tokens: list[int]) -> None:
    with Engine(fixture.path) as engine, pytest.raises(ValueError, match="199 tokens given, two chunks of 100"):
        perplexity(engine, tokens[:199], 100)


def test_isolated_run_gives_the_same_logits(fixture: Fixture, tokens: list[int]) -> None:
    with Engine(fixture.path, context=256) as engine:
        np.testing.assert_array_equal(run_isolated(fixture.path, tokens, context=256), engine.logits(tokens))


def test_isolated_run_survives_a_failed_assertion(fixture: Fixture, tokens: list[int], tmp_path: Path) -> None:
    """llama.cpp loads a MiniMax M2 that does not name its router's score function, and aborts when it is run."""
    path = tmp_path / "no-gating.gguf"
    write_gguf(path, fixture.model, fixture.tokenizer, leave_out="minimax-m2.expert_gating_func")
    with pytest.raises(RuntimeError, match=r"(?s)SIGABRT.*llama-graph\.cpp"):
        run_isolated(path, tokens)


def test_a_refused_file_raises_with_the_reason(
    fixture: Fixture, tokens: list[int], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    whole = fixture.path.read_bytes()
    missing_key = tmp_path / "missing-key.gguf"
    write_gguf(missing_key, fixture.model, fixture.tokenizer, leave_out="minimax-m2.block_count")
    text = tmp_path / "text.gguf"
    text.write_text("not a model")
    cut_header = tmp_path / "cut-header.gguf"
    cut_header.write_bytes(whole[:1000])
    cut_data = tmp_path / "cut-data.gguf"
    cut_data.write_bytes(whole[: len(whole) // 2])
    for path, reason in [
        (tmp_path / "absent.gguf", "No such file"),
        (text, "invalid magic"),
        (cut_header, "failed to read"),
        (cut_data, "not within the file bounds"),
        (missing_key, "key not found in model: minimax-m2.block_count"),
    ]:
        with pytest.raises(RuntimeError, match=f"cannot load {path}: .*{reason}"):
            Engine(path)
        with pytest.raises(RuntimeError, match=reason):
            run_isolated(path, tokens)
    assert capfd.readouterr() == ("", ""), "llama.cpp's log reached the terminal"


def test_bad_calls_are_refused(fixture: Fixture, tokens: list[int]) -> None:
    with Engine(fixture.path, context=64) as engine:
        with pytest.raises(ValueError, match="200 tokens given, from 1 to 64 fit"):
            engine.logits(tokens)
        with pytest.raises(ValueError, match="0 tokens given"):
            engine.logits([])
        with pytest.raises(RuntimeError, match=r"invalid token\[1\] = 288"):
            engine.logits([0, engine.vocabulary])
    with pytest.raises(ValueError, match="closed"):
        engine.logits(tokens[:10])
    with pytest.raises(ValueError, match="closed"):
        engine.tokenize("a", add_special=False)
    with Engine(fixture.path, vocab_only=True) as engine, pytest.raises(ValueError, match="vocab_only"):
        engine.logits(tokens)
    with pytest.raises(RuntimeError, match=r"cannot make a context .*quantized V cache requires flash_attn"):
        Engine(fixture.path, kv_type="q8_0")


def test_a_file_without_a_tokenizer_is_told(tmp_path: Path) -> None:
    """llama.cpp itself aborts when it is asked to tokenize with such a file."""
    writer = gguf.GGUFWriter(tmp_path / "none.gguf", "minimax-m2")
    writer.add_tokenizer_model("none")
    writer.add_vocab_size(100)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    with Engine(tmp_path / "none.gguf", vocab_only=True) as engine:
        assert (engine.vocabulary, engine.bos_token) == (100, None)
        with pytest.raises(ValueError, match="no tokenizer"):
            engine.tokenize("a", add_special=False)


def test_another_layout_is_an_error_and_not_a_crash() -> None:
    known = (("size", ctypes.c_int32, 512), ("scale", ctypes.c_float, -1.0))

    class Returned(ctypes.Structure):
        _fields_ = (("size", ctypes.c_int32), ("scale", ctypes.c_float), ("room", ctypes.c_uint64 * 2))

    check_layout(Returned(512, -1.0), known, "1.0")
    with pytest.raises(RuntimeError, match=r"llama.cpp 1.0, whose Returned .*\(scale is 0.0, not -1.0\)"):
        check_layout(Returned(512, 0.0), known, "1.0")
    longer = Returned(512, -1.0)
    longer.room[1] = 1
    with pytest.raises(RuntimeError, match="data behind the last field"):
        check_layout(longer, known, "1.0")
