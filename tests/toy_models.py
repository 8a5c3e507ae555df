"""Toy models: graphs of any blocks over numbers of a test's choice, without an architecture."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import checkpoints
import torch
from moecast.archs.expressions import OnePlus, Read, TensorInfo
from moecast.archs.graph import MLP, Activation, Attention, Graph, Layer, MoE, Norm, Router, Score, SubLayer
from moecast.archs.registry import architectures
from moecast.archs.weights import Role, Weight
from moecast.convert.onepass import FileToWrite, run_pass
from moecast.convert.onnx.export import open_onnx_writer
from moecast.quant.planning.onnx_plan import plan_onnx
from moecast.quant.planning.recipes import recipe_named
from moecast.runner.engines import OnnxModel
from moecast.runner.settings import Compute
from moecast.runner.stream import Cache, Stream
from moecast.sources.checkpoint import read_tensors
from moecast.sources.model import Model
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

VOCABULARY = 288


class Toy:
    """Numbers in a folder, and blocks made of them. Names of weights are those of the tensors they read."""

    def __init__(self, folder: Path, tensors: Mapping[str, Tensor]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.tensors = {name: tensor.detach().float().contiguous().clone() for name, tensor in tensors.items()}
        save_file(self.tensors, folder / "model.safetensors")
        checkpoints.write_tokenizer(folder, VOCABULARY)
        self._stored: dict[str, TensorInfo] = {tensor.name: tensor for tensor in read_tensors(folder)}

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def weight(self, name: str, role: Role) -> Weight:
        return Weight(name, role, self._stored[name].shape, Read(self._stored[name]))

    def norm(self, name: str, epsilon: float = 1e-6, centered: bool = False, bias: str | None = None) -> Norm:
        return Norm(self.weight(name, Role.NORM), epsilon, centered, self.weight(bias, Role.NORM) if bias else None)

    def norm_around_one(self, name: str, epsilon: float = 1e-6) -> Norm:
        """Stored as the distance from one."""
        source = OnePlus(Read(self._stored[name]))
        return Norm(Weight(name, Role.NORM, source.shape, source), epsilon)

    def mlp(self, prefix: str, role: str = "DENSE", gate: str = "gate_proj") -> MLP:
        return MLP(
            gate=self.weight(f"{prefix}.{gate}.weight", Role[f"{role}_GATE"]),
            up=self.weight(f"{prefix}.up_proj.weight", Role[f"{role}_UP"]),
            down=self.weight(f"{prefix}.down_proj.weight", Role[f"{role}_DOWN"]),
            activation=Activation.SWIGLU,
        )

    def graph(self, layers: list[tuple[SubLayer, ...]], norm: Norm, head: str = "head", **facts: float) -> Graph:
        embedding = self.weight("embedding", Role.EMBEDDING)
        return Graph(
            architecture="toy",
            vocabulary_size=embedding.shape[0],
            hidden_size=embedding.columns,
            context_length=512,
            embedding=embedding,
            layers=tuple(Layer(index, sublayers) for index, sublayers in enumerate(layers)),
            final_norm=norm,
            head=self.weight(head, Role.HEAD),
            **facts,
        )

    def model(self, graph: Graph) -> Model:
        return Model(self.folder, architectures()[0], graph, (), {})


def random_tensors(seed: int, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Matrices of standard deviation 1/sqrt(fan in), norms and other vectors about one."""
    generator = torch.Generator().manual_seed(seed)

    def made(name: str, shape: tuple[int, ...]) -> Tensor:
        if len(shape) == 1:
            return 0.5 + torch.rand(shape, generator=generator)
        return torch.randn(shape, generator=generator) * (1.0 if name == "embedding" else shape[-1] ** -0.5)

    return {name: made(name, shape) for name, shape in shapes.items()}


def attention(toy: Toy, prefix: str, sizes: tuple[int, int, int], **others: object) -> Attention:
    """Of so many heads, key-value heads and values of a head, under transformers' names."""
    heads, key_value_heads, size = sizes
    own = others.get("keys_of") is None
    return Attention(
        heads=heads,
        key_value_heads=key_value_heads,
        head_size=size,
        query=toy.weight(f"{prefix}.q_proj.weight", Role.ATTENTION_Q),
        key=toy.weight(f"{prefix}.k_proj.weight", Role.ATTENTION_K) if own else None,
        value=toy.weight(f"{prefix}.v_proj.weight", Role.ATTENTION_V) if own else None,
        output=toy.weight(f"{prefix}.o_proj.weight", Role.ATTENTION_OUTPUT),
        **others,  # type: ignore[arg-type]
    )


def mixture(toy: Toy, prefix: str, top_k: int, score: Score = Score.SOFTMAX, **others: object) -> MoE:
    """Experts under stacked names, `others` of them for the router."""
    router = Router(toy.weight(f"{prefix}.gate.weight", Role.ROUTER), None, score, top_k, **others)  # type: ignore[arg-type]
    return MoE(
        router=router,
        gate=toy.weight(f"{prefix}.experts.gate", Role.EXPERT_GATE),
        up=toy.weight(f"{prefix}.experts.up", Role.EXPERT_UP),
        down=toy.weight(f"{prefix}.experts.down", Role.EXPERT_DOWN),
        activation=Activation.SWIGLU,
    )


def randomized(model: nn.Module) -> Any:
    """A model of transformers with numbers that tell weights apart: norms around one, products of about one."""
    model = model.float().eval()
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if "norm" in name:
                tensor.uniform_(0.5, 1.5)
            else:
                tensor.normal_(0, 1.0 if "embed" in name or "bias" in name else tensor.shape[-1] ** -0.5)
    return model


def toy_of(oracle: PreTrainedModel, folder: Path) -> Toy:
    """The numbers of a model of transformers; experts that it holds fused are apart."""
    state = {name.removeprefix("model."): tensor for name, tensor in oracle.state_dict().items()}
    state |= {"embedding": state["embed_tokens.weight"], "head": state["lm_head.weight"]}
    for name in [*state]:
        if name.endswith(".experts.gate_up_proj"):
            state |= split_experts(state, name.removesuffix(".experts.gate_up_proj"))
    return Toy(folder, state)


def logits_of(oracle: PreTrainedModel, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        logits: Tensor = oracle(tokens).logits
    return logits


def split_experts(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Gate, up and down of experts that transformers holds fused, gates first."""
    gate, up = state[f"{prefix}.experts.gate_up_proj"].chunk(2, dim=1)
    down = state[f"{prefix}.experts.down_proj"]
    return {f"{prefix}.experts.gate": gate, f"{prefix}.experts.up": up, f"{prefix}.experts.down": down}


def tokens_of(count: int, chunks: int = 2, seed: int = 0) -> Tensor:
    return torch.randint(0, VOCABULARY, (chunks, count), generator=torch.Generator().manual_seed(seed))


# Of 80 tokens: steps from the first one on, across the ends of windows of 17 and of 24 tokens, and after a long piece.
STEPS_AND_PIECES = [1, 1, 13, *[1] * 12, 50, *[1] * 3]


def logits_in_pieces(model: Model, tokens: Tensor, sizes: list[int]) -> Tensor:
    """[chunks, context] -> [chunks, context, vocabulary], some tokens at a time from the remembered states."""
    cache, parts = Cache(), []
    for part in tokens.split(sizes, dim=1):
        stream = Stream(model, part, cache)
        for layer in model.graph.layers:
            stream.advance(layer)
        parts.append(stream.logits(stream.final_states(slice(None))).view(*part.shape, -1))
    return torch.cat(parts, dim=1)


def onnx_of(model: Model, folder: Path) -> OnnxModel:
    """The same model as ONNX Runtime runs it in float32."""
    folder.mkdir()
    plan = plan_onnx(model.graph, recipe_named("F32"))
    with open_onnx_writer(model, plan, folder, "float32", overwrite=False, verify=True) as writer:
        run_pass(model, [FileToWrite(plan, writer)], compute=Compute(threads=1))
    return OnnxModel(folder, threads=1)
