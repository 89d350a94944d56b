"""A storm of requests over one server: who asks for what, who leaves early and how, and what each of them got.

`tests/e2e/test_storm.py` draws the requests from a seed, lets client threads send them, and compares what arrived with maps made
elsewhere, one request at a time.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import enum
import itertools
import random
import threading
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from support.fragile import MARK

from camserve.client import CamserveError, Client, Event, Heatmap, Spec, SpecError, Summary, TensorInput

__all__ = ["Answer", "Leaving", "Request", "Scene", "draw", "marked", "send_all"]


class Leaving(enum.StrEnum):
    """How a request ends for its caller."""

    STAYS = "stays"
    CANCELS = "cancels"
    """Its caller reads some events and no more."""
    DISCONNECTS = "disconnects"
    """Its caller's connection is closed, at any stage."""
    HURRIES = "hurries"
    """Its deadline comes, at any stage."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """What may be asked of one model.

    Attributes:
        model: its name.
        inputs: each can be sent.
        specs: each can be asked for.
    """

    model: str
    inputs: Sequence[npt.NDArray[np.float32]]
    specs: Sequence[Spec]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One of the storm.

    Attributes:
        scene: about which model.
        place: of the input in the scene.
        specs: what is asked.
        leaving: how it ends.
        events: how many events are taken by a caller that cancels.
        patience_seconds: of those whose time or connection ends at any stage.
    """

    scene: Scene
    place: int
    specs: tuple[Spec, ...]
    leaving: Leaving
    events: int
    patience_seconds: float


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What came.

    Attributes:
        request: to which.
        digests: of each map that arrived, also before it ended early, with the indices of its spec and its target.
        errors: the specs that failed, with the reasons.
        batch_rows: of the pass; None where the summary did not arrive.
        failure: the status and reason with which it ended early; empty where it did not, or its caller left.
    """

    request: Request
    digests: tuple[tuple[int, int, str], ...]
    errors: tuple[tuple[int, str], ...]
    batch_rows: int | None
    failure: str


def draw(scenes: Sequence[Scene], count: int, seed: int) -> list[Request]:
    """So many requests; two in five leave early, in one of three ways."""
    chance = random.Random(seed)  # noqa: S311 - no secret
    ways = [Leaving.STAYS] * 6 + [Leaving.CANCELS, Leaving.CANCELS, Leaving.DISCONNECTS, Leaving.HURRIES]
    requests = []
    for _ in range(count):
        scene = chance.choice(scenes)
        specs = tuple(chance.choices(scene.specs, k=chance.randint(1, 3)))
        requests.append(
            Request(
                scene=scene,
                place=chance.randrange(len(scene.inputs)),
                specs=specs,
                leaving=chance.choice(ways),
                events=chance.randint(1, len(specs) + 1),
                patience_seconds=chance.uniform(0.001, 0.05),
            )
        )
    return requests


def send_all(target: str, requests: Sequence[Request], threads: int) -> list[Answer]:
    """Sends all of them from that many threads, each with a client of its own."""

    def work(mine: Sequence[Request]) -> list[Answer]:
        with Client(target, timeout=180) as client:
            return [_sent(client, request) for request in mine]

    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        shares = pool.map(work, [requests[first::threads] for first in range(threads)])
        return [given for share in shares for given in share]


def _sent(client: Client, request: Request) -> Answer:
    """Sends one request and takes of it what its caller stays for."""
    if request.leaving is not Leaving.DISCONNECTS:
        return _answer(client, request)
    with Client(client.target, timeout=180) as own:
        closing = threading.Timer(request.patience_seconds, own.close)
        closing.start()
        given = _answer(own, request)
        closing.cancel()
        closing.join()
    return given


def _answer(client: Client, request: Request) -> Answer:
    events = client.stream(
        TensorInput(request.scene.inputs[request.place]),
        model=request.scene.model,
        specs=request.specs,
        timeout=request.patience_seconds if request.leaving is Leaving.HURRIES else 180.0,
    )
    most = request.events if request.leaving is Leaving.CANCELS else None
    taken: list[Event] = []
    failure = ""
    try:
        with contextlib.closing(events):
            taken.extend(itertools.islice(events, most))
    except CamserveError as error:
        failure = f"{error.code} {error.reason}"
    return Answer(
        request=request,
        digests=tuple(
            (event.spec_index, event.target_index, event.raw_sha256) for event in taken if isinstance(event, Heatmap)
        ),
        errors=tuple((event.spec_index, event.error.reason) for event in taken if isinstance(event, SpecError)),
        batch_rows=next((event.batch_rows for event in taken if isinstance(event, Summary)), None),
        failure=failure,
    )


def marked(values: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """The input with the mark at which `fragile.Breaks` breaks."""
    values = values.copy()
    values[:, 0, 0] = MARK
    return values
