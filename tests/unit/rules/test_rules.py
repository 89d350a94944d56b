"""Rules of a card: read when a model is loaded, applied to a request, followed to the end of its answer."""

from __future__ import annotations

import numpy as np
import pytest
from support.cards import card, job, spec

from camserve.server import jobs
from camserve.server.errors import ExecutionFailed, Reason
from camserve.server.jobs import OutputKind, Reading, RuleOutcome
from camserve.server.models.card import ModelCard
from camserve.server.models.config import ModelConfig, RuleConfig
from camserve.server.models.repository import ServedModel
from camserve.server.rules import Standing, apply_rules, is_sampled, with_rules
from camserve.server.validate import RequestLimits

LIMITS = RequestLimits(max_specs=3, max_maps=8)
SURE = Reading(
    kind=OutputKind.CLASSIFICATION,
    scores=np.array([3, 0, 0, 0], np.float32),
    probabilities=np.array([0.7, 0.1, 0.1, 0.1], np.float32),
)


def ruled(*rules: RuleConfig, **changes: object) -> ModelCard:
    """The card of a model with rules; nothing of it is run."""
    served = ServedModel(card=card(**changes), pass_model=None)
    return with_rules(served, ModelConfig(explain=rules), LIMITS).card


def rule(name: str = "rejects", **fields: object) -> RuleConfig:
    """Grad-CAM, unless told."""
    return RuleConfig(**{"name": name, "method": "grad-cam", **fields})


def heatmap(spec_index: int, rank: int = 0, count: int = 1) -> jobs.Heatmap:
    """A map, as it is sent."""
    raw = jobs.RawMap(
        spec_index=spec_index,
        target=jobs.ResolvedTarget(class_index=0, score=jobs.Score.LOGIT, value=0.0, rank=rank, count=count),
        values=np.zeros((2, 2), np.float32),
        raw_min=0.0,
        raw_max=0.0,
        flags=frozenset(),
        layers=("body",),
    )
    return jobs.Heatmap(
        raw=raw, label="", method="grad-cam", profile=jobs.Profile.PAPER, shape=(2, 2), axes=("h", "w"),
        encoding=jobs.Encoding.FLOAT32, compression=jobs.Compression.NONE, payload=b"", value_min=0.0, value_max=0.0,
        geometry=None, raw_sha256=b"", payload_sha256=b"",
    )  # fmt: skip


def test_a_rule_is_read_in_the_words_of_the_wire():
    """Defaults are a request's: the card's layer, the predicted class."""
    (plain, full) = ruled(
        rule(when='label == "cat"'),
        rule(
            "full",
            method="layercam",
            layers=["stem", "body"],
            target={"top": {"k": 2}, "score": "softmax"},
            fusion="max",
            normalisation="min-max",
            encoding="png16",
            regions={"threshold": 0.5},
            sample=0.25,
        ),
    ).rules

    assert (spec(), 'label == "cat"', 1.0) == (plain.spec, plain.when, plain.sample)
    expected = spec(
        method="layercam",
        layers=("stem", "body"),
        target=jobs.Target(about=jobs.TopClasses(2), score=jobs.Score.SOFTMAX),
        fusion=jobs.Fusion.MAX,
        normalisation=jobs.Normalisation.MIN_MAX,
        encoding=jobs.Encoding.PNG16,
        regions=jobs.RegionOptions(threshold=0.5),
    )
    assert (expected, "", 0.25, None) == (full.spec, full.when, full.sample, full.condition)


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"method": "gradcam"}, r"explain\[0\]\.method is 'gradcam'.*did you mean 'grad-cam'\?"),
        ({"layer": "body"}, r"explain\[0\]\.layer is no field; did you mean layers\?"),
        ({"layers": ["bodi"]}, "layer 'bodi' is not in model 'tiny'; near names: body"),
        ({"layers": ["head"]}, "gives no map at layer 'head'"),
        ({"target": {"class_label": "wolf"}}, "label 'wolf' is not one of model 'tiny'"),
        ({"target": {"class_index": 4}}, r"explain\[0\]\.target\.class_index must be from 0 to 3"),
        ({"target": "cat"}, r"explain\[0\]\.target is 'cat'; write a table of predicted, class_index"),
        ({"parameters": {"samples": 5}}, r"explain\[0\]\.parameters\.samples is not read by grad-cam"),
        ({"method": "rise", "parameters": {"samples": 1.5}}, r"explain\[0\] is wrong: .*samples"),
        ({"overlay_opacity": 10**400}, r"explain\[0\] is wrong"),
        ({"rectify": "yes"}, r"explain\[0\] is wrong"),
        ({"target": {"embedding": {"image": {"data": "AAAA"}}}}, "a card holds no images"),
        ({"when": 'scores["wolf"] > 0.5'}, "no value here: Key not found"),
        ({"when": 'labels["line"] == "3"'}, "no value here: Key not found"),
        ({"target": {"top": {"k": 4}}, "method": "deep-feature-factorisation"}, "must be unset"),
    ],
)
def test_a_rule_that_cannot_work_is_refused_with_file_and_name(fields, complaint):
    """In the words in which a request would be."""
    with pytest.raises(ValueError, match=rf"^model\.toml: rule 'rejects': .*{complaint}"):
        ruled(rule(**fields))


def test_rules_may_ask_for_as_much_as_a_request():
    """Three specs and eight maps here, and no more of either."""
    ruled(rule("a"), rule("b"), rule("c"))

    with pytest.raises(ValueError, match=r"4 rules may give 4 maps .* at most 3 specs and 8 maps"):
        ruled(rule("a"), rule("b"), rule("c"), rule("d"))
    with pytest.raises(ValueError, match="3 rules may give 9 maps"):
        ruled(rule("a", target={"top": {"k": 4}}), rule("b", target={"top": {"k": 4}}), rule("c"))


def test_rules_add_their_specs_behind_the_callers():
    """Indices go on; what the sample leaves out adds nothing, and is told."""
    rules = ruled(rule("all", method="layercam"), rule("none", sample=0.0), rule("last", when="asked"))

    applied = apply_rules(job(spec(), spec(1, method="cam")), rules)

    assert [(0, "grad-cam"), (1, "cam"), (2, "layercam"), (3, "grad-cam")] == [
        (item.index, item.method) for item in applied.specs
    ]
    assert applied.specs[:2] == applied.asked
    assert [("all", 2), ("none", None), ("last", 3)] == [(use.name, use.spec_index) for use in applied.rules]
    assert (None, "all", "last") == (applied.rule_of(1), applied.rule_of(2).name, applied.rule_of(3).name)
    assert ("specs[1]", "rules[all]") == (applied.path(1), applied.path(2))
    assert applied.rule_of(3).is_due(SURE)
    assert not apply_rules(job(), rules).rule_of(1).is_due(SURE)


def test_a_request_for_a_model_without_rules_stays_itself():
    """Not even a copy is made."""
    asked = job(spec())

    assert asked is apply_rules(asked, card())


def test_a_sample_decides_by_the_requests_id():
    """As the formula says."""
    rules = ruled(rule(sample=0.5))
    for number in range(40):
        request_id = f"r-{number}"

        (use,) = apply_rules(job(request_id=request_id), rules).rules

        assert is_sampled("rejects", request_id, 0.5) is (use.spec_index is not None)


def test_a_standing_follows_every_rule_to_its_end():
    """Applied with the last map, failed with an error, not met without a word, and not sampled from the start."""
    rules = ruled(rule("made", target={"top": {"k": 2}}), rule("failed"), rule("quiet", when="asked"))
    applied = apply_rules(job(spec(), deadline=10.0), rules)
    standing = Standing(applied)

    assert not standing.waits_for_rules_only
    assert "" == standing.told(heatmap(0)).rule
    assert standing.waits_for_rules_only
    assert "made" == standing.told(heatmap(1, rank=0, count=2)).rule
    assert not standing.is_over(1)
    standing.told(heatmap(1, rank=1, count=2))
    error = ExecutionFailed(Reason.MODEL_FAILED, "no")
    assert "failed" == standing.told(jobs.SpecFailed(spec_index=2, error=error)).rule
    assert standing.is_over(1)
    assert [
        ("made", RuleOutcome.APPLIED),
        ("failed", RuleOutcome.FAILED),
        ("quiet", RuleOutcome.NOT_MET),
    ] == [(verdict.rule, verdict.outcome) for verdict in standing.verdicts()]


def test_what_is_given_up_is_what_was_due():
    """Rules whose conditions do not hold are not told as failed when time runs out."""
    rules = ruled(rule("due"), rule("undue", when="score < 0.6"), rule("unsampled", sample=0.0))
    standing = Standing(apply_rules(job(deadline=10.0), rules))

    failures = [standing.told(failure) for failure in standing.give_up(SURE)]

    assert [("due", Reason.DEADLINE_EXCEEDED)] == [(failure.rule, failure.error.reason) for failure in failures]
    assert [RuleOutcome.FAILED, RuleOutcome.NOT_MET, RuleOutcome.NOT_SAMPLED] == [
        verdict.outcome for verdict in standing.verdicts()
    ]


@pytest.mark.parametrize(("deadline", "expected"), [(10.0, 9.75), (1.0, 0.9), (0.1, 0.05), (None, None)])
def test_an_answer_leaves_before_its_deadline(deadline, expected):
    """A tenth of the time, at least 50 and at most 250 ms; without a deadline there is no hurry."""
    standing = Standing(apply_rules(job(deadline=deadline), ruled(rule())))

    assert expected == (None if expected is None else pytest.approx(standing.give_up_at))
    assert Standing(job(deadline=deadline)).give_up_at is None
