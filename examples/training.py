"""The training loop: AdamW for the weights, and what has routers use all experts."""

import math
import time
from collections.abc import Callable
from typing import Any

import torch
from architecture import Router
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel


def initialize(model: PreTrainedModel, seed: int) -> None:
    """Draws every matrix from a normal distribution of standard deviation 1/sqrt(fan-in); a look-up has a fan-in of 1.

    The libraries' default of 0.02 is made for widths of thousands; at widths of hundreds it leaves routed experts,
    three small factors in a row, with so little output that they never learn.
    """
    generator = torch.Generator().manual_seed(seed)
    embedding = model.get_input_embeddings().weight
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                fan_in = 1 if parameter is embedding else parameter.shape[-1]
                parameter.normal_(0.0, fan_in**-0.5, generator=generator)


BALANCING = 0.01  # the weight of `BalancingLoss`


class LoadBalancer:
    """Balances routers that have a selection bias (DeepSeek-V3 report, section 2.1.2; arXiv 2408.15664).

    After each step the selection bias of every expert that got more than its share of tokens falls by `rate`, and of
    every other rises by `rate`. The bias only takes part in choosing experts, never in weighing their outputs.
    """

    def __init__(self, routers: list[Router], rate: float = 1e-3) -> None:
        self.rate = rate
        self.loads: list[tuple[Tensor, Tensor]] = []
        for router in routers:
            if router.bias is not None:
                load = torch.zeros_like(router.bias)
                router.module.register_forward_hook(self._counter(router, load))
                self.loads.append((router.bias, load))

    @staticmethod
    def _counter(router: Router, load: torch.Tensor) -> Callable[[torch.nn.Module, object, Any], None]:
        def count(_module: torch.nn.Module, _inputs: object, outputs: Any) -> None:
            load.add_(torch.bincount(outputs[router.selected].flatten(), minlength=load.numel()))

        return count

    def step(self, scale: float) -> None:
        """Moves the biases by `rate * scale` against the load counted since the last step."""
        for bias, load in self.loads:
            bias.add_(torch.sign(load.mean() - load), alpha=self.rate * scale)
            load.zero_()


class BalancingLoss:
    """Balances routers that have none, each by itself (Switch Transformer, arXiv 2101.03961, equation 4).

    An expert's share of tokens times its probability, summed; 1 for a router that treats all experts alike.
    """

    def __init__(self, routers: list[Router]) -> None:
        self._losses: list[Tensor] = []
        for router in routers:
            if router.bias is None:
                router.module.register_forward_hook(self._adder(router))

    def _adder(self, router: Router) -> Callable[[torch.nn.Module, object, Any], None]:
        def add(_module: torch.nn.Module, _inputs: object, outputs: Any) -> None:
            probabilities = outputs[0].softmax(dim=-1).mean(dim=0)
            counts = torch.bincount(outputs[router.selected].flatten(), minlength=len(probabilities))
            self._losses.append(len(counts) * (counts / counts.sum() * probabilities).sum())

        return add

    def take(self) -> Tensor:
        """The sum over routers since the last call."""
        total = sum(self._losses, torch.zeros(()))
        self._losses.clear()
        return total


def train(
    model: PreTrainedModel,
    routers: list[Router],
    tokens: torch.Tensor,
    *,
    steps: int,
    batch: int,
    context: int,
    learning_rate: float,
    seed: int,
) -> None:
    """Trains on random windows of `context` + 1 tokens of `tokens` (int64 `[n]`), `batch` windows a step."""
    decayed = [parameter for parameter in model.parameters() if parameter.dim() >= 2]
    plain = [parameter for parameter in model.parameters() if parameter.dim() < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}],
        lr=learning_rate,
        betas=(0.9, 0.95),
    )
    warmup = min(100, steps // 10 + 1)
    balancer, balancing_loss = LoadBalancer(routers), BalancingLoss(routers)
    generator = torch.Generator().manual_seed(seed)
    offsets = torch.arange(context + 1)
    model.train()
    started = time.monotonic()
    for step in range(steps):
        # Warm-up, then a linear fall to zero, for the biases too: they must not jitter in the final model.
        scale = min((step + 1) / warmup, (steps - step) / (steps - warmup + 1))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * scale
        starts = torch.randint(len(tokens) - context, (batch, 1), generator=generator)
        windows = tokens[starts + offsets]
        logits = model(input_ids=windows[:, :-1], use_cache=False).logits
        loss = functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
        (loss + BALANCING * balancing_loss.take()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        balancer.step(scale)
        if step % 50 == 0 or step == steps - 1:
            seconds = time.monotonic() - started
            print(f"step {step:5d}  loss {loss.item():.4f}  {seconds:6.0f} s", flush=True)


@torch.no_grad()
def perplexity(model: PreTrainedModel, tokens: torch.Tensor, context: int = 512) -> float:
    """Perplexity per token over consecutive chunks of `context` tokens (int64 `[n]`); a chunk's first is not scored."""
    model.eval()
    chunks = tokens[: len(tokens) // context * context].view(-1, context)
    losses = [
        functional.cross_entropy(model(input_ids=chunk[None, :-1], use_cache=False).logits[0], chunk[1:])
        for chunk in chunks
    ]
    return math.exp(torch.stack(losses).double().mean().item())
