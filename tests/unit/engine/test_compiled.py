"""The compiled plan without a compiler: a package is a function, and the program's own explanation is one."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from support.nets import TinyNet

from camserve.server.engine.compiled import COMPILED, PREDICTED, CompiledPlan, LivePackage
from camserve.server.engine.compiled_build import explanation_of
from camserve.server.engine.compiled_pass import filled
from camserve.server.engine.compiled_trial import Trial, trial_batch
from camserve.server.engine.eager import EagerProgram
from camserve.server.engine.effort import effort_of
from camserve.server.engine.passes import Closed, Forwarded, Mapped, PassModel, run_pass
from camserve.server.engine.probe import probe
from camserve.server.engine.program import TapName
from camserve.server.jobs import ClassIndex, Difference, KthClass, OutputKind, Polarity, Score, Smoothing, Spec, Target

ROWS = 4
LAYER = "body"


class Counted:
    """A package that tells what it was given."""

    def __init__(self, run) -> None:
        self.run = run
        self.given: list[tuple[int, list[int]]] = []

    def __call__(self, batch, classes):
        """Runs it."""
        self.given.append((len(batch), classes.tolist()))
        return self.run(batch, classes)


@pytest.fixture
def ordinary() -> PassModel:
    """A tiny net in double, where batch sizes leave no trace, without a compiled plan."""
    program = EagerProgram(TinyNet().eval(), device="cpu", dtype=torch.float64)
    report = probe(program, torch.randn(2, 3, 32, 32, dtype=torch.float64))
    return PassModel(
        program=program, layouts=report.layouts, classes=4, head=report.head, head_layer=report.head_layer, max_rows=8
    )


@pytest.fixture
def package(ordinary) -> Counted:
    """What a compiled package computes."""
    tap = TapName.parse(LAYER)
    return Counted(explanation_of(ordinary.program, tap, kind=ordinary.kind, output_path=""))


@pytest.fixture
def compiled(ordinary, package) -> PassModel:
    """The same model with a package for four rows that is live."""
    plan = CompiledPlan(layer=LAYER, spellings=("body", "body#0"), classes=4)
    plan.adopt(LivePackage(rows=ROWS, run=package, gain=1.5))
    return dataclasses.replace(ordinary, compiled=plan)


def images(rows: int):
    """Noise, the same every time."""
    return torch.randn(rows, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def spec(method: str = "grad-cam", layer: str = LAYER, index: int = 0, **target) -> Spec:
    """One explanation."""
    return Spec(index=index, method=method, layers=(layer,), target=Target(**target))


RIDING = [
    (),
    (spec(),),
    (spec(layer="body#0"),),
    (spec(about=ClassIndex(2)), spec("layercam", index=1, about=ClassIndex(2))),
    (spec(), spec(index=1, polarity=Polarity.AGAINST), spec("cam", index=2), spec("eigen-cam", index=3)),
]
OTHERS = [
    (spec(layer="stem"),),
    (spec(about=KthClass(1)),),
    (spec(about=ClassIndex(4)),),
    (spec(about=Difference(0, 1)),),
    (spec(score=Score.SOFTMAX),),
    (spec(), spec(index=1, about=ClassIndex(2))),
    (spec("finer-cam"),),
    (spec("shapley-cam"),),
    (spec("score-cam"),),
    (Spec(index=0, method="vanilla-backprop", layers=()),),
    (Spec(index=0, method="grad-cam", layers=(LAYER, "stem")),),
    (dataclasses.replace(spec(), smoothing=Smoothing(augmentation=True)),),
]


@pytest.mark.parametrize("specs", RIDING)
def test_requests_at_the_default_layer_about_one_class_ride(compiled, specs):
    """Predicted and named classes, for and against, by every method of one gradient or none, have the compiled form."""
    assert COMPILED == effort_of(compiled, specs).form


@pytest.mark.parametrize("specs", OTHERS)
def test_whatever_a_package_does_not_give_takes_the_ordinary_way(compiled, package, specs):
    """Other layers, targets, scores, contrasts, second classes and methods neither have the form nor run the package."""
    assert COMPILED != effort_of(compiled, specs).form
    list(run_pass(compiled, images(ROWS), [specs, (), (), ()]))
    assert not package.given


def test_nothing_rides_before_a_package_is_live(ordinary):
    """A plan without packages changes neither forms nor passes."""
    model = dataclasses.replace(ordinary, compiled=CompiledPlan(layer=LAYER, spellings=(LAYER,), classes=4))
    assert COMPILED != effort_of(model, (spec(),)).form


def test_a_compiled_pass_gives_what_the_ordinary_one_gives(ordinary, compiled, package):
    """The same events, readings, targets and maps, bit for bit, with the package run once and told each row's class."""
    rows = [RIDING[0], RIDING[2], RIDING[3], RIDING[4]]
    expected, found = (list(run_pass(model, images(ROWS), rows)) for model in (ordinary, compiled))

    assert [(ROWS, [PREDICTED, PREDICTED, 2, PREDICTED])] == package.given
    assert [type(event) for event in expected] == [type(event) for event in found]
    assert isinstance(found[0], Forwarded)
    assert isinstance(found[-1], Closed)
    for one, other in zip(expected[0].readings, found[0].readings, strict=True):
        assert np.array_equal(one.scores, other.scores)
        assert np.array_equal(one.probabilities, other.probabilities)
    pairs = [(one, other) for one, other in zip(expected, found, strict=True) if isinstance(one, Mapped)]
    assert len(pairs) == 7
    for one, other in pairs:
        assert (one.row, one.result.spec_index, one.result.target) == (
            other.row,
            other.result.spec_index,
            other.result.target,
        )
        assert one.result.layers == other.result.layers
        assert np.array_equal(one.result.values, other.result.values)


def test_fewer_rows_are_filled_up_where_that_still_gains(compiled, package):
    """Three rows ride the package of four at a gain of 1.5; two would be slower than the ordinary plan, and five do not fit."""
    for rows in (3, 2, 5):
        list(run_pass(compiled, images(rows), [(spec(),)] * rows))
    assert [(ROWS, [PREDICTED] * ROWS)] == package.given


def test_a_filled_up_row_is_the_row_alone(compiled, ordinary):
    """Copies of the last row change nothing in the rows before them."""
    rows = [(spec(about=ClassIndex(row)),) for row in range(3)]
    expected, found = (
        [event.result.values for event in run_pass(model, images(3), rows) if isinstance(event, Mapped)]
        for model in (ordinary, compiled)
    )
    for one, other in zip(expected, found, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-9)


def test_filling_copies_the_last_row(package):
    """What is added is the last row and its class; inputs are laid out as the package was traced."""
    live = LivePackage(rows=3, run=package, gain=2.0)
    batch, classes = filled(live, images(2).to(memory_format=torch.channels_last), torch.tensor([1, PREDICTED]))
    assert [1, PREDICTED, PREDICTED] == classes.tolist()
    assert torch.equal(batch[2], images(2)[1])
    assert batch.is_contiguous()


def test_rows_nobody_waits_for_do_not_decide(compiled, package):
    """A row that left rides as one without explanations, whatever it wanted."""
    list(run_pass(compiled, images(ROWS), [(spec(),)] * 3 + [(spec(layer="stem"),)], is_wanted=lambda row: row < 3))
    assert [(ROWS, [PREDICTED] * ROWS)] == package.given


def test_an_honest_package_passes_its_trial(ordinary, package):
    """The program's own explanation is alike; whether it serves is then a matter of time alone."""
    trial = Trial(ordinary, LAYER, package, trial_batch(ordinary, (3, 32, 32), ROWS))
    trial.check()
    trial.race()
    assert trial.deviation == 0
    assert not trial.refusal or "times as fast" in trial.refusal
    assert trial.live().rows == ROWS


@pytest.mark.parametrize(
    ("place", "told"),
    [(0, "outputs differ"), (1, "activations correlate"), (2, "gradients correlate"), (3, "other classes")],
)
def test_a_package_that_is_wrong_in_one_row_is_refused(ordinary, package, place, told):
    """Wrong outputs, activations, gradients or classes of a single row are found, and the refusal says which."""

    def wrong(batch, classes):
        found = [value.clone() for value in package.run(batch, classes)]
        found[place][-1] = found[place][-1].flip(0) + 1 if found[place].ndim > 1 else found[place][-1] + 1
        return tuple(found)

    trial = Trial(ordinary, LAYER, wrong, trial_batch(ordinary, (3, 32, 32), ROWS))
    trial.check()
    trial.race()
    assert told in trial.refusal


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"kind": OutputKind.DETECTION}, "detection"),
        ({"inputs": 2}, "2 inputs"),
        ({"is_variable": True}, "several sizes"),
        ({"device": "cuda"}, "cuda"),
    ],
)
def test_models_that_cannot_be_compiled_are_told_why(changed, told):
    """Each refusal names what is in the way; a classifier of one input of one size on the CPU has none."""
    fitting = {"kind": OutputKind.CLASSIFICATION, "inputs": 1, "is_variable": False, "device": "cpu"}
    assert not CompiledPlan.refusal(**fitting)
    assert told in CompiledPlan.refusal(**{**fitting, **changed})
