"""The one pass over a model's layers: calibration, conversion and proof side by side.

Streams advance together. Calibration tokens run through the source while the inputs of its weights are watched.
Evaluation tokens run through the source, and once more through each file that is written: a candidate's weights are
encoded at the moment it asks for them, with the importance that calibration has just given. What no stream asked for,
experts that no token reached for one, is encoded when the streams are done with it. However many files are made, the
source is read, calibrated on and evaluated once, and files that want the same of a weight share its rounding.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
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
from ..runner.passes import CALIBRATION, CANDIDATE, REFERENCE, LayerPass, packed, unpacked
from ..runner.settings import Compute
from ..runner.stream import Stream
from ..runner.texts import DEFAULT_CONTEXT
from ..runner.weights import ModelWeights, Weights
from ..sources.model import Model
from .encode import Encoder, QuantizingWeights
from .encoders import Encoders
from .findings import Findings
from .gguf.imatrix import ImatrixWriter
from .resume.journal import Journal
from .resume.states import SavedStates, holds_statistics, load_statistics, save_statistics
from .roundings import Roundings
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

    def tokens(self, files: int) -> int:
        """How many there are in all streams; those to evaluate on run through the source and every file."""
        calibration, evaluation = (0 if ids is None else ids.numel() for ids in (self.calibration, self.evaluation))
        return calibration + (1 + files) * evaluation

    @property
    def context(self) -> int:
        """How many tokens the longest chunks have."""
        texts = (ids for ids in (self.calibration, self.evaluation) if ids is not None)
        return max((ids.shape[1] for ids in texts), default=DEFAULT_CONTEXT)


@dataclass(frozen=True)
class FileToWrite:
    """A file that a pass makes: what it will hold, what writes it, and whether anything weighs its columns."""

    plan: Plan
    writer: Writer
    weighed: bool = True


@dataclass(frozen=True)
class Passed:
    """What came of a pass for one of its files: the comparison, None where there was none, and what was found."""

    parity: Parity | None
    findings: Findings


def run_pass(
    model: Model,
    files: Sequence[FileToWrite],
    inputs: PassInputs = PassInputs(),
    compute: Compute = Compute(),
    journal: Journal | None = None,
    workspace: Workspace | None = None,
    progress: Progress | None = None,
) -> list[Passed]:
    """Write every tensor of the files' plans, and compare each with their source on the evaluation tokens.

    Args:
        journal: keeps the streams' states after each layer, and those of an earlier run to go on from.
        workspace: where activations are kept, how much is read ahead and written behind, and on which device is
            computed; by default in memory, on the CPU.

    Raises BadInput naming a stored tensor, a block or an expert whose numbers are not finite, and a layer where an
    expert has seen too few tokens.
    """
    progress, workspace = progress or NoProgress(), workspace or Workspace()
    source = ModelWeights(model, compute.torch_dtype, workspace.device)
    _prepare_kernels([file.plan for file in files], inputs, workspace.device)
    statistics = statistics_for(inputs.error_feedback, compute.torch_dtype, inputs.rounded)
    known = inputs.importance if inputs.calibration is None else statistics
    weighed = [file.weighed and known is not None for file in files]
    roundings = Roundings(zip((file.plan for file in files), weighed, strict=True))
    with ExitStack() as stack:
        made = []
        for file, weighs in zip(files, weighed, strict=True):
            behind = stack.enter_context(WriteBehind(file.writer, workspace.buffer))
            importance = known if weighs else None
            made.append(Encoder(source, file.plan, behind, progress, importance, roundings, compute.threads))
        return _run(made, inputs, statistics, compute, journal, workspace, progress)


def _run(
    made: Sequence[Encoder],
    inputs: PassInputs,
    statistics: Statistics,
    compute: Compute,
    journal: Journal | None,
    workspace: Workspace,
    progress: Progress,
) -> list[Passed]:
    """The pass, once it is clear what writes."""
    model, encoders = made[0].source.model, Encoders(made, progress, workspace.buffer)
    layer_pass = LayerPass(model, workspace, _saved_states(journal, model, encoders, inputs) if journal else None)
    candidates = _begin(layer_pass, made, inputs, statistics)
    streams, findings = layer_pass.streams, [encoder.findings for encoder in made]
    if layer_pass.facts is not None:
        for found, facts in zip(findings, unpacked(layer_pass.facts), strict=True):
            found.take_over(facts)
    lines = _Lines([encoder.plan for encoder in made], progress)
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
        layer_pass.advance(layers, partial(encoders.finish_experts, index))  # writes the layer: see QuantizingWeights
        encoders.finish_layer(index)  # before the journal says that the layer is passed
        for encoder, candidate in zip(made, candidates, strict=False):
            encoder.findings.layer_errors.append(relative_error(streams[REFERENCE].hidden, candidate.hidden))
        if inputs.imatrix:
            inputs.imatrix.add(statistics.sums, statistics.counts)
            if journal:
                save_statistics(journal, index, statistics)
        _check_coverage(index, statistics, inputs.min_expert_tokens)
        if statistics.expert_tokens is not None:
            for encoder in made:
                if encoder.weighs:
                    encoder.findings.expert_tokens[index] = statistics.expert_tokens.tolist()
        lines.write(index, findings, statistics)
        layer_pass.save(index, packed([asdict(found) for found in findings]))
        statistics.clear()
    if inputs.calibration is not None and inputs.error_feedback and inputs.calibrated_layers is None:
        observe_head(streams[CALIBRATION], statistics)
    parities = (
        _compared(streams[REFERENCE], candidates, findings, inputs, compute) if candidates else [None] * len(made)
    )
    encoders.finish_all()
    return [Passed(parity, found) for parity, found in zip(parities, findings, strict=True)]


def _begin(
    layer_pass: LayerPass, made: Sequence[Encoder], inputs: PassInputs, statistics: Statistics
) -> Sequence[Stream]:
    """Begin all streams; those of the files, if they are compared."""
    source, model = made[0].source, made[0].source.model
    beginning: dict[str, tuple[Tensor, Weights]] = {}
    if inputs.calibration is not None:
        beginning[CALIBRATION] = inputs.calibration, ObservingWeights(source, statistics)
    if inputs.evaluation is not None:
        beginning[REFERENCE] = inputs.evaluation, source
        for number, encoder in enumerate(made):
            weights = QuantizingWeights(encoder, f"{model.path} as {encoder.plan.recipe.name}")
            beginning[f"{CANDIDATE} {number}"] = inputs.evaluation, weights
    layer_pass.begin_together(beginning)
    return [stream for name, stream in layer_pass.streams.items() if name.startswith(CANDIDATE)]


def _compared(
    reference: Stream, candidates: Sequence[Stream], findings: Sequence[Findings], inputs: PassInputs, compute: Compute
) -> list[Parity | None]:
    """How each file compares with its source, when all streams have passed all layers."""
    assert inputs.evaluation is not None
    context, made_for = inputs.evaluation.shape[1], reference.model.graph.context_length
    return [
        summarize(divergence, tuple(found.layer_errors), inputs.texts, context, compute.dtype, made_for)
        for divergence, found in zip(compare_heads(reference, candidates, inputs.evaluation), findings, strict=True)
    ]


def _prepare_kernels(plans: Sequence[Plan], inputs: PassInputs, device: torch.device) -> None:
    """Have a GPU's kernels compiled while the first layer is read."""
    formats = {tensor.type.name: tensor.type for plan in plans for tensor in plan.tensors}
    devices.prepare("encode", formats.values(), device)
    if inputs.evaluation is not None:
        devices.prepare("decode", formats.values(), device)
    if inputs.calibration is not None and inputs.error_feedback:
        devices.prepare("choose", (format for name, format in formats.items() if can_feed_back(name)), device)


def _saved_states(journal: Journal, model: Model, encoders: Encoders, inputs: PassInputs) -> SavedStates:
    """The states after the last layer up to which everything is there that an earlier run has made."""

    def intact(layer: int) -> bool:
        return encoders.are_written(layer) and (inputs.imatrix is None or holds_statistics(journal, layer))

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

    def __init__(self, plans: Sequence[Plan], progress: Progress) -> None:
        self._plans = plans
        self._progress = progress

    def write(self, layer: int, findings: Sequence[Findings], statistics: Statistics) -> None:
        facts = [*self._of_files(layer, findings)]
        tokens = statistics.expert_tokens
        if tokens is not None:
            facts.append(f"{int((tokens > 0).sum())} of {len(tokens)} experts seen, fewest {int(tokens.min())} tokens")
        facts.append(f"{peak_rss_bytes() / 1e9:.1f} GB")
        self._progress.note(f"Layer {layer}: {', '.join(facts)}")

    def _of_files(self, layer: int, findings: Sequence[Findings]) -> Iterator[str]:
        """Of one file all types; several are told apart by their names."""
        alone = len(self._plans) == 1
        for plan, found in zip(self._plans, findings, strict=True):
            here = (t for t in plan.tensors if t.weight.layer == layer and not t.weight.role.keep_f32)
            types = Counter(tensor.type.name for tensor in here)
            if alone:
                yield " + ".join(f"{count} {name}" for name, count in types.most_common())
            if found.layer_errors:
                yield f"{'' if alone else f'{plan.recipe.name} '}relative error {found.layer_errors[-1]:.1e}"
