"""What each weight's rounding does to the output, for all weights in one pass through the model.

Every weight has a probe: a lane that follows the reference up to the layer of its weight, runs that layer with the one
weight rounded coarsely, and goes on with the weights as they are. Probes share what is loaded, so that a pass reads
the model once. The KL divergence of a probe, divided by the error that caused it, is the weight's sensitivity.

Probes are coarse on purpose: small errors move tokens to other experts now and then, which costs more for each unit of
error than it does in a model in which everything is rounded and tokens move anyhow.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from statistics import median

import torch
from torch import Tensor

from ..archs.graph import Graph
from ..archs.weights import Weight
from ..quant.allocation import Damage, candidates, typical_damage
from ..quant.formats import format_named
from ..sources.model import Model, pieces
from ..sources.progress import Progress
from .evaluate import compare_heads, targets_of, with_bos
from .quantized import Importance, QuantizedWeights, Quantizer
from .stream import Stream, advance
from .weights import ModelWeights, Weights, multiply, multiply_groups

_COARSE = ("IQ2_XXS", "Q2_0", "Q4_0")  # the type of a probe: the first whose blocks fit
_TOKENS = 32  # of each expert, on which the errors of types are measured
_ROWS = 256  # of each matrix
_EXPERTS = 16  # of each stack, those with the most tokens
_LEAST_SENSITIVITY = 0.02  # of the role's median: noise may hide what little a weight matters


def measure_damage(
    model: Model, tokens: Tensor, importance: Importance | None, forms: Sequence[Graph], progress: Progress
) -> Damage:
    """Sensitivities and errors of all weights that may be quantised.

    Args:
        tokens: int64 [chunks, context] of calibration text; the second half of each chunk is scored.
        importance: what weights are rounded with.
        forms: the graphs that will be planned for; their types' errors are measured.

    Weights that this text does not reach get what is typical of their role.
    """
    source = ModelWeights(model)
    quantizer = Quantizer(source, importance)
    types = _types(forms, importance is not None)
    probed = {weight.name: _coarse(weight) for weight in model.graph.weights() if weight.name in types}
    own = {weight.name: weight for weight in model.graph.weights() if probed.get(weight.name)}
    errors = ErrorWeights(source, quantizer, {name: {*types[name], probed[name]} for name in own})
    inputs = with_bos(tokens, model.tokenizer)
    reference = Stream(model, inputs, weights=errors)
    embedding, head = model.graph.embedding, model.graph.head
    errors.note_embedding(embedding, inputs)
    probes: dict[str, Stream] = {}
    if embedding.name in own:
        rounded = QuantizedWeights(quantizer, {embedding.name: probed[embedding.name]})
        probes[embedding.name] = Stream(model, inputs, weights=rounded)
        probes[embedding.name].weights = source
    progress.begin("Measuring", len(model.graph.layers), "layers")
    for layer in model.graph.layers:
        here = [name for name, weight in own.items() if weight.layer == layer.index]
        for name in here:
            probes[name] = reference.fork(QuantizedWeights(quantizer, {name: probed[name]}))
        streams = [reference, *probes.values()]
        advance(streams, [layer] * len(streams))
        for name in here:
            probes[name].weights = source
        progress.advance(1, f"layer {layer.index}: {len(here)} weights")
    reference.weights = source
    if head.name in own:
        errors.note_head(head)
        probes[head.name] = reference.fork(QuantizedWeights(quantizer, {head.name: probed[head.name]}))
    divergences = compare_heads(reference, list(probes.values()), targets_of(tokens), tokens.shape[1])
    measured = errors.relative()
    sensitivity = {
        name: float(divergence.kld.mean()) / measured[name][probed[name]]
        for name, divergence in zip(probes, divergences, strict=True)
        if measured.get(name, {}).get(probed[name])
    }
    return _damage(model.graph, sensitivity, measured, probed)


def _types(forms: Sequence[Graph], importance: bool) -> dict[str, set[str]]:
    """By weight name, the types that it may take in any form, where there is a choice."""
    types: dict[str, set[str]] = {}
    for form in forms:
        for weight in form.weights():
            types.setdefault(weight.name, set()).update(format.name for format in candidates(weight, importance))
    return {name: names for name, names in types.items() if len(names) > 1}


def _coarse(weight: Weight) -> str:
    fitting = (name for name in _COARSE if format_named(name).fits(weight.columns))
    return next(fitting, _COARSE[0])  # rows are filled up where none fits


def _damage(
    graph: Graph, sensitivity: dict[str, float], errors: Mapping[str, Mapping[str, float]], probed: Mapping[str, str]
) -> Damage:
    typical = typical_damage(graph).sensitivity
    roles: dict[object, list[float]] = {}
    for weight in graph.weights():
        if weight.name in sensitivity:
            roles.setdefault(weight.role, []).append(sensitivity[weight.name])
    complete = {}
    for weight in graph.weights():
        usual = median(roles[weight.role]) if weight.role in roles else typical.get(weight.name, 0.0)
        complete[weight.name] = max(sensitivity.get(weight.name, usual), _LEAST_SENSITIVITY * usual)
    probe = {name: errors[name][type] for name, type in probed.items() if errors.get(name, {}).get(type)}
    return Damage(complete, errors, probe=probe, measured=True)


class ErrorWeights:
    """A source's weights, which measure on the inputs of `project` what rounding would do to its outputs.

    The relative squared error of a type is that of the products of some rows, some tokens and the busiest experts, so
    an expert counts by what it contributes.
    """

    def __init__(self, source: Weights, quantizer: Quantizer, types: Mapping[str, set[str]]) -> None:
        self.graph = source.graph
        self._source = source
        self._quantizer = quantizer
        self._types = types
        self._squares: dict[str, dict[str, float]] = {}
        self._seen: dict[str, set[int | None]] = {}

    def load(self, weight: Weight, expert: int | None = None, rows: tuple[int, int] | None = None) -> Tensor:
        return self._source.load(weight, expert, rows)

    def project(self, states: Tensor, weight: Weight, expert: int | None = None) -> Tensor:
        self._note(states, weight, expert)
        return multiply(states, self.load(weight, expert))

    def project_groups(self, states: Tensor, weight: Weight) -> Tensor:
        self._note(states.flatten(0, 1), weight, None)
        return multiply_groups(states, self.load(weight))

    def forget(self, expert: int | None = None) -> None:
        self._source.forget(expert)

    def relative(self) -> dict[str, dict[str, float]]:
        """By weight name and type, the squared error of the outputs over their square."""
        return {
            name: {type: error / squares[""] for type, error in squares.items() if type}
            for name, squares in self._squares.items()
            if squares[""]
        }

    def note_embedding(self, weight: Weight, tokens: Tensor) -> None:
        """Errors of the rows that the tokens look up, each as often as it is looked up."""
        if weight.name not in self._types:
            return
        counts = torch.bincount(tokens.flatten(), minlength=weight.shape[0])
        for _, rows in pieces(weight):
            assert rows
            used = torch.where(counts[rows[0] : rows[1]])[0][:: max(1, weight.shape[0] // (16 * _ROWS))]
            values = self.load(weight, None, rows)[used]
            shares = counts[rows[0] : rows[1]][used].sqrt()[:, None]
            self._add(weight, None, values, partial(torch.mul, shares))
            self.forget()

    def note_head(self, weight: Weight) -> None:
        """Errors of the rows themselves: what all logits have in common would not matter."""
        for _, rows in pieces(weight):
            self._add(weight, None, _some(self.load(weight, None, rows), _ROWS), torch.clone)
            self.forget()

    def _note(self, states: Tensor, weight: Weight, expert: int | None) -> None:
        seen = self._seen.setdefault(weight.name, set())
        if weight.name not in self._types or expert in seen or len(seen) >= _EXPERTS:
            return
        seen.add(expert)
        some = _some(states, _TOKENS) * (len(states) / min(len(states), _TOKENS)) ** 0.5
        matrix = _some(self.load(weight, expert), _ROWS)
        self._add(weight, expert, matrix, lambda rows: multiply(some, rows))

    def _add(self, weight: Weight, expert: int | None, matrix: Tensor, output: Callable[[Tensor], Tensor]) -> None:
        squares = self._squares.setdefault(weight.name, {"": 0.0})
        squares[""] += float(output(matrix).square().sum())
        for type in self._types[weight.name]:
            rounded = self._quantizer.round(matrix, weight, type, expert)
            squares[type] = squares.get(type, 0.0) + float(output(rounded - matrix).square().sum())


def _some(rows: Tensor, count: int) -> Tensor:
    """At most so many rows, evenly spread."""
    return rows[:: max(1, -(-len(rows) // count))]
