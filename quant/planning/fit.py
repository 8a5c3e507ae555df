"""Plans for the memory of a machine: what every token needs goes to the GPU, the experts to what is left.

llama.cpp keeps the embedding and, with `--n-cpu-moe N`, the experts of the first N layers in RAM; of a dense model the
first layers as a whole, where `--n-gpu-layers` says how many others leave. Besides weights it needs the state of a
context (KV cache, recurrent states) and room to compute in, both where the layers run.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
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
    """A plan for a machine, the bytes of state and of working memory beside it, layers whose experts stay in RAM.

    Those of a dense model stay there as a whole.
    """

    plan: Plan
    machine: Machine
    state_bytes: int
    working_bytes: int
    layers_in_ram: int

    @property
    def ram_bytes_per_token(self) -> float:
        """Bytes of weights that a token reads from RAM on average: of experts, or whole layers, that stay there."""
        graph, shares = self.plan.graph, self.plan.graph.active_shares()
        return sum(
            tensor.bytes * shares.get(tensor.weight.name, 1.0)
            for tensor in self.plan.tensors
            if not self.machine.vram or self._in_ram(tensor.weight, graph)
        )

    def _in_ram(self, weight: Weight, graph: Graph) -> bool:
        return weight.layer is not None and weight.layer < self.layers_in_ram and _may_be_slow(weight, graph)


def fit(graph: Graph, machine: Machine, damage: Damage, one_bit: bool = False, name: str = "fit") -> MachinePlan:
    """The plan of least damage for a machine's memory. Raises BadInput when the model cannot fit."""
    state, working = _beside_weights(graph, machine)
    ram = _for_weights(machine.ram)
    if machine.vram:
        states = _states(graph, machine.context)
        vram = _vram_for_weights(machine, working, state - sum(states.values()))
        types, layers = _split(graph, (ram, vram), states, damage, one_bit)
    else:
        budget = ram - state - working
        types = types_within(tuple(graph.weights()), budget, damage, graph.active_shares(), one_bit)
        layers = len(graph.layers)
    plan = plan_with(graph, types, name)
    expected = sum(damage.of(t.weight, t.type) for t in plan.tensors) if damage.measured else None
    return MachinePlan(replace(plan, expected_kld=expected), machine, state, working, layers)


def placed(plan: Plan, machine: Machine) -> MachinePlan | None:
    """A plan on a machine, None where it does not fit."""
    layers = layers_in_ram(plan, machine)
    return None if layers is None else MachinePlan(plan, machine, *_beside_weights(plan.graph, machine), layers)


def layers_in_ram(plan: Plan, machine: Machine) -> int | None:
    """How many layers' experts stay in RAM where a machine runs a plan, or of a dense model whole layers; None where it
    does not fit."""
    graph, types = plan.graph, {tensor.weight.name: tensor.type for tensor in plan.tensors}
    (state, working), ram = _beside_weights(graph, machine), _for_weights(machine.ram)
    if not machine.vram:
        return len(graph.layers) if plan.bytes + state + working <= ram else None
    states = _states(graph, machine.context)
    slow, fast = _slow_and_fast(graph)
    left = _vram_for_weights(machine, working, state - sum(states.values())) - _bytes(fast, types)
    on_gpu, in_ram = _place(graph, slow, types, states, left)
    return len(graph.layers) - on_gpu if left >= 0 and in_ram + _in_both(graph, types) <= ram else None


def _beside_weights(graph: Graph, machine: Machine) -> tuple[int, int]:
    """Bytes of state and of working memory."""
    state = graph.state_bytes_per_token() * machine.context + graph.fixed_state_bytes()
    return state, 4 * _BATCH * (graph.vocabulary_size + _WORKING_ROWS * graph.residual_size)


def _for_weights(ram: int) -> int:
    """What of a machine's RAM the model may take."""
    return ram - max(_RESERVE, ram // _RESERVE_SHARE)


def _vram_for_weights(machine: Machine, working: int, state: int) -> int:
    """What of a GPU's memory the weights may take beside working memory and the `state` that stays there."""
    return machine.vram - _GPU_RESERVE - working - state


def _in_both(graph: Graph, types: Mapping[str, Format]) -> int:
    """Bytes of RAM that an embedding takes which as the head is on the GPU too."""
    return _bytes([graph.embedding], types) if graph.tied else 0


def _states(graph: Graph, context: int) -> dict[int, int]:
    """Bytes of state that go where a layer goes: those of layers that stay in RAM as a whole."""
    if graph.experts:
        return {}
    return {
        layer.index: sum(op.state_bytes_per_token * context + op.fixed_state_bytes for op in layer.operations)
        for layer in graph.layers
    }


def _slow_and_fast(graph: Graph) -> tuple[list[Weight], list[Weight]]:
    """Weights that may stay in RAM, of which a token touches little, and those that belong on the GPU."""
    slow = [weight for weight in graph.weights() if _may_be_slow(weight, graph)]
    names = {weight.name for weight in slow}
    return slow, [weight for weight in graph.weights() if weight.name not in names]


def _split(
    graph: Graph, room: tuple[int, int], states: Mapping[int, int], damage: Damage, one_bit: bool
) -> tuple[dict[str, Format], int]:
    """Types by name, and how many layers' experts stay in RAM, or of a dense model whole layers.

    Args:
        room: bytes of RAM and of VRAM.
        states: bytes of state that go where a layer goes.
    """
    ram, vram = room
    slow, fast = _slow_and_fast(graph)
    shares = graph.active_shares()
    try:
        types = types_within(fast, vram, damage, shares, one_bit)
    except BadInput as error:
        raise BadInput(
            f"what every token needs does not fit into VRAM beside the context: {error}; ask for less --context"
        ) from None
    ram -= _in_both(graph, types)
    left = vram - _bytes(fast, types)
    low, high = (total - sum(states.values()) for total in (ram, ram + left))
    budget, found, refusal = low, None, BadInput("")
    for _ in range(1 + _ROUNDS):
        try:
            trial = types_within(slow, budget, damage, shares, one_bit)
        except BadInput as error:  # too little: more may fit, with layers on the GPU
            low, refusal = budget, error
        else:
            layers, in_ram = _place(graph, slow, trial, states, left)
            if in_ram > ram:
                high = budget
            else:
                low, found = budget, (types | trial, len(graph.layers) - layers)
        budget = (low + high) // 2
    if found is None:
        raise refusal
    return found


def _may_be_slow(weight: Weight, graph: Graph) -> bool:
    """Whether a weight may stay in RAM: an expert, or anything in a layer without any."""
    of_layers = weight.role in _EXPERTS if graph.experts else weight.layer is not None
    return of_layers or weight.role in (Role.EMBEDDING, Role.PER_LAYER_TABLE)


def _place(
    graph: Graph, slow: list[Weight], types: dict[str, Format], states: Mapping[int, int], room: int
) -> tuple[int, int]:
    """How many layers' experts or layers, from the last on, fit in `room` bytes, and the bytes of all others."""
    sizes = Counter(states)
    total = sum(states.values())
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


def _bytes(weights: list[Weight], types: Mapping[str, Format]) -> int:
    return sum(PlannedTensor(w, types[w.name], types[w.name]).aligned_bytes for w in weights)
