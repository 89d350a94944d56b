"""Rewritten forms of a program, the trial they have to pass, and what goes to the program as loaded."""

from __future__ import annotations

import io

import pytest
import torch
from torch import Tensor, nn

from camserve.server.engine.eager import EagerProgram
from camserve.server.engine.export import ExportProgram
from camserve.server.engine.planned import FUSED, ORIGINAL, REWRITTEN, PlannedProgram
from camserve.server.engine.plans import choose_plan, choose_threads
from camserve.server.engine.program import INPUT, BackwardRule, TapName
from camserve.server.engine.script import load_script

CPU = torch.device("cpu")


class Block(nn.Module):
    """Two convolutions with normalisation, the second around a sum; what the first makes is read once more."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(channels, affine=False)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, value: Tensor) -> Tensor:  # noqa: D102 - a model's forward
        hidden = self.relu(self.bn1(self.conv1(value)))
        return self.relu(self.bn2(self.conv2(hidden)) + value)


class Net(nn.Module):
    """Residual blocks, one convolution whose value is used twice, and a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 32, 3, stride=2, padding=1), nn.BatchNorm2d(32), nn.ReLU())
        self.block1 = Block(32)
        self.twice = nn.Conv2d(32, 32, 1)
        self.bn = nn.BatchNorm2d(32)
        self.block2 = Block(32)
        self.head = nn.Linear(32, 5)

    def forward(self, value: Tensor) -> Tensor:  # noqa: D102 - a model's forward
        made = self.twice(self.block1(self.stem(value)))
        return self.head(self.block2(self.bn(made) + 0.1 * made).mean((2, 3)))


@pytest.fixture(params=["scripted", "traced", "eager"])
def program(request):
    """The net in each kind that can be folded, with statistics that are not those of a fresh normalisation."""
    torch.manual_seed(0)
    net = Net().eval()
    for child in net.modules():
        if isinstance(child, nn.BatchNorm2d):
            child.running_mean.normal_(0, 0.3)
            child.running_var.uniform_(0.5, 2)
            if child.affine:
                nn.init.uniform_(child.weight, 0.5, 1.5)
                nn.init.normal_(child.bias, 0, 0.3)
    if request.param == "eager":
        return EagerProgram(net, device=CPU, dtype=torch.float64)
    archive = torch.jit.script(net) if request.param == "scripted" else torch.jit.trace(net, images(2).float())
    file = io.BytesIO()
    torch.jit.save(archive, file)
    file.seek(0)
    return load_script(file, device=CPU, dtype=torch.float64)


def images(rows: int, size: int = 32) -> Tensor:
    """Noise, the same every time."""
    return torch.randn(rows, 3, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def planned(program, *, channels_last: bool) -> PlannedProgram:
    """Both forms."""
    program.run(images(2))
    form = program.rewritten([images(2)], channels_last=channels_last)
    assert form is not None
    return PlannedProgram(program, form, is_channels_last=channels_last)


@pytest.mark.parametrize("channels_last", [False, True])
def test_a_rewritten_form_is_the_program_to_rounding(program, channels_last):
    """Outputs, activations and gradients at block outputs and at normalisations equal those of the program as loaded."""
    rewritten = planned(program, channels_last=channels_last)
    batch = images(3)
    taps = [TapName.parse(name) for name in ("stem.1", "block1", "bn", "block2.bn1", "block2")]

    assert rewritten.form_of(taps) == REWRITTEN
    torch.testing.assert_close(rewritten.run(batch), program.run(batch), rtol=1e-10, atol=1e-12)
    ours, theirs = rewritten.capture(taps, batch), program.capture(taps, batch)
    gradients = [
        torch.autograd.grad(captured.outputs[:, 1].sum(), [captured.activations[tap] for tap in taps])
        for captured in (ours, theirs)
    ]
    for place, tap in enumerate(taps):
        torch.testing.assert_close(ours.activations[tap], theirs.activations[tap], rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(gradients[0][place], gradients[1][place], rtol=1e-10, atol=1e-12)


def test_layers_that_were_folded_away_are_captured_as_loaded(program):
    """A convolution in front of a folded normalisation still gives its own value, from the program as loaded."""
    rewritten = planned(program, channels_last=True)
    folded, kept = TapName.parse("block1.conv1"), TapName.parse("twice")
    batch = images(2)

    assert rewritten.form_of([folded, kept]) == ORIGINAL
    assert rewritten.form_of([kept]) == REWRITTEN
    captured = rewritten.capture([folded], batch)
    assert torch.equal(captured.activations[folded], program.capture([folded], batch).activations[folded])


def test_a_value_that_is_read_twice_is_not_folded(program):
    """The convolution whose own value goes on beside the normalised one keeps it."""
    rewritten = planned(program, channels_last=False)
    tap = TapName.parse("twice")
    ours, theirs = (form.capture([tap], images(2)).activations[tap] for form in (rewritten, program))
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def test_front_and_tail_of_a_rewritten_form_add_up_to_it(program):
    """Cut at a block, both halves of the rewritten form give its outputs bit for bit."""
    rewritten = planned(program, channels_last=True)
    cut = rewritten.cut(TapName.parse("block1"))

    activation, crossing = cut.front(images(2))

    assert torch.equal(cut.tail(activation, crossing), rewritten.run(images(2)))


def test_a_rows_bits_do_not_depend_on_where_its_neighbours_are_tapped(program):
    """The value at the deepest layer has the same bits whether or not a shallower one is tapped beside it."""
    rewritten = planned(program, channels_last=True)
    deep, shallow = TapName.parse("block2"), TapName.parse("stem.2")

    alone = rewritten.capture([deep], images(4)).activations[deep]

    assert torch.equal(alone, rewritten.capture([deep, shallow], images(4)).activations[deep])


def test_other_rules_and_questions_go_to_the_program_as_loaded(program):
    """Guided gradients, biases, digests and calls are those of the program as loaded."""
    rewritten = planned(program, channels_last=True)
    batch = images(2).requires_grad_()

    if isinstance(program, EagerProgram):
        assert rewritten.calls() == program.calls()
    else:
        guided = [
            torch.autograd.grad(form.capture([], batch, rule=BackwardRule.GUIDED).outputs.sum(), batch)[0]
            for form in (rewritten, program)
        ]
        assert torch.equal(*guided)
    assert rewritten.digests() == program.digests()
    assert rewritten.biases().keys() == program.biases().keys()


def test_a_small_program_is_left_as_it_is(program):
    """Where launching operators is most of the work no form is tried."""
    plan = choose_plan(program, [images(1, size=8)], [TapName.parse("block2")])

    assert (plan.name, plan.program) == ("as loaded", program)


class Moody(nn.Module):
    """Takes another way for every other forward, so that what one of them shows is not the whole truth."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 64, 3, padding=1)
        self.bn = nn.BatchNorm2d(64)
        self.more = nn.Conv2d(64, 1024, 3, padding=1)
        self.forwards = 0

    def forward(self, value: Tensor) -> Tensor:  # noqa: D102 - a model's forward
        self.forwards += 1
        made = self.conv(value)
        normalised = self.bn(made)
        value = normalised if self.forwards % 2 else normalised + made
        return self.more(nn.functional.avg_pool2d(value, 16)).mean((2, 3))


def test_a_form_that_computes_something_else_is_refused():
    """A form whose outputs are not those of the program does not serve, however fast it is."""
    torch.manual_seed(0)
    net = Moody().eval()
    net.bn.running_mean.fill_(2.0)
    program = EagerProgram(net, device=CPU, dtype=torch.float32)

    plan = choose_plan(program, [images(4, size=224).float()], [TapName.parse("more")])

    assert (plan.name, plan.program) == ("as loaded", program)


def test_an_exported_program_is_given_its_inputs_channels_last():
    """An export keeps its operators; its values in the other layout are the same to rounding."""
    torch.manual_seed(0)
    net = Net().eval().double()
    rows = torch.export.Dim("rows", min=1, max=64)
    program = ExportProgram(
        torch.export.export(net, (images(2),), dynamic_shapes=({0: rows},)), device=CPU, dtype=torch.float64
    )
    rewritten = planned(program, channels_last=True)
    tap = TapName.parse("block2")

    ours, theirs = (form.capture([tap], images(3)).activations[tap] for form in (rewritten, program))

    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def test_short_work_gets_one_thread():
    """What one thread does in no time gets no more of them; the number in use is as it was afterwards."""
    before = torch.get_num_threads()

    assert choose_threads(lambda: torch.zeros(1), 2, CPU) == 1
    assert torch.get_num_threads() == before


def test_a_front_is_fused_up_to_the_default_layer():
    """A pass that taps nothing else runs on the fused form, with the values and gradients of the program to rounding."""
    torch.manual_seed(0)
    file = io.BytesIO()
    torch.jit.save(torch.jit.script(Net().eval()), file)
    file.seek(0)
    program = load_script(file, device=CPU)
    form = program.rewritten([images(2)], channels_last=True)
    tap, batch = TapName.parse("block2"), images(4, size=64).float()
    cut = form.fused(tap)
    assert cut is not None
    fused = PlannedProgram(program, form, is_channels_last=True, fused=cut, fused_at=[tap, TapName.parse("block2#0")])

    assert fused.form_of([]) == fused.form_of([tap]) == fused.form_of([TapName.parse("block2#0")]) == FUSED
    assert fused.form_of([tap, TapName.parse("block1")]) == fused.form_of([INPUT]) == REWRITTEN
    assert torch.equal(fused.run(batch), fused.capture([tap], batch).outputs)
    ours, theirs = fused.capture([tap], batch), program.capture([tap], batch)
    torch.testing.assert_close(ours.outputs, theirs.outputs, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours.activations[tap], theirs.activations[tap], rtol=1e-4, atol=1e-5)
    gradients = [
        torch.autograd.grad(captured.outputs[:, 1].sum(), [captured.activations[tap]])[0] for captured in (ours, theirs)
    ]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)
    assert not fused.capture([tap], batch, differentiable=False).activations[tap].requires_grad

    # Amplified methods differentiate back to the input where grad mode is off.
    reached = batch.clone().requires_grad_()
    with torch.no_grad():
        back = fused.capture([], reached)
    assert torch.autograd.grad(back.outputs.sum(), [reached])[0].any()
