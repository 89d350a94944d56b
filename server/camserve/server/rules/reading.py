"""The `[[explain]]` tables of a `model.toml` to the rules on a model's card, once the model is loaded and its card known.

`loading.py` calls it. Whatever a rule could get wrong for every request is refused here, and the model with it, in the words in
which a caller's spec would be refused.
"""

from __future__ import annotations

import dataclasses
from typing import Final

import numpy as np

from camserve.server import jobs
from camserve.server.conditions import CompiledCondition
from camserve.server.errors import CamserveError, InvalidRequest, Reason
from camserve.server.models.card import ModelCard, RuleCard
from camserve.server.models.config import ModelConfig, RuleConfig
from camserve.server.models.repository import ServedModel
from camserve.server.validate import RequestLimits, check_spec
from camserve.server.wire.tables import read_table

__all__ = ["with_rules"]

_STEPS: Final = 1


def with_rules(served: ServedModel, config: ModelConfig, limits: RequestLimits) -> ServedModel:
    """Puts the rules of a model's configuration on its card.

    Args:
        served: loaded.
        config: of its source.
        limits: of a request; the rules of a model may ask for as much as one.

    Raises:
        ValueError: a rule asks for what the model cannot do, or its condition fails for a plain request; the text names file and
            rule.
    """
    if not config.explain:
        return served
    rules, maps = [], 0
    for place, written in enumerate(config.explain):
        try:
            rule = _rule(written, served.card, f"explain[{place}]")
            maps += check_spec(rule.spec, served.card, f"explain[{place}]")
            if rule.condition is not None:
                _try(rule.condition, served.card)
        except CamserveError as error:
            raise ValueError(f"{config.path}: rule {written.name!r}: {error.message}") from error
        rules.append(rule)
    if len(rules) > limits.max_specs or maps > limits.max_maps:
        raise ValueError(
            f"{config.path}: {len(rules)} rules may give {maps} maps for one request, and a request may have at most "
            f"{limits.max_specs} specs and {limits.max_maps} maps; write fewer, or raise max_specs and max_maps"
        )
    return dataclasses.replace(served, card=dataclasses.replace(served.card, rules=tuple(rules)))


def _rule(written: RuleConfig, card: ModelCard, field: str) -> RuleCard:
    spec = read_table(written.asks, card, field)
    if isinstance(spec.target.about, jobs.Reference):
        raise InvalidRequest(
            Reason.FIELD_INVALID,
            f"{field}.target.embedding must be a vector: a card holds no images; embed yours once and write its numbers",
            field=f"{field}.target.embedding",
        )
    return RuleCard(
        name=written.name,
        when=written.when,
        sample=written.sample,
        asks=written.asks,
        spec=spec,
        condition=CompiledCondition(written.when, card.labels) if written.when else None,
    )


def _try(condition: jobs.Condition, card: ModelCard) -> None:
    """Asks it about a plain request and an undecided model: what has no value there will fail in earnest too.

    Raises:
        ExecutionFailed: it has none.
    """
    circumstances = jobs.Circumstances(
        model=card.name, version=card.version, lane=jobs.Lane.STANDARD, labels={}, asked=False
    )
    condition(_undecided(card), circumstances)


def _undecided(card: ModelCard) -> jobs.Reading:
    """What the model would say if all classes were alike to it; a detector finds nothing."""
    kind, classes = card.output_kind, card.class_count
    match kind:
        case jobs.OutputKind.DETECTION:
            shape: tuple[int, ...] = (0,)
        case jobs.OutputKind.SEQUENCE:
            shape = (_STEPS, classes)
        case _:
            shape = (classes,)
    has_probabilities = kind not in (jobs.OutputKind.REGRESSION, jobs.OutputKind.EMBEDDING)
    probabilities = np.full(shape, 1 / max(classes, 1), np.float32) if has_probabilities else np.zeros(0, np.float32)
    return jobs.Reading(kind=kind, scores=np.zeros(shape, np.float32), probabilities=probabilities)
