"""Probes: the KL divergence that rounding one weight causes, for all weights in one pass through the model.

Every weight has a probe: a stream that follows the reference up to the layer of its weight, runs that layer with the
one weight rounded coarsely, and goes on with the weights as they are. In a model of many layers a probe rounds the
same weight of several layers, and they share its sensitivity. Probes share what is loaded, so that a pass
reads the model once. The KL divergence of a probe, divided by the error that caused it, is the sensitivity.
Tokens that the model expects count for more, as calibration text may be of a kind that it was never trained on, and
roots are averaged, because which few tokens an error sends to another expert is chance.

Probes are coarse on purpose: small errors move tokens to other experts now and then, which costs more for each unit
of error than it does in a model in which everything is rounded and tokens move anyhow.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from statistics import median

from torch import Tensor

from ...archs.graph import Graph, weights_in
from ...archs.weights import Weight
from ...quant.formats.table import format_named
from ...quant.planning.allocation import Damage, allowed_types, typical_damage
from ..passes import REFERENCE, LayerPass, Measuring, packed, unpacked
from ..stream import Stream
from .evaluate import compare_heads
from .rounded import Quantizer, RoundedWeights
from .rounding_error import ErrorWeights

_COARSE, _COARSE_SHORT_ROWS = "IQ2_XXS", "Q2_0"  # the type of a probe, where blocks of 256 fit and where they do not
_GROUPS = 16  # of consecutive layers, at most: each role has a probe in each
_LEAST_SENSITIVITY = 0.02  # of the role's median: noise may hide what little a weight matters


def measure_damage(measuring: Measuring, tokens: Tensor, forms: Sequence[Graph]) -> Damage:
    """Sensitivities and errors of all weights that may be quantized.

    Args:
        tokens: int64 [chunks, context], on which probes run; the second half of each chunk is scored.
        forms: the graphs that will be planned for; their types' errors are measured.

    Weights that this text does not reach get what is usual in their role.
    """
    graph, progress = measuring.model.graph, measuring.progress
    source = measuring.weights()
    layer_pass, statistics, importance = measuring.begin(source)
    quantizer = Quantizer(source, importance)
    types = types_of(forms, measuring.wants_importance)
    probed = {weight.name: _coarse(weight) for weight in graph.weights() if weight.name in types}
    errors = ErrorWeights(source, quantizer, {name: {*types[name], probed[name]} for name in probed})
    reference = layer_pass.begin(REFERENCE, tokens, errors)
    probes = _Probes(layer_pass, reference, quantizer, probed)
    if layer_pass.facts is not None:
        errors.squares = unpacked(layer_pass.facts)
    elif graph.embedding.name in probed and not graph.tied:
        errors.note_embedding(reference.tokens)
    probes.begin(graph.embedding)
    probes.leave(None)
    progress.begin("Measuring", len(graph.layers), "layers", layer_pass.passed)
    for layer in graph.layers:
        done = layer_pass.is_done(layer.index)
        for weight in weights_in(layer):
            probes.begin(weight, done)
        if not done:
            layer_pass.advance([layer] * len(layer_pass.streams))
            statistics.clear()
        probes.leave(layer.index)
        if not done:
            layer_pass.save(layer.index, packed(errors.squares))
            progress.advance(1, f"layer {layer.index}: {len(probes.streams)} of {len(probes.groups)} probes")
    measuring.end(layer_pass, statistics)
    if graph.head.name in probed:
        errors.note_head(reference)
    probes.begin(graph.head)
    measured = errors.relative()
    divergences = compare_heads(reference, list(probes.streams.values()), tokens)
    sensitivity: dict[str, float] = {}
    for key, divergence in zip(probes.streams, divergences, strict=True):
        caused = {name: measured.get(name, {}).get(probed[name], 0.0) for name in probes.groups[key]}
        if total := sum(caused.values()):
            sensitivity |= {name: divergence.root_mean_kld / total for name, error in caused.items() if error}
    return _damage(graph, sensitivity, measured, probed)


class _Probes:
    """The streams of the probes so far, by name: rounded in their own layers, and as the source has it later.

    `types` are those that weights are rounded to; weights that it lacks belong to no probe.
    """

    def __init__(
        self, layer_pass: LayerPass, reference: Stream, quantizer: Quantizer, types: Mapping[str, str]
    ) -> None:
        self.groups = probes_of(quantizer.source.graph, types)
        self.streams: dict[str, Stream] = {}
        self._pass = layer_pass
        self._reference = reference
        self._quantizer = quantizer
        self._types = types
        self._probe_of = {name: probe for probe, names in self.groups.items() for name in names}
        self._size = _group_size(quantizer.source.graph)

    def begin(self, weight: Weight, done: bool = False) -> None:
        """Begin the probe of a weight that the reference comes to, if this is its first one.

        An embedding that is the head too is rounded once more there.

        done: an earlier run has passed the layer, and has saved the stream; so it is with the embedding's, too.
        """
        probe, source = self._probe_of.get(weight.name), self._quantizer.source
        again = probe in self.streams
        if probe is None or (again and weight is not source.graph.head):
            return
        weights = RoundedWeights(
            self._quantizer, source.graph, {name: self._types[name] for name in self.groups[probe]}
        )
        if again:
            self.streams[probe].weights = weights
        elif done or weight is source.graph.embedding:
            self.streams[probe] = self._pass.begin(probe, self._reference.tokens, weights)
        else:
            self.streams[probe] = self._pass.fork(probe, self._reference, weights)

    def leave(self, layer: int | None) -> None:
        """A layer is done (None: the embedding). After the last of a group all streams have the source's weights."""
        if layer is None or (layer + 1) % self._size == 0:
            for stream in self.streams.values():
                stream.weights = self._quantizer.source


def probes_of(graph: Graph, probed: Container[str]) -> dict[str, list[str]]:
    """The names of the weights that each probe rounds, by the first of them: the same weight of consecutive layers."""
    size, groups = _group_size(graph), dict[object, list[str]]()
    for weight in (graph.embedding, *(weight for layer in graph.layers for weight in weights_in(layer)), graph.head):
        if weight.name in probed:
            layer = weight.layer
            key = weight.name if layer is None else (weight.name.split(".", 2)[2], layer // size)
            names = groups.setdefault(key, [])
            names += [weight.name] if weight.name not in names else []
    return {names[0]: names for names in groups.values()}


def _group_size(graph: Graph) -> int:
    return -(-len(graph.layers) // _GROUPS)


def types_of(forms: Sequence[Graph], calibrated: bool) -> dict[str, set[str]]:
    """By weight name, the types that it may take in any form, where there is a choice."""
    types: dict[str, set[str]] = {}
    for form in forms:
        for weight in form.weights():
            types.setdefault(weight.name, set()).update(format.name for format in allowed_types(weight, calibrated))
    return {name: names for name, names in types.items() if len(names) > 1}


def _coarse(weight: Weight) -> str:
    return _COARSE if format_named(_COARSE).fits(weight.columns) else _COARSE_SHORT_ROWS


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
