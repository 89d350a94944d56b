"""Which methods work on a model, tried once after loading, so that a request for one that does not is refused before any work.

`loader.py` calls `method_cards` with the probe's report. What depends on the input or on the target alone is left to the pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from camserve.server.cam.methods import METHODS, Method, Need, Reads
from camserve.server.engine.graph import capture_graph
from camserve.server.engine.layout import LayoutKind
from camserve.server.engine.plan import PassModel, rule_of
from camserve.server.engine.probe import ProbeReport
from camserve.server.engine.program import ATTENTION, INPUT, BackwardRule
from camserve.server.errors import CamserveError
from camserve.server.jobs import OutputKind
from camserve.server.models.card import MethodCard

__all__ = ["method_cards"]


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
    return MethodCard(slug=method.slug, works=True)


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

    def _biases(self) -> str:
        self._model.program.biases()
        return ""

    def _attention(self) -> str:
        if not any(layout.kind is LayoutKind.TOKENS for layout in self._model.layouts.values()):
            return "no layer is a sequence of tokens over a known grid, so attention cannot be laid on the input; use grad-cam"
        capture_graph(self._model, self._inputs, [ATTENTION], rule=BackwardRule.ATTENTION)
        return ""
