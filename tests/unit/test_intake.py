from __future__ import annotations

import pytest
from support.cards import job, spec

from camserve.server import jobs
from camserve.server.intake import is_quickly_taken_in


def tensor(elements: int) -> jobs.TensorInput:
    """Of so many float32 elements."""
    return jobs.TensorInput(dtype="float32", shape=(elements,), data=bytes(4 * elements))


IMAGE = jobs.EncodedImage(data=b"not looked at")
FRAME = jobs.RawFrame(pixel_format=jobs.PixelFormat.MONO8, width=1, height=1, stride=1, data=b"0")
RESNET_ELEMENTS = 3 * 224 * 224


def test_a_tensor_as_for_resnet_50_is_read_at_once():
    """The way to a worker thread and back would take as long."""
    assert is_quickly_taken_in(job(spec(), payload=tensor(RESNET_ELEMENTS)))


@pytest.mark.parametrize(
    "changes",
    [
        {"payload": IMAGE},
        {"payload": FRAME},
        {"payload": tensor(2 * RESNET_ELEMENTS)},
        {"payload": tensor(RESNET_ELEMENTS), "extra_inputs": {"other": tensor(RESNET_ELEMENTS)}},
    ],
    ids=["image", "frame", "large tensor", "several tensors"],
)
def test_what_may_take_long_goes_to_a_worker(changes):
    """The event loop serves everybody: it decodes nothing, and reads little."""
    assert not is_quickly_taken_in(job(spec(), **changes))


@pytest.mark.parametrize(
    "about",
    [
        jobs.Region(index=0, pixels=jobs.Mask((1, 1), b"1")),
        jobs.DetectionBox(jobs.Box(left=0, top=0, width=1, height=1), None, 0.5),
        jobs.Reference(IMAGE),
    ],
    ids=["region", "box", "reference"],
)
def test_targets_to_be_placed_go_to_a_worker(about):
    """Masks and references may be as large as photographs."""
    assert not is_quickly_taken_in(job(spec(target=jobs.Target(about=about)), payload=tensor(1)))
