import dataclasses
import gc
import itertools
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from camserve.server.cam.methods import METHODS, Layerwise
from camserve.server.engine.eager import EagerProgram
from camserve.server.engine.passes import Closed, Forwarded, Mapped, PassModel, run_pass
from camserve.server.engine.probe import probe
from camserve.server.errors import ExecutionFailed, InvalidRequest, NotFound, Reason, Unsupported
from camserve.server.jobs import (
    ClassesAbove,
    ClassIndex,
    Fusion,
    MapFlag,
    Normalisation,
    Profile,
    RawMap,
    Reading,
    Score,
    Spec,
    SpecFailed,
    Target,
    TopClasses,
)

CLASSES = 5
SIDE = 12
LARGE_SIDE = 40
LAYERED = [slug for slug, method in METHODS.items() if isinstance(method.arithmetic, Layerwise)]


class CountBackward(torch.autograd.Function):
    """An identity that counts how often a gradient goes through it."""

    passes = 0

    @staticmethod
    def forward(context: Any, values: Tensor) -> Tensor:
        """Hands the values on."""
        return values.clone()

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> Tensor:
        """Counts."""
        CountBackward.passes += 1
        return gradients[0]


class NoDerivative(torch.autograd.Function):
    """An operator as some archives have them: it runs, but nothing goes back through it."""

    @staticmethod
    def forward(context: Any, values: Tensor) -> Tensor:
        """Hands the values on."""
        return values.clone()

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> Tensor:
        """Raises as PyTorch's own operators without a derivative do."""
        # What torch itself raises for an operator without a derivative.
        raise NotImplementedError("derivative for opaque is not implemented")


class Token:
    """Lives as long as what holds it."""


class CountGraphs(torch.autograd.Function):
    """An identity that leaves a token in every graph it becomes part of."""

    alive: ClassVar[weakref.WeakSet[Token]] = weakref.WeakSet()

    @staticmethod
    def forward(context: Any, values: Tensor) -> Tensor:
        """Hands the values on."""
        context.token = Token()
        CountGraphs.alive.add(context.token)
        return values.clone()

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> Tensor:
        """Hands them back."""
        return gradients[0]


class GraphNet(nn.Module):
    """A convolution, whose map every graph is behind, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.head = nn.Linear(4, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        """(b 3 h w) to (b classes)."""
        logits: Tensor = self.head(CountGraphs.apply(self.conv(images)).mean(dim=(2, 3)))
        return logits


class TinyNet(nn.Module):
    """Two convolutions with a residual, average pooling and a linear head; counts gradients behind the last map."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
        self.block = nn.Conv2d(8, 8, 3, padding=1)
        self.down = nn.Conv2d(8, 16, 3, stride=2, padding=1)
        self.relu = nn.ReLU(inplace=True)
        self.side = nn.Conv2d(8, 4, 1)
        self.head = nn.Linear(16, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        """(b 3 h w) to (b classes)."""
        features = self.stem(images)
        features = self.relu(self.block(features) + features)
        self.side(features)
        last = CountBackward.apply(self.relu(self.down(features)))
        logits: Tensor = self.head(last.mean(dim=(2, 3)))
        return logits


def model_of(net: nn.Module, dtype: torch.dtype = torch.float32, device: str = "cpu") -> PassModel:
    """Loads a net as the server does."""
    program = EagerProgram(net, device=device, dtype=dtype)
    report = probe(program, torch.randn(2, 3, SIDE, SIDE, device=device, dtype=dtype))
    layouts = {name: layer.layout for layer in report.layers if layer.layout for name in layer.spellings}
    return PassModel(
        program=program, layouts=layouts, classes=report.classes, head=report.head, head_layer=report.head_layer
    )


@pytest.fixture
def net() -> TinyNet:
    """The same weights in every test."""
    torch.manual_seed(0)
    return TinyNet()


@pytest.fixture
def model(net: TinyNet) -> PassModel:
    """The net, loaded."""
    return model_of(net)


def images(rows: int, seed: int = 7, side: int = SIDE) -> Tensor:
    """Noise (rows 3 h w)."""
    return torch.randn(rows, 3, side, side, generator=torch.Generator().manual_seed(seed))


def spec(index: int = 0, method: str = "grad-cam", layers: Sequence[str] = ("relu#1",), **more: Any) -> Spec:
    """A spec, Grad-CAM of the prediction at the last map unless told otherwise."""
    return Spec(index=index, method=method, layers=tuple(layers), **more)


def of_class(index: int, score: Score = Score.LOGIT) -> Target:
    """A target by class index."""
    return Target(about=ClassIndex(index), score=score)


def results(events: Iterable[Forwarded | Mapped | Closed]) -> dict[tuple[int, int], list[RawMap | SpecFailed]]:
    """What each (row, spec) got."""
    found: dict[tuple[int, int], list[RawMap | SpecFailed]] = {}
    for event in events:
        if isinstance(event, Mapped):
            found.setdefault((event.row, event.result.spec_index), []).append(event.result)
    return found


def values_of(events: Iterable[Forwarded | Mapped | Closed]) -> dict[tuple[int, int, int], bytes]:
    """The bits of every map by (row, spec, rank)."""
    return {
        (row, index, result.target.rank): result.values.tobytes()
        for (row, index), listed in results(events).items()
        for result in listed
        if isinstance(result, RawMap)
    }


def failure(result: RawMap | SpecFailed) -> Exception:
    """The error of a result that is one."""
    assert isinstance(result, SpecFailed)
    return result.error


def every_method(layer: str = "relu#1") -> tuple[Spec, ...]:
    """One spec for each method."""
    return tuple(spec(index, slug, [layer]) for index, slug in enumerate(LAYERED))


# What the other rows of a batch may want; each is a row's specs.
COMPANIES: list[tuple[Spec, ...]] = [
    (),
    every_method(),
    (spec(method="eigen-cam", layers=["stem.0"]),),
    (spec(method="layercam", layers=["stem", "block", "relu#1"], target=of_class(1), fusion=Fusion.LAYERCAM),),
    (spec(target=Target(about=TopClasses(3))), spec(1, target=of_class(0, Score.SOFTMAX))),
    (spec(layers=["no such layer"]), spec(1, layers=["side"]), spec(2, target=of_class(99))),
]


def test_the_prediction_comes_before_any_gradient(model: PassModel) -> None:
    """When the first event is there, nothing has been differentiated yet."""
    CountBackward.passes = 0
    events = run_pass(model, images(2), [(spec(),), ()])

    first = next(events)

    assert isinstance(first, Forwarded)
    assert 0 == CountBackward.passes
    np.testing.assert_array_equal(
        model.program.run(images(2)).numpy(), np.stack([reading.scores for reading in first.readings])
    )
    assert [True, True] == first.finite.tolist()
    assert isinstance(list(events)[-1], Closed)
    assert 1 == CountBackward.passes


def test_thirty_two_rows_with_their_own_wishes_cost_one_gradient(model: PassModel) -> None:
    """Six methods, several layers and a different target in each row: still one backward pass."""
    CountBackward.passes = 0
    layers = itertools.cycle([["relu#1"], ["stem"], ["block", "relu#1"]])
    gradient_methods = ["grad-cam", "grad-cam++", "xgrad-cam", "hirescam", "layercam", "eigen-cam"]
    rows = [
        tuple(
            spec(index, slug, next(layers), target=of_class(row % CLASSES))
            for index, slug in enumerate(gradient_methods)
        )
        for row in range(32)
    ]

    events = list(run_pass(model, images(32), rows))

    assert 1 == CountBackward.passes
    assert 32 * 6 == len(values_of(events))
    closed = events[-1]
    assert isinstance(closed, Closed)
    assert 32 * 6 == closed.explanations
    assert min(closed.forward_seconds, closed.backward_seconds, closed.map_seconds) > 0


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        pytest.param([of_class(1), of_class(1)], 1, id="same class twice"),
        pytest.param([of_class(1), of_class(1, Score.SOFTMAX)], 2, id="two scores of a class"),
        pytest.param([of_class(1), Target(about=TopClasses(CLASSES))], CLASSES, id="one of all classes"),
    ],
)
def test_a_row_shares_gradients_with_itself(model: PassModel, targets: Sequence[Target], expected: int) -> None:
    """As many gradients as the row has distinct targets."""
    CountBackward.passes = 0

    list(run_pass(model, images(2), [tuple(spec(i, target=target) for i, target in enumerate(targets)), (spec(),)]))

    assert expected == CountBackward.passes


def test_forward_only_methods_cost_no_gradient(model: PassModel) -> None:
    """CAM and Eigen-CAM alone never go back, and CAM gives a map for each class."""
    CountBackward.passes = 0
    rows = [(spec(0, "cam", target=Target(about=TopClasses(3))), spec(1, "eigen-cam"))]

    found = values_of(run_pass(model, images(1), rows))

    assert 0 == CountBackward.passes
    assert {(0, 0, 0), (0, 0, 1), (0, 0, 2), (0, 1, 0)} == set(found)
    assert 4 == len(set(found.values()))


def test_maps_are_those_of_the_row_alone(net: TinyNet, model: PassModel) -> None:
    """Each row has its own target's map: those that autograd gives one by one, from first principles."""
    batch = images(4)
    rows = [(spec(0, slug, target=of_class(row)),) for row, slug in enumerate(["grad-cam", "hirescam"] * 2)]
    found = results(run_pass(model, batch, rows))

    for row, slug in enumerate(["grad-cam", "hirescam"] * 2):
        features = net.stem(batch[row, None])
        features = torch.relu(net.block(features) + features)
        last = torch.relu(net.down(features)).detach().requires_grad_()
        (gradient,) = torch.autograd.grad(net.head(last.mean(dim=(2, 3)))[0, row], last)
        weight = gradient.mean(dim=(2, 3), keepdim=True) if slug == "grad-cam" else gradient
        expected = (weight * last).sum(dim=1).clamp_min(0)[0].detach().numpy()
        (result,) = found[row, 0]
        assert isinstance(result, RawMap)
        assert (row, 1) == (result.target.class_index, result.target.count)
        np.testing.assert_allclose(expected, result.values, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("rows", "dtype", "whole_batch_maps", "side"),
    [
        *[(rows, torch.float32, False, SIDE) for rows in range(1, 9)],
        *[(rows, torch.float32, True, SIDE) for rows in (2, 5, 8)],
        *[(4, dtype, way, SIDE) for dtype in (torch.float64, torch.bfloat16, torch.float16) for way in (False, True)],
        # At this side maps of the last layer are made for the whole batch, components and those of the stem by row.
        *[(rows, torch.float32, None, LARGE_SIDE) for rows in (2, 5)],
    ],
)
def test_neighbours_do_not_change_a_bit(
    net: TinyNet,
    rows: int,
    dtype: torch.dtype,
    whole_batch_maps: bool | None,  # noqa: FBT001 - a test parameter
    side: int,
) -> None:
    """At equal batch size every map of a row has the same bits whatever the others are and ask for."""
    model = dataclasses.replace(model_of(net, dtype), whole_batch_maps=whole_batch_maps)
    place = rows // 2
    mine = (*every_method(), spec(97, layers=["stem", "relu#1"]), spec(98, target=of_class(2, Score.SOFTMAX)))
    seen = []
    for number, company in enumerate(COMPANIES):
        batch = images(rows, seed=number, side=side)
        batch[place] = images(1, seed=99, side=side)[0]
        wishes: list[tuple[Spec, ...]] = [company] * rows
        wishes[place] = mine
        events = list(run_pass(model, batch, wishes))
        bits = {key: value for key, value in values_of(events).items() if key[0] == place}
        assert isinstance(events[0], Forwarded)
        seen.append((events[0].readings[place].scores.tobytes(), bits))

    assert len(mine) == len(seen[0][1])
    for other in seen[1:]:
        assert seen[0] == other


def test_whole_batch_maps_are_those_of_rows(model: PassModel) -> None:
    """The two ways agree to rounding, for every method, several targets and several layers."""
    rows = [
        (*every_method(), *COMPANIES[3]),
        (),
        COMPANIES[4],
        (spec(0, "cam", target=Target(about=TopClasses(4))),),
    ]
    by_row, at_once = (
        [
            (event.row, event.result)
            for event in run_pass(dataclasses.replace(model, whole_batch_maps=way), images(4), rows)
            if isinstance(event, Mapped)
        ]
        for way in (False, True)
    )

    assert len(LAYERED) + 9 == len(by_row) == len(at_once)
    for (row, one), (other_row, other) in zip(by_row, at_once, strict=True):
        assert isinstance(one, RawMap)
        assert isinstance(other, RawMap)
        assert (row, one.target) == (other_row, other.target)
        np.testing.assert_allclose(one.values, other.values, rtol=1e-5, atol=1e-6 * max(abs(one.raw_min), one.raw_max))


@pytest.mark.parametrize("slug", LAYERED)
def test_company_of_ones_own_specs_does_not_change_a_bit(model: PassModel, slug: str) -> None:
    """A spec alone, and beside specs with other taps, targets and methods in the same row: the same bits."""
    alone = values_of(run_pass(model, images(3), [(spec(0, slug),), (), ()]))
    more = (spec(1, layers=["stem"]), spec(2, "layercam", ["stem.0", "block"], target=of_class(0)), *every_method()[2:])
    together = values_of(run_pass(model, images(3), [(*more, spec(99, slug)), (), ()]))

    assert alone[0, 0, 0] == together[0, 99, 0]


def test_spellings_of_a_layer_are_one_place(model: PassModel) -> None:
    """The bare name is the module's last call: same bits, each reported as it was asked for."""
    found = results(run_pass(model, images(1), [(spec(0, layers=["relu"]), spec(1, layers=["relu#1"]))]))
    bare, numbered = found[0, 0][0], found[0, 1][0]

    assert isinstance(bare, RawMap)
    assert isinstance(numbered, RawMap)
    assert (("relu",), ("relu#1",)) == (bare.layers, numbered.layers)
    assert bare.values.tobytes() == numbered.values.tobytes()


def test_one_failing_spec_sinks_no_other(model: PassModel) -> None:
    """Everything that can go wrong with a spec, around one that is right."""
    wrong: list[tuple[Spec, type[Exception], Reason]] = [
        (spec(0, "grad-cat"), Unsupported, Reason.METHOD_NOT_IMPLEMENTED),
        (spec(1, layers=["layer9"]), Unsupported, Reason.LAYER_UNUSABLE),
        (spec(2, "cam", ["stem"]), Unsupported, Reason.METHOD_UNSUPPORTED_BY_MODEL),
        (spec(3, target=of_class(CLASSES)), InvalidRequest, Reason.CLASS_OUT_OF_RANGE),
        (spec(4, layers=["side"]), Unsupported, Reason.TARGET_NOT_DIFFERENTIABLE),
        (spec(5, "hirescam", profile=Profile.TORCHCAM), Unsupported, Reason.METHOD_NOT_IMPLEMENTED),
        (
            spec(6, layers=["stem", "relu#1"], fusion=Fusion.PRODUCT, rectify=False),
            InvalidRequest,
            Reason.FIELD_INVALID,
        ),
        (spec(7, layers=["#"]), NotFound, Reason.LAYER_NOT_FOUND),
    ]
    layouts = {
        **model.layouts,
        "side": model.layouts["stem"].__class__(kind=model.layouts["stem"].kind, grid=(12, 12), channels=4),
    }
    model = dataclasses.replace(model, layouts=layouts)

    found = results(run_pass(model, images(2), [(*[one for one, _, _ in wrong], spec(8)), (spec(),)]))

    for one, kind, reason in wrong:
        (result,) = found[0, one.index]
        error = failure(result)
        assert isinstance(error, kind)
        assert reason == error.reason  # type: ignore[attr-defined]  # kind is a CamserveError.
    assert isinstance(found[0, 8][0], RawMap)
    assert isinstance(found[1, 0][0], RawMap)


def test_a_layer_that_the_program_refuses_sinks_no_other(model: PassModel) -> None:
    """Also when it only shows in the forward; each spec gets an error of its own to place."""
    model = dataclasses.replace(model, layouts={**model.layouts, "gone": model.layouts["stem"]})

    found = results(run_pass(model, images(1), [(spec(0, layers=["gone"]), spec(1), spec(2, layers=["gone", "stem"]))]))

    errors = [failure(found[0, index][0]) for index in (0, 2)]
    assert all(isinstance(error, NotFound) for error in errors)
    assert errors[0] is not errors[1]
    assert isinstance(found[0, 1][0], RawMap)


def test_cam_says_what_it_needs(model: PassModel) -> None:
    """The refusal names the one layer where its identity holds, and the method to use elsewhere."""
    found = results(run_pass(model, images(1), [(spec(method="cam", layers=["stem"]),)]))

    message = str(failure(found[0, 0][0]))
    assert "average over its cells" in message
    assert repr(model.head_layer) in message
    assert "grad-cam" in message


def test_operators_without_derivative_fail_only_layers_before_them() -> None:
    """The layer behind such an operator keeps its map, with the same bits as when asked alone."""

    class Opaque(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.before = nn.Conv2d(3, 4, 3)
            self.behind = nn.Conv2d(4, 4, 3)
            self.head = nn.Linear(4, 3)

        def forward(self, values: Tensor) -> Tensor:
            logits: Tensor = self.head(self.behind(NoDerivative.apply(self.before(values))).mean(dim=(2, 3)))
            return logits

    torch.manual_seed(0)
    model = model_of(Opaque())
    alone = values_of(run_pass(model, images(1), [(spec(1, layers=["behind"]),)]))

    events = list(run_pass(model, images(1), [(spec(0, layers=["before"]), spec(1, layers=["behind"]))]))

    error = failure(results(events)[0, 0][0])
    assert isinstance(error, Unsupported)
    assert "has no derivative" in str(error)
    assert alone == values_of(events)


def test_a_row_that_breaks_the_model_fails_alone(model: PassModel) -> None:
    """NaN in one image: its specs fail, it is marked, and its neighbours' maps keep their bits."""
    whole = images(3)
    rows = [every_method(), every_method(), every_method()]
    expected = values_of(run_pass(model, whole, rows))
    broken = whole.clone()
    broken[1, 0, 0, 0] = torch.nan

    events = list(run_pass(model, broken, rows))

    assert isinstance(events[0], Forwarded)
    assert [True, False, True] == events[0].finite.tolist()
    assert all(
        isinstance(failure(listed[0]), ExecutionFailed) for (row, _), listed in results(events).items() if row == 1
    )
    assert {key: bits for key, bits in expected.items() if key[0] != 1} == values_of(events)


def test_the_graph_is_gone_when_the_last_gradient_is_there() -> None:
    """Maps are encoded while the pass goes on, and its memory is free by then; without gradients there never is a graph."""
    model = model_of(GraphNet())
    gc.collect()
    top = Target(about=TopClasses(2))

    seen = {}
    for slug in ("grad-cam", "eigen-cam"):
        events = run_pass(model, images(1), [(spec(0, slug, ["conv"], target=top),)])
        seen[slug] = [len(CountGraphs.alive) for _ in events]

    # The prediction, a map for each of two targets or one for a method that has none, the end.
    assert {"grad-cam": [1, 1, 0, 0], "eigen-cam": [0, 0, 0]} == seen


def test_rows_nobody_waits_for_cost_nothing_more(model: PassModel) -> None:
    """A row cancelled after the forward gets no map, and its targets are not differentiated."""
    CountBackward.passes = 0
    wanted = {0, 1}
    rows = [(spec(),), (spec(target=Target(about=TopClasses(5))),)]
    events = run_pass(model, images(2), rows, is_wanted=wanted.__contains__)
    next(events)
    wanted.remove(1)

    assert {(0, 0)} == set(results(events))
    assert 1 == CountBackward.passes


def test_cancelling_between_maps_stops_them(model: PassModel) -> None:
    """The first map arrives, the caller leaves, and neither maps nor gradients follow."""
    CountBackward.passes = 0
    wanted = {0}
    rows = [(spec(target=Target(about=TopClasses(5))), spec(1))]
    after_first: list[Forwarded | Mapped | Closed] = []
    for event in run_pass(model, images(1), rows, is_wanted=wanted.__contains__):
        if not wanted:
            after_first.append(event)
        if isinstance(event, Mapped):
            wanted.clear()

    assert [Closed] == [type(event) for event in after_first]
    assert 1 == CountBackward.passes


def test_specs_that_turn_out_not_to_be_due_cost_nothing_more(model: PassModel) -> None:
    """Each is asked about once, after the prediction, with its row's own reading; those left out give neither map nor failure."""
    rows = [every_method(), (spec(), spec(1, layers=["no such layer"])), (spec(method="score-cam", layers=["relu#1"]),)]
    asked: list[tuple[int, int]] = []

    def is_due(row: int, spec_index: int, reading: Reading) -> bool:
        asked.append((row, spec_index))
        assert readings[row] is reading
        return False

    CountBackward.passes = 0
    events = run_pass(model, images(3), rows, is_due=is_due)
    first = next(events)
    assert isinstance(first, Forwarded)
    readings = first.readings
    assert [] == asked
    (closed,) = events

    assert sorted((row, item.index) for row, specs in enumerate(rows) for item in specs) == sorted(asked)
    assert isinstance(closed, Closed)
    assert (0, 0) == (CountBackward.passes, closed.explanations)


@pytest.mark.parametrize("company", COMPANIES)
def test_what_is_not_due_does_not_change_a_bit_of_the_rest(model: PassModel, company: tuple[Spec, ...]) -> None:
    """A row has the maps that it has with these neighbours anyway, and a row whose first spec is left out those of the others."""
    mine = (spec(), spec(1, "layercam"), spec(2, target=of_class(1)))
    expected = values_of(run_pass(model, images(3), [mine, mine, ()]))

    found = values_of(
        run_pass(
            model,
            images(3),
            [mine, mine, company],
            is_due=lambda row, spec_index, _reading: row == 0 or (row == 1 and spec_index > 0),
        )
    )

    assert {key: values for key, values in expected.items() if key[:2] != (1, 0)} == found


def test_a_spec_whose_need_cannot_be_told_fails_alone(model: PassModel) -> None:
    """What the predicate raises is that spec's failure."""
    error = ExecutionFailed(Reason.RULE_FAILED, "who knows")

    def is_due(row: int, spec_index: int, _reading: Reading) -> bool:
        if (row, spec_index) == (0, 1):
            raise error
        return True

    found = results(run_pass(model, images(2), [(spec(), spec(1)), (spec(),)], is_due=is_due))

    assert error is failure(found[0, 1][0])
    assert all(isinstance(found[key][0], RawMap) for key in [(0, 0), (1, 0)])


def test_a_batch_nobody_waits_for_is_not_run(model: PassModel) -> None:
    """Not even the forward."""
    events = list(run_pass(model, images(1), [(spec(),)], is_wanted=lambda _row: False))

    assert [Closed(forward_seconds=0, backward_seconds=0, map_seconds=0, explanations=0)] == events


def test_predictions_alone_need_no_taps(model: PassModel) -> None:
    """A batch without specs is a plain forward."""
    events = list(run_pass(model, images(2), [(), ()]))

    assert [Forwarded, Closed] == [type(event) for event in events]


def test_the_model_is_left_as_it_was(net: TinyNet, model: PassModel) -> None:
    """No gradient accumulated, no hook left, no weight changed, also when the consumer stops in the middle."""
    before = model.program.digests()
    events = run_pass(model, images(2), [every_method(), every_method()])
    assert isinstance(events, Iterator)
    next(events)
    next(events)
    del events
    list(run_pass(model, images(2), [every_method("stem"), ()]))

    assert before == model.program.digests()
    assert all(parameter.grad is None for parameter in net.parameters())
    assert not any(module._forward_hooks for module in net.modules())


def test_a_dead_target_gives_an_empty_map(net: TinyNet) -> None:
    """A class that no channel speaks for has zero gradient everywhere: zero, flagged, not an error."""
    with torch.no_grad():
        net.head.weight[3].zero_()
    model = model_of(net)

    found = results(
        run_pass(model, images(1), [tuple(spec(i, slug, target=of_class(3)) for i, slug in enumerate(LAYERED))])
    )

    for index, slug in enumerate(LAYERED):
        (result,) = found[0, index]
        assert isinstance(result, RawMap)
        # A method without a target, or one that contrasts it with others, has something to show all the same.
        is_about_it = METHODS[slug].has_target and METHODS[slug].contrast is None
        assert is_about_it == (MapFlag.EMPTY in result.flags)


def test_rectification_and_normalisation_are_the_callers(model: PassModel) -> None:
    """A signed map shows negative evidence; the raw range is the same either way."""
    rows = [(spec(0, rectify=False), spec(1), spec(2, normalisation=Normalisation.MIN_MAX))]
    signed, plain, normalised = (listed[0] for listed in results(run_pass(model, images(1), rows)).values())

    assert isinstance(signed, RawMap)
    assert isinstance(plain, RawMap)
    assert isinstance(normalised, RawMap)
    np.testing.assert_array_equal(np.maximum(signed.values, 0), plain.values)
    assert (
        (signed.raw_min, signed.raw_max) == (plain.raw_min, plain.raw_max) == (normalised.raw_min, normalised.raw_max)
    )
    assert (0.0, 1.0) == (normalised.values.min(), normalised.values.max())


def test_several_layers_give_one_map_at_the_finest(model: PassModel) -> None:
    """A 6 x 6 and a 12 x 12 layer fuse to 12 x 12."""
    (result,) = results(run_pass(model, images(1), [(spec(layers=["relu#1", "stem"]),)]))[0, 0]

    assert isinstance(result, RawMap)
    assert (12, 12) == result.values.shape
    assert np.float32 == result.values.dtype


@pytest.mark.parametrize(
    ("change", "error"),
    [
        pytest.param(lambda model: dataclasses.replace(model, classes=7), ExecutionFailed, id="classes"),
        pytest.param(lambda model: dataclasses.replace(model, output_path="out"), ExecutionFailed, id="path"),
    ],
)
def test_a_model_that_is_not_what_its_card_says_fails(
    model: PassModel, change: Callable[[PassModel], PassModel], error: type[Exception]
) -> None:
    """Before anything is sent."""
    with pytest.raises(error):
        next(run_pass(change(model), images(1), [(spec(),)]))


def test_specs_must_be_as_many_as_rows(model: PassModel) -> None:
    """Nothing is truncated."""
    with pytest.raises(ValueError, match="1 rows of specs for a batch of 2"):
        next(run_pass(model, images(2), [(spec(),)]))


def test_more_maps_than_the_server_makes_fail_the_spec_alone(model: PassModel) -> None:
    """Where only the outputs tell how many maps a target gives, the limit is held once they are there."""
    rows = [(spec(0, target=Target(about=ClassesAbove(0.0))), spec(1))]

    found = results(run_pass(dataclasses.replace(model, max_maps=CLASSES - 1), images(1), rows))

    error = failure(found[0, 0][0])
    assert isinstance(error, InvalidRequest)
    assert (Reason.TOO_MANY_SPECS, f"{CLASSES} maps" in str(error)) == (error.reason, True)
    assert isinstance(found[0, 1][0], RawMap)
