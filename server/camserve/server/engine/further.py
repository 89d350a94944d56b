"""Forwards of a batch under other rules than the plain one, each run once if a spec needs it: guided gradients and attention.

`passes.py` runs them after the predictions have left. A rule that the program refuses fails the specs that need it, no others.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from camserve.server.engine.graph import Chosen, Gradients, PassGraph, capture_graph
from camserve.server.engine.plan import Ask, PassModel, fresh, rule_of
from camserve.server.engine.program import ATTENTION, INPUT, BackwardRule, TapName
from camserve.server.errors import CamserveError

__all__ = ["FurtherForwards", "rules_of"]


class FurtherForwards:
    """All that one batch needs besides its own forward."""

    def __init__(self, model: PassModel, inputs: Sequence[Tensor]) -> None:
        self._model = model
        self._inputs = inputs
        self._graphs: dict[BackwardRule, PassGraph] = {}
        self._refusals: dict[BackwardRule, CamserveError] = {}

    def refusal(self, ask: Ask) -> CamserveError | None:
        """Runs what an ask needs; returns why the program cannot do it, or None."""
        found = (self._run(rule) for rule in rules_of(ask))
        return next((fresh(error) for error in found if error is not None), None)

    def attentions(self) -> dict[TapName, Tensor]:
        """The probabilities of every attention, if an ask needed them."""
        graph = self._graphs.get(BackwardRule.ATTENTION)
        return {} if graph is None else graph.detached_activations()

    def gradients(self, rule: BackwardRule, chosen: Sequence[Chosen | None]) -> Gradients:
        """Under a rule that an ask needed and the program took: with respect to the input, or to every attention."""
        graph = self._graphs[rule]
        return graph.gradients(chosen, list(graph.activations))

    def release(self) -> None:
        """Frees all graphs."""
        for graph in self._graphs.values():
            graph.release()

    def _run(self, rule: BackwardRule) -> CamserveError | None:
        if rule not in self._graphs and rule not in self._refusals:
            tap = ATTENTION if rule is BackwardRule.ATTENTION else INPUT
            try:
                graph, _ = capture_graph(self._model, self._inputs, [tap], rule=rule)
                graph.readout()
            except CamserveError as error:
                self._refusals[rule] = error
            else:
                self._graphs[rule] = graph
        return self._refusals.get(rule)


def rules_of(ask: Ask) -> list[BackwardRule]:
    """The rules besides the plain one that an ask needs."""
    rules = [rule for need in sorted(ask.method.needs) if (rule := rule_of(need)) is not None]
    return [*rules, BackwardRule.ATTENTION] if ask.rule is BackwardRule.ATTENTION else rules
