"""Which methods work on a model, tried once after loading, so that a request for one that does not is refused before any work.

`loader.py` calls `method_cards` with the probe's report. What depends on the input or on the target alone is left to the pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from camserve.server.cam.methods import METHODS, Evidence, Method, Need, Reads
from camserve.server.cam.methods.fullgrad import completeness
from camserve.server.engine.graph import Chosen, PassGraph, capture_graph
from camserve.server.engine.layout import LayoutKind
from camserve.server.engine.plan import PassModel, rule_of
from camserve.server.engine.probe import ProbeReport
from camserve.server.engine.program import ATTENTION, INPUT, BackwardRule, TapName
from camserve.server.errors import CamserveError
from camserve.server.jobs import OutputKind, Target
from camserve.server.models.card import MethodCard

__all__ = ["method_cards"]

# Rounding through some hundred layers; what an operator hides is a share of the score.
_COMPLETE = 1e-2
_SMALLEST_SCORE = 1e-3


def method_cards(model: PassModel, inputs: Sequence[Tensor], report: ProbeReport) -> tuple[MethodCard, ...]:
    """Tries what each method needs besides the layers.

    Args:
        model: loaded.
        inputs: noise of its shapes, rows first; a number of rows that it takes.
        report: the probe's.
    """
    trials = _Trials(model, inputs, report)
    return tuple(_card(method, trials, report) for method in METHODS.values())


def _card(method: Method, trials: _Trials, report: ProbeReport) -> MethodCard:
    refusal = trials.refusal(method)
    if refusal:
        return MethodCard(slug=method.slug, works=False, note=refusal)
    if Need.LINEAR_HEAD in method.needs:
        head_layer = next(layer for layer in report.layers if report.head_layer in layer.spellings)
        note = f"at {report.head_layer}, which feeds average pooling and the last linear layer"
        return MethodCard(slug=method.slug, works=True, note=note, only_layers=head_layer.spellings)
    return MethodCard(slug=method.slug, works=True, note=trials.note(method))


class _Trials:
    """What was tried, each thing once: methods share their needs."""

    def __init__(self, model: PassModel, inputs: Sequence[Tensor], report: ProbeReport) -> None:
        self._model = model
        self._inputs = inputs
        self._report = report
        self._outcomes: dict[object, str] = {}

    def refusal(self, method: Method) -> str:
        """Why the method does not work on this model; empty if it does."""
        found = (self._once(key, trial) for key, trial in self._needed(method))
        return next((refusal for refusal in found if refusal), "")

    def note(self, method: Method) -> str:
        """What a reader should know of a method that works."""
        return self._once("completeness", self._completeness) if method.reads is Reads.BIASES else ""

    def _needed(self, method: Method) -> list[tuple[object, Callable[[], str]]]:
        trials: list[tuple[object, Callable[[], str]]] = []
        if method.needs - {Need.LINEAR_HEAD}:
            trials.append(("derivative", lambda: self._report.differentiable_reason))
        if Need.LINEAR_HEAD in method.needs:
            trials.append((Need.LINEAR_HEAD, self._head))
        for need in sorted(method.needs):
            rule = rule_of(need)
            if rule is not None:
                trials.append((rule, lambda rule=rule: self._rule(rule)))  # type: ignore[misc]
        if Need.CURVATURE in method.needs:
            trials.append((Need.CURVATURE, self._curvature))
        if method.reads is Reads.BIASES:
            trials.append((Reads.BIASES, self._biases))
        if method.reads is Reads.ATTENTION:
            trials.append((Reads.ATTENTION, self._attention))
        return trials

    def _once(self, key: object, trial: Callable[[], str]) -> str:
        if key not in self._outcomes:
            try:
                self._outcomes[key] = trial()
            except CamserveError as error:
                self._outcomes[key] = error.message
        return self._outcomes[key]

    def _head(self) -> str:
        if self._model.kind is OutputKind.CLASSIFICATION and self._report.head is not None:
            return ""
        return "it needs average pooling and one linear layer behind the layer; grad-cam needs neither"

    def _rule(self, rule: BackwardRule) -> str:
        capture_graph(self._model, self._inputs, [INPUT], rule=rule)
        return ""

    def _curvature(self) -> str:
        """A second derivative at the default layer, of whatever the model predicts; fused attention has none."""
        found = self._predicted([TapName.parse(self._report.default_layer)])
        if found is None:
            return ""
        graph, chosen = found
        (curvature,) = graph.curvatures(chosen, list(graph.activations)).values()
        return curvature.message if isinstance(curvature, CamserveError) else ""

    def _completeness(self) -> str:
        """Says by how much the parts that FullGrad draws miss the score, where they do."""
        biases = self._model.program.biases()
        found = self._predicted([INPUT, *biases])
        if found is None:
            return ""
        graph, chosen = found
        gradients = graph.gradients(chosen, [INPUT, *biases])
        evidence = [
            Evidence(activation=activation.detach(), gradient=gradient, bias=biases.get(tap))
            for tap, activation in graph.activations.items()
            if isinstance(gradient := gradients[tap], Tensor)
        ]
        score = graph.readout().scores([aim for _, aim in chosen]).detach()
        missing = float(((score - completeness(evidence)).abs() / score.abs().clamp_min(_SMALLEST_SCORE)).max())
        if missing <= _COMPLETE:
            return ""
        return (
            f"incomplete: what it draws misses the score of a trial by {missing:.0%}; operators that are neither linear nor "
            "ReLU, such as SiLU, GELU or a sigmoid, keep evidence of their own"
        )

    def _predicted(self, taps: Sequence[TapName]) -> tuple[PassGraph, list[Chosen]] | None:
        """A tapped forward of the trial inputs and each row's predicted class; None for outputs that predict none."""
        if self._model.kind in (OutputKind.DETECTION, OutputKind.EMBEDDING, OutputKind.SEQUENCE):
            return None
        graph, refusals = capture_graph(self._model, self._inputs, taps)
        for error in refusals.values():
            raise error
        rows = range(len(self._inputs[0]))
        return graph, [("", graph.readout().aims(row, Target())[0]) for row in rows]

    def _biases(self) -> str:
        self._model.program.biases()
        return ""

    def _attention(self) -> str:
        if not any(layout.kind is LayoutKind.TOKENS for layout in self._model.layouts.values()):
            return "no layer is a sequence of tokens over a known grid, so attention cannot be laid on the input; use grad-cam"
        capture_graph(self._model, self._inputs, [ATTENTION], rule=BackwardRule.ATTENTION)
        return ""
