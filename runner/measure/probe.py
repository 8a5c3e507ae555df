"""Probes: the KL divergence that rounding one weight causes, for all weights in one pass through the model.

Every weight has a probe: a stream that follows the reference up to the layer of its weight, runs that layer with the
one weight rounded coarsely, and goes on with the weights as they are. Probes share what is loaded, so that a pass
reads the model once. The KL divergence of a probe, divided by the error that caused it, is the weight's sensitivity.
Tokens that the model expects count for more, as calibration text may be of a kind that it was never trained on, and
roots are averaged, because which few tokens an error sends to another expert is chance.

Probes are coarse on purpose: small errors move tokens to other experts now and then, which costs more for each unit
of error than it does in a model in which everything is rounded and tokens move anyhow.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from statistics import median

from torch import Tensor

from ...archs.graph import Graph, weights_in
from ...archs.weights import Weight
from ...quant.formats.table import format_named
from ...quant.planning.allocation import Damage, allowed_types, typical_damage
from ..passes import REFERENCE, LayerPass, Measuring, packed, unpacked
from ..stream import Stream
from ..weights import ModelWeights
from .evaluate import compare_heads
from .rounded import Quantizer, RoundedWeights
from .rounding_error import ErrorWeights

_COARSE, _COARSE_SHORT_ROWS = "IQ2_XXS", "Q2_0"  # the type of a probe, where blocks of 256 fit and where they do not
_LEAST_SENSITIVITY = 0.02  # of the role's median: noise may hide what little a weight matters


def measure_damage(measuring: Measuring, tokens: Tensor, forms: Sequence[Graph]) -> Damage:
    """Sensitivities and errors of all weights that may be quantized.

    Args:
        tokens: int64 [chunks, context], on which probes run; the second half of each chunk is scored.
        forms: the graphs that will be planned for; their types' errors are measured.

    Weights that this text does not reach get what is usual in their role.
    """
    graph, progress = measuring.model.graph, measuring.progress
    source = ModelWeights(measuring.model, measuring.compute_dtype)
    layer_pass, statistics, importance = measuring.begin(source)
    quantizer = Quantizer(source, importance)
    types = types_of(forms, measuring.wants_importance)
    probed = {weight.name: _coarse(weight) for weight in graph.weights() if weight.name in types}
    errors = ErrorWeights(source, quantizer, {name: {*types[name], probed[name]} for name in probed})
    reference = layer_pass.begin(REFERENCE, tokens, errors)
    probes = _Probes(layer_pass, reference, quantizer, probed)
    if layer_pass.facts is not None:
        errors.squares = unpacked(layer_pass.facts)
    elif graph.embedding.name in probed:
        errors.note_embedding(reference.tokens)
    probes.embed(graph.embedding.name)
    progress.begin("Measuring", len(graph.layers), "layers", layer_pass.passed)
    for layer in graph.layers:
        here = [weight.name for weight in weights_in(layer)]
        if layer_pass.is_done(layer.index):
            probes.resume(here)
        else:
            probes.fork(here)
            layer_pass.advance([layer] * len(layer_pass.streams))
            probes.restore_source()
            statistics.clear()
            layer_pass.save(layer.index, packed(errors.squares))
            progress.advance(1, f"layer {layer.index}: {len(probes.streams)} of {len(probed)} weights")
    measuring.end(layer_pass, statistics)
    if graph.head.name in probed:
        errors.note_head(reference)
    probes.fork([graph.head.name])
    measured = errors.relative()
    divergences = compare_heads(reference, list(probes.streams.values()), tokens)
    sensitivity = {
        name: divergence.root_mean_kld / measured[name][probed[name]]
        for name, divergence in zip(probes.streams, divergences, strict=True)
        if measured.get(name, {}).get(probed[name])
    }
    return _damage(graph, sensitivity, measured, probed)


class _Probes:
    """The streams of the weights so far, by name: each weight rounded in its own layer, and as the source has it later.

    `types` are those that weights are rounded to; weights that it lacks have no stream.
    """

    def __init__(
        self, layer_pass: LayerPass, reference: Stream, quantizer: Quantizer, types: Mapping[str, str]
    ) -> None:
        self.streams: dict[str, Stream] = {}
        self._pass = layer_pass
        self._reference = reference
        self._quantizer = quantizer
        self._types = types

    def embed(self, name: str) -> None:
        """Begin the stream of the embedding."""
        if name in self._types:
            self.streams[name] = self._pass.begin(name, self._reference.tokens, self._rounded(name))
            self.restore_source()

    def fork(self, names: Iterable[str]) -> None:
        """Begin the streams of weights in the layer that the reference comes to."""
        for name in self._probed(names):
            self.streams[name] = self._pass.fork(name, self._reference, self._rounded(name))

    def resume(self, names: Iterable[str]) -> None:
        """Take up the streams of weights that an earlier run has passed."""
        for name in self._probed(names):
            self.streams[name] = self._pass.begin(name, self._reference.tokens, self._quantizer.source)

    def restore_source(self) -> None:
        """The layer is done: from now on all streams have the source's weights."""
        for stream in self.streams.values():
            stream.weights = self._quantizer.source

    def _probed(self, names: Iterable[str]) -> Iterator[str]:
        return (name for name in names if name in self._types)

    def _rounded(self, name: str) -> RoundedWeights:
        source = self._quantizer.source
        return RoundedWeights(self._quantizer, source.graph, {name: self._types[name]})


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
