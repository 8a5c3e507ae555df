"""Plans for the memory of a machine: what every token needs goes to the GPU, the experts to what is left.

llama.cpp keeps the embedding and, with `--n-cpu-moe N`, the experts of the first N layers in RAM. Besides weights it
needs the state of a context (KV cache, recurrent states) and room to compute in, both where the layers run.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace

from ...archs.graph import Graph
from ...archs.weights import Role, Weight
from ...errors import BadInput
from ..formats.table import Format
from .allocation import Damage, plan_with, types_within
from .plan import Plan, PlannedTensor

_EXPERTS = (Role.EXPERT_GATE, Role.EXPERT_UP, Role.EXPERT_DOWN)
_RESERVE = 2**30  # of RAM for everything else that runs, or a sixteenth of it if that is more
_RESERVE_SHARE = 16
_GPU_RESERVE = 2**29  # of VRAM for driver and fragments
_BATCH = 512  # tokens that llama.cpp computes at once
_WORKING_ROWS = 32  # hidden states of a batch that are alive at the same time, a cautious count
_ROUNDS = 6  # halvings: experts come in whole layers, so what fits on the GPU is found by trying


@dataclass(frozen=True)
class Machine:
    """Bytes of RAM and VRAM (0 without a GPU), and the context in tokens that has to fit too."""

    ram: int
    vram: int
    context: int


@dataclass(frozen=True)
class MachinePlan:
    """A plan for a machine, the bytes of state and of working memory beside it, layers whose experts stay in RAM."""

    plan: Plan
    machine: Machine
    state_bytes: int
    working_bytes: int
    layers_in_ram: int


def fit(graph: Graph, machine: Machine, damage: Damage, one_bit: bool = False, name: str = "fit") -> MachinePlan:
    """The plan of least damage for a machine's memory. Raises BadInput when the model cannot fit."""
    state, working = _beside_weights(graph, machine)
    ram = _for_weights(machine.ram)
    if machine.vram:
        types, layers = _split(graph, ram, machine.vram - _GPU_RESERVE - state - working, damage, one_bit)
    else:
        budget = ram - state - working
        types = types_within(tuple(graph.weights()), budget, damage, graph.active_shares(), one_bit)
        layers = len(graph.layers)
    plan = plan_with(graph, types, name)
    expected = sum(damage.of(t.weight, t.type) for t in plan.tensors) if damage.measured else None
    return MachinePlan(replace(plan, expected_kld=expected), machine, state, working, layers)


def layers_in_ram(plan: Plan, machine: Machine) -> int | None:
    """How many layers' experts stay in RAM where a machine runs a plan; None where it does not fit."""
    graph, types = plan.graph, {tensor.weight.name: tensor.type for tensor in plan.tensors}
    beside, ram = sum(_beside_weights(graph, machine)), _for_weights(machine.ram)
    if not machine.vram:
        return len(graph.layers) if plan.bytes + beside <= ram else None
    slow, fast = _slow_and_fast(graph)
    left = machine.vram - _GPU_RESERVE - beside - _bytes(fast, types)
    on_gpu, in_ram = _place(graph, slow, types, left)
    return len(graph.layers) - on_gpu if left >= 0 and in_ram <= ram else None


def _beside_weights(graph: Graph, machine: Machine) -> tuple[int, int]:
    """Bytes of state and of working memory."""
    state = graph.state_bytes_per_token() * machine.context + graph.fixed_state_bytes()
    return state, 4 * _BATCH * (graph.vocabulary_size + _WORKING_ROWS * graph.residual_size)


def _for_weights(ram: int) -> int:
    """What of a machine's RAM the model may take."""
    return ram - max(_RESERVE, ram // _RESERVE_SHARE)


def _slow_and_fast(graph: Graph) -> tuple[list[Weight], list[Weight]]:
    """Weights that may stay in RAM, of which a token touches little, and those that belong on the GPU."""
    slow = [weight for weight in graph.weights() if weight.role in _EXPERTS or weight.role is Role.EMBEDDING]
    names = {weight.name for weight in slow}
    return slow, [weight for weight in graph.weights() if weight.name not in names]


def _split(graph: Graph, ram: int, vram: int, damage: Damage, one_bit: bool) -> tuple[dict[str, Format], int]:
    """Types by name, and how many layers' experts stay in RAM."""
    slow, fast = _slow_and_fast(graph)
    shares = graph.active_shares()
    try:
        types = types_within(fast, vram, damage, shares, one_bit)
    except BadInput as error:
        raise BadInput(
            f"what every token needs does not fit into VRAM beside the context: {error}; ask for less --context"
        ) from None
    left = vram - _bytes(fast, types)
    low, high = ram, ram + left
    chosen = types_within(slow, low, damage, shares, one_bit)
    on_gpu, _ = _place(graph, slow, chosen, left)
    for _ in range(_ROUNDS):
        budget = (low + high) // 2
        trial = types_within(slow, budget, damage, shares, one_bit)
        layers, in_ram = _place(graph, slow, trial, left)
        if in_ram > ram:
            high = budget
        else:
            low, chosen, on_gpu = budget, trial, layers
    return types | chosen, len(graph.layers) - on_gpu


def _place(graph: Graph, slow: list[Weight], types: dict[str, Format], room: int) -> tuple[int, int]:
    """How many layers' experts, from the last on, fit in `room` bytes, and the bytes of all others."""
    sizes: Counter[int] = Counter()
    total = 0
    for weight in slow:
        size = _bytes([weight], types)
        total += size
        if weight.layer is not None:
            sizes[weight.layer] += size
    taken = layers = 0
    for layer in reversed(range(len(graph.layers))):
        if taken + sizes[layer] > room:
            break
        taken, layers = taken + sizes[layer], layers + 1
    return layers, total - taken


def _bytes(weights: list[Weight], types: dict[str, Format]) -> int:
    return sum(PlannedTensor(w, types[w.name], types[w.name]).aligned_bytes for w in weights)
