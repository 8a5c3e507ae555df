"""The one pass over a model's layers: calibration, conversion and proof side by side.

Up to three streams advance together. Calibration tokens run through the source while the inputs of its weights are
watched. Evaluation tokens run through the source, and once more through what is written: the candidate's weights are
encoded at the moment it asks for them, with the importance that calibration has just given. What no stream asked for,
experts that no token reached for one, is encoded when the streams are done with it.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from ..errors import BadInput
from ..files import peak_rss_bytes
from ..progress import NoProgress, Progress
from ..quant.formats import devices
from ..quant.planning.plan import Plan
from ..quant.rounding.feedback import can_feed_back
from ..quant.rounding.statistics import Importance, Statistics, statistics_for
from ..runner.activations import Workspace
from ..runner.measure.evaluate import Parity, compare_heads, relative_error, summarize
from ..runner.observe import ObservingWeights, observe_head
from ..runner.passes import CALIBRATION, CANDIDATE, REFERENCE, LayerPass
from ..runner.settings import Compute
from ..runner.texts import DEFAULT_CONTEXT
from ..runner.weights import ModelWeights
from ..sources.model import Model
from .encode import Encoder, QuantizingWeights
from .findings import Findings
from .gguf.imatrix import ImatrixWriter
from .resume.journal import Journal
from .resume.states import SavedStates, holds_statistics, load_statistics, save_statistics
from .write_behind import WriteBehind
from .writer import Writer


@dataclass(frozen=True)
class PassInputs:
    """What runs through a model during a pass, and what follows from it.

    Attributes:
        calibration: token ids [chunks, context] that show which inputs of a weight matter; None for no calibration.
        evaluation: token ids [chunks, context] to compare the result with its source on; None for no comparison.
        texts: how many of these chunks each text has, by category, in order.
        importance: what to weigh columns by where there is no calibration.
        imatrix: receives what calibration finds.
        min_expert_tokens: how many calibration tokens every expert must have seen.
        error_feedback: round what calibration has passed through with error feedback, see `quant.rounding.feedback`.
        rounded: names of weights that are written before the pass, taken from an earlier file.
        calibrated_layers: after so many layers nothing is left that calibration is for; None: after all of them.
    """

    calibration: Tensor | None = None
    evaluation: Tensor | None = None
    texts: Mapping[str, int] = field(default_factory=dict)
    importance: Importance | None = None
    imatrix: ImatrixWriter | None = None
    min_expert_tokens: int = 0
    error_feedback: bool = False
    rounded: Collection[str] = ()
    calibrated_layers: int | None = None

    @property
    def tokens(self) -> int:
        """How many there are in all streams; those to evaluate on run through two models."""
        calibration, evaluation = (0 if ids is None else ids.numel() for ids in (self.calibration, self.evaluation))
        return calibration + 2 * evaluation

    @property
    def context(self) -> int:
        """How many tokens the longest chunks have."""
        texts = (ids for ids in (self.calibration, self.evaluation) if ids is not None)
        return max((ids.shape[1] for ids in texts), default=DEFAULT_CONTEXT)


@dataclass(frozen=True)
class Passed:
    """What came of a pass besides the file: the comparison, None where there was none, and what it found on its way."""

    parity: Parity | None
    findings: Findings


def run_pass(
    model: Model,
    plan: Plan,
    writer: Writer,
    inputs: PassInputs = PassInputs(),
    compute: Compute = Compute(),
    journal: Journal | None = None,
    workspace: Workspace | None = None,
    progress: Progress | None = None,
) -> Passed:
    """Write every tensor of a plan, and compare the result with its source on the evaluation tokens.

    Args:
        journal: keeps the streams' states after each layer, and those of an earlier run to go on from.
        workspace: where activations are kept, how much is read ahead and written behind, and on which device is
            computed; by default in memory, on the CPU.

    Raises BadInput naming a stored tensor, a block or an expert whose numbers are not finite, and a layer where an
    expert has seen too few tokens.
    """
    progress, workspace = progress or NoProgress(), workspace or Workspace()
    source = ModelWeights(model, compute.torch_dtype, workspace.device)
    _prepare_kernels(plan, inputs, workspace.device)
    statistics = statistics_for(inputs.error_feedback, compute.torch_dtype, inputs.rounded)
    known = inputs.importance if inputs.calibration is None else statistics
    with WriteBehind(writer, workspace.buffer) as behind:
        encoder = Encoder(source, plan, behind, progress, known, compute.threads, workspace.buffer)
        return _run(encoder, inputs, statistics, compute, journal, workspace, progress)


def _run(
    encoder: Encoder,
    inputs: PassInputs,
    statistics: Statistics,
    compute: Compute,
    journal: Journal | None,
    workspace: Workspace,
    progress: Progress,
) -> Passed:
    """The pass, once it is clear what writes."""
    source, plan, model = encoder.source, encoder.plan, encoder.source.model
    states = _saved_states(journal, model, encoder, inputs) if journal else None
    layer_pass = LayerPass(model, workspace, states)
    if inputs.calibration is not None:
        layer_pass.begin(CALIBRATION, inputs.calibration, ObservingWeights(source, statistics))
    if inputs.evaluation is not None:
        candidate = QuantizingWeights(encoder, f"{model.path} as {plan.recipe.name}")
        layer_pass.begin(REFERENCE, inputs.evaluation, source)
        layer_pass.begin(CANDIDATE, inputs.evaluation, candidate)
    streams = layer_pass.streams
    findings = encoder.findings
    if layer_pass.facts is not None:
        findings.take_over(layer_pass.facts)
    lines = _Lines(plan, progress)
    for layers in zip(*(stream.weights.graph.layers for stream in streams.values()), strict=True):
        index = layers[0].index
        if layer_pass.is_done(index):
            if inputs.imatrix and journal:
                known = load_statistics(journal, index)
                inputs.imatrix.add(known.sums, known.counts)
            continue
        if CALIBRATION in streams and inputs.calibrated_layers is not None and index >= inputs.calibrated_layers:
            if inputs.evaluation is None:
                break
            layers = (None, *layers[1:])
        layer_pass.advance(layers, partial(encoder.finish_experts, index))  # writes the layer: see QuantizingWeights
        encoder.finish_layer(index)  # before the journal says that the layer is passed
        if inputs.evaluation is not None:
            findings.layer_errors.append(relative_error(streams[REFERENCE].hidden, streams[CANDIDATE].hidden))
        if inputs.imatrix:
            inputs.imatrix.add(statistics.sums, statistics.counts)
            if journal:
                save_statistics(journal, index, statistics)
        _check_coverage(index, statistics, inputs.min_expert_tokens)
        if statistics.expert_tokens is not None:
            findings.expert_tokens[index] = statistics.expert_tokens.tolist()
        lines.write(index, findings.layer_errors[-1] if findings.layer_errors else None, statistics)
        layer_pass.save(index, findings.tensor())
        statistics.clear()
    if inputs.calibration is not None and inputs.error_feedback and inputs.calibrated_layers is None:
        observe_head(streams[CALIBRATION], statistics)
    result = None
    if inputs.evaluation is not None:
        (divergence,) = compare_heads(streams[REFERENCE], [streams[CANDIDATE]], inputs.evaluation)
        errors, made_for = tuple(findings.layer_errors), model.graph.context_length
        result = summarize(divergence, errors, inputs.texts, inputs.evaluation.shape[1], compute.dtype, made_for)
    encoder.finish_all()
    return Passed(result, findings)


def _prepare_kernels(plan: Plan, inputs: PassInputs, device: torch.device) -> None:
    """Have a GPU's kernels compiled while the first layer is read."""
    formats = {tensor.type.name: tensor.type for tensor in plan.tensors}
    devices.prepare("encode", formats.values(), device)
    if inputs.evaluation is not None:
        devices.prepare("decode", formats.values(), device)
    if inputs.calibration is not None and inputs.error_feedback:
        devices.prepare("choose", (format for name, format in formats.items() if can_feed_back(name)), device)


def _saved_states(journal: Journal, model: Model, encoder: Encoder, inputs: PassInputs) -> SavedStates:
    """The states after the last layer up to which everything is there that an earlier run has made."""

    def intact(layer: int) -> bool:
        return encoder.is_written(layer) and (inputs.imatrix is None or holds_statistics(journal, layer))

    return SavedStates(journal, model.graph.layers, intact=intact)


def _check_coverage(layer: int, statistics: Statistics, least: int) -> None:
    tokens = statistics.expert_tokens
    if tokens is not None and int(tokens.min()) < least:
        raise BadInput(
            f"layer {layer}: {int((tokens < least).sum())} of {len(tokens)} experts saw fewer than {least} calibration "
            f"tokens, expert {int(tokens.argmin())} the fewest, {int(tokens.min())}: use more --calibration text, or "
            "lower --min-expert-tokens"
        )


class _Lines:
    """A line for each layer that is done."""

    def __init__(self, plan: Plan, progress: Progress) -> None:
        self._progress = progress
        self._types: dict[int | None, Counter[str]] = defaultdict(Counter)
        for tensor in plan.tensors:
            if not tensor.weight.role.keep_f32:
                self._types[tensor.weight.layer][tensor.type.name] += 1

    def write(self, layer: int, error: float | None, statistics: Statistics) -> None:
        facts = [" + ".join(f"{count} {name}" for name, count in self._types[layer].most_common())]
        if error is not None:
            facts.append(f"relative error {error:.1e}")
        tokens = statistics.expert_tokens
        if tokens is not None:
            facts.append(f"{int((tokens > 0).sum())} of {len(tokens)} experts seen, fewest {int(tokens.min())} tokens")
        facts.append(f"{peak_rss_bytes() / 1e9:.1f} GB")
        self._progress.note(f"Layer {layer}: {', '.join(facts)}")
