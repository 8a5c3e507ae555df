"""Tiny random checkpoints, built with transformers and written in the ways that real ones come."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

if TYPE_CHECKING:  # it takes seconds to import, and most tests do without
    from transformers import MiniMaxM2ForCausalLM

EXAMPLES = Path(__file__).parent.parent / "examples"
TEXT = EXAMPLES / "text" / "evaluation.txt"

# 16 experts so that no rule for 8 applies, top-k > 1, attention wider than the hidden size, half-rotated heads.
MINIMAX: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "rotary_dim": 32,
    "num_local_experts": 16,
    "num_experts_per_tok": 4,
    "max_position_embeddings": 2048,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
# Rows that no 256-element block divides, and FP8 blocks that are cut off at the edges.
MINIMAX_ODD = MINIMAX | {"hidden_size": 160, "intermediate_size": 96, "num_hidden_layers": 3}


def minimax_model(seed: int = 0, **overrides: Any) -> MiniMaxM2ForCausalLM:
    """A random model whose experts matter: matrices have standard deviation 1/sqrt(fan in), biases differ.

    As in trained models the residual is larger than what one block adds to it. Otherwise rounding of activations,
    which llama.cpp does, flips near ties in the router and says nothing about the file.
    """
    from transformers import MiniMaxM2Config, MiniMaxM2ForCausalLM

    torch.manual_seed(seed)
    model = MiniMaxM2ForCausalLM(MiniMaxM2Config(**(MINIMAX | overrides))).float().eval()
    randomize(model)
    return model


def randomize(model: torch.nn.Module) -> None:
    """Fill a model with numbers as `minimax_model` says."""
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if name.endswith("e_score_correction_bias"):
                tensor.normal_(0, 0.1)
            elif name.endswith("norm.bias"):
                tensor.normal_(0, 0.3)
            elif "norm" in name:
                tensor.uniform_(0.5, 1.5)
            elif "embed_tokens" in name:
                tensor.normal_()
            elif "o_proj" in name or "down_proj" in name:
                tensor.normal_(0, 0.25 * tensor.shape[-1] ** -0.5)
            elif "inv_freq" not in name:
                tensor.normal_(0, tensor.shape[-1] ** -0.5)


def save_minimax(folder: Path, model: MiniMaxM2ForCausalLM, in_memory_names: bool = False) -> Path:
    """As transformers saves it: no scoring_func in the config, one safetensors file."""
    model.save_pretrained(folder, save_original_format=not in_memory_names)
    write_tokenizer(folder, model.config.vocab_size)
    return folder


def save_minimax_fp8(folder: Path, model: MiniMaxM2ForCausalLM, shards: int = 3) -> MiniMaxM2ForCausalLM:
    """As the Hub has it: FP8 blocks with float32 scales, float32 router, several shards whose names count from 0.

    Returns the model with the weights that the file now holds.
    """
    from transformers import MiniMaxM2ForCausalLM

    save_minimax(folder, model)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    stored: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        if "_proj.weight" in name or ".experts." in name:
            stored[name], scale = to_fp8_blocks(tensor)
            stored[f"{name}_scale_inv"] = scale
            tensors[name] = from_fp8_blocks(stored[name], scale)
        else:
            stored[name] = tensor.clone()
    write_sharded(folder, stored, shards)
    edit_config(folder, scoring_func="sigmoid", use_qk_norm=True, qk_norm_type="per_layer", use_routing_bias=True)
    edit_config(folder, quantization_config={"quant_method": "fp8", "weight_block_size": [128, 128]})
    reference = MiniMaxM2ForCausalLM(model.config).float().eval()
    reference.load_state_dict(_in_memory(model, tensors))
    return reference


def _in_memory(model: MiniMaxM2ForCausalLM, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Hub names to those of the model in memory, where the experts of a layer are fused."""
    state: dict[str, torch.Tensor] = {}
    for name in model.state_dict():
        prefix = name.replace(".mlp.", ".block_sparse_moe.")
        experts = range(model.config.num_local_experts)
        if name.endswith("experts.gate_up_proj"):
            stem = prefix.removesuffix("gate_up_proj")
            pairs = ((tensors[f"{stem}{e}.w1.weight"], tensors[f"{stem}{e}.w3.weight"]) for e in experts)
            state[name] = torch.stack([torch.cat(pair) for pair in pairs])
        elif name.endswith("experts.down_proj"):
            stem = prefix.removesuffix("down_proj")
            state[name] = torch.stack([tensors[f"{stem}{e}.w2.weight"] for e in experts])
        else:
            state[name] = tensors[prefix]
    return state


def to_fp8_blocks(matrix: torch.Tensor, block: int = 128) -> tuple[torch.Tensor, torch.Tensor]:
    """E4M3 codes and one float32 multiplier for every block, the last ones cut off at the edges."""
    rows, columns = matrix.shape
    scales = torch.zeros(-(-rows // block), -(-columns // block))
    codes = torch.zeros(rows, columns, dtype=torch.float8_e4m3fn)
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            part = (slice(i * block, (i + 1) * block), slice(j * block, (j + 1) * block))
            scales[i, j] = matrix[part].abs().max() / 448
            codes[part] = (matrix[part] / scales[i, j]).to(torch.float8_e4m3fn)
    return codes, scales


def from_fp8_blocks(codes: torch.Tensor, scales: torch.Tensor, block: int = 128) -> torch.Tensor:
    expanded = scales.repeat_interleave(block, 0).repeat_interleave(block, 1)
    return codes.float() * expanded[: codes.shape[0], : codes.shape[1]]


def write_sharded(folder: Path, tensors: dict[str, torch.Tensor], shards: int) -> None:
    """Splits anywhere, so that layers straddle files; names count from 0 with a wrong total, as real ones do."""
    names = sorted(tensors)
    weight_map = {}
    for shard in range(shards):
        file = f"model-{shard:05d}-of-{shards + 4:05d}.safetensors"
        part = names[shard * len(names) // shards : (shard + 1) * len(names) // shards]
        save_file({name: tensors[name].contiguous() for name in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def edit_config(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def copied(folder: Path, to: Path) -> Path:
    """A copy that a test may damage."""
    shutil.copytree(folder, to)
    return to


def write_tokenizer(folder: Path, vocabulary_size: int) -> None:
    """A byte-level BPE tokenizer trained on the evaluation text, with the whole vocabulary in use."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        special_tokens=["]~!b[", "[e~["],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_lines(), trainer)
    assert tokenizer.get_vocab_size() == vocabulary_size
    tokenizer.save(str(folder / "tokenizer.json"))
    special = {"bos_token": "]~!b[", "eos_token": "[e~[", "add_bos_token": False, "chat_template": "{{ messages }}"}
    (folder / "tokenizer_config.json").write_text(json.dumps(special))


def _lines() -> Iterator[str]:
    yield from TEXT.read_text(encoding="utf-8").splitlines(keepends=True)
