"""What callers do in the soak: one act each, drawn again and again, with the statuses that are right for it.

`mixture.py` draws them; each act is a coroutine over a stub that returns what became of it. Some acts show whose answer they got,
some are wrong on purpose, some leave, some read slowly, some reload a model.
"""

from __future__ import annotations

import asyncio
import dataclasses
import io
import random
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path

import grpc
import numpy as np
import torch
from PIL import Image
from support import identity, streams
from support.nets import TinyNet

from camserve.client import Spec
from camserve.v1 import (
    explanation_service_pb2,
    explanation_service_pb2_grpc,
    input_pb2,
    model_service_pb2,
    model_service_pb2_grpc,
)

__all__ = ["ACTS", "PROBE", "Act", "Callers", "Outcome", "write_repository"]

_SIDE = 64
_FAST = (
    "cam", "grad-cam", "grad-cam++", "xgrad-cam", "hirescam", "layercam", "eigen-cam", "finer-cam", "shapley-cam", "fullgrad",
    "vanilla-backprop", "guided-backprop", "gradient-times-input",
)  # fmt: skip
_AMPLIFIED = (
    Spec("score-cam", channels=8),
    Spec("ablation-cam"),
    Spec("occlusion", window=16, stride=8),
    Spec("smoothgrad", samples=8, saliency="gray"),
    Spec("integrated-gradients", steps=16, saliency="gray"),
    Spec("rise", samples=64, allow_partial=True),
)
_ENCODINGS = ("float32", "float16", "uint8", "png8", "png16", "overlay-jpeg")
_SIZES = ((64, 64), (320, 240), (1024, 768))
_LANES = (
    explanation_service_pb2.LANE_INTERACTIVE,
    explanation_service_pb2.LANE_STANDARD,
    explanation_service_pb2.LANE_BULK,
)
# A machine that is busy with something else may keep callers out: they are told so at once, and that is right.
_BUSY = "RESOURCE_EXHAUSTED"


@dataclasses.dataclass(frozen=True, slots=True)
class Callers:
    """Where acts send to, and what they choose by.

    Attributes:
        explain: to ask.
        models: to load and unload.
        repository: whose models are served.
        reloading: held by the one who changes which are.
        chance: of this act alone.
        number: of this act.
    """

    explain: explanation_service_pb2_grpc.ExplanationServiceStub
    models: model_service_pb2_grpc.ModelServiceStub
    repository: Path
    reloading: asyncio.Lock
    chance: random.Random
    number: int


@dataclasses.dataclass(frozen=True, slots=True)
class Outcome:
    """What became of an act: a gRPC status, and what was wrong besides, in words."""

    status: str
    wrong: Sequence[str] = ()


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Act:
    """One kind of caller.

    Attributes:
        name: for the report.
        weight: how often, against others.
        allowed: the statuses that are right.
        perform: does it once.
    """

    name: str
    weight: float
    allowed: frozenset[str]
    perform: Callable[[Callers], Awaitable[Outcome]]


def write_repository(folder: Path) -> Path:
    """Writes the models: those that repeat what they are shown, one with layers, and one that is reloaded."""
    identity.write_repository(folder)
    for name in ("net", "reloaded"):
        (folder / name / "1").mkdir(parents=True)
        (folder / name / "model.toml").write_text(f"[input]\nsize = [{_SIDE}, {_SIDE}]\n", encoding="utf-8")
        torch.jit.save(torch.jit.script(TinyNet().eval()), str(folder / name / "1" / "model.pt"))
    return folder


async def _told(call: grpc.aio.UnaryStreamCall, maps: int) -> Outcome:
    """Reads an answer to its end; one that is OK has a prediction, so many maps and a summary."""
    events: list[str] = []
    try:
        events.extend([message.WhichOneof("event") async for message in call])
    except grpc.aio.AioRpcError as error:
        return Outcome(error.code().name)
    expected = ["prediction", *["heatmap"] * maps, "summary"]
    return Outcome("OK", () if events == expected else [f"the answer was {events}"])


def _request(callers: Callers, specs: Sequence[Spec], **fields: object) -> explanation_service_pb2.ExplainRequest:
    given = {"model": "net", "specs": [spec.to_proto() for spec in specs], **fields}
    asked = explanation_service_pb2.ExplainRequest(**given)
    if not asked.WhichOneof("input"):
        asked.image.data = callers.chance.choice(_IMAGES)
    return asked


async def _probe(callers: Callers) -> Outcome:
    tensor = input_pb2.Tensor(data_type=input_pb2.DATA_TYPE_FLOAT32, shape=(3, _SIDE, _SIDE), data=_ROW)
    asked = _request(callers, [Spec("grad-cam")], tensor=tensor, lane=explanation_service_pb2.LANE_INTERACTIVE)
    return await _told(callers.explain.Explain(asked, timeout=60), maps=1)


async def _explains(callers: Callers) -> Outcome:
    chance = callers.chance
    specs = [
        Spec(method) if method in {"vanilla-backprop", "guided-backprop", "gradient-times-input"} else
        Spec(method, encoding=chance.choice(_ENCODINGS))
        for method in chance.choices(_FAST, k=chance.randint(1, 4))
    ]  # fmt: skip
    asked = _request(callers, specs, lane=chance.choice(_LANES))
    return await _told(callers.explain.Explain(asked, timeout=60), maps=len(specs))


async def _amplifies(callers: Callers) -> Outcome:
    asked = _request(callers, [callers.chance.choice(_AMPLIFIED)], lane=callers.chance.choice(_LANES))
    return await _told(callers.explain.Explain(asked, timeout=60), maps=1)


async def _mirrors(callers: Callers) -> Outcome:
    (stream,) = streams.draw(1, seed=callers.number)
    stream = dataclasses.replace(stream, number=callers.number)
    messages, status = await streams.send(callers.explain, stream)
    return Outcome(status, streams.faults(stream, messages, status) if status != _BUSY else ())


async def _reads_slowly(callers: Callers) -> Outcome:
    specs = [Spec("grad-cam", target=index, size="source", encoding="float32", rectify=False) for index in range(4)]
    image = input_pb2.EncodedImage(data=_IMAGES[-1])
    call = callers.explain.Explain(_request(callers, specs, image=image), timeout=60)
    try:
        await call.read()
    except grpc.aio.AioRpcError as error:
        return Outcome(error.code().name)
    # What a slow reader does is wait: nothing else happens then.
    await asyncio.sleep(callers.chance.uniform(0.5, 2.0))
    count = 0
    try:
        while await call.read() is not grpc.aio.EOF:
            count += 1
    except grpc.aio.AioRpcError as error:
        return Outcome(error.code().name)
    return Outcome("OK", () if count == 5 else [f"{count} messages after the prediction"])


async def _asks_wrongly(callers: Callers) -> Outcome:
    chance = callers.chance
    bad = [
        ("NOT_FOUND", _request(callers, [], model="nobody")),
        ("NOT_FOUND", _request(callers, [Spec("grad-cam", layers=["nowhere"])])),
        ("INVALID_ARGUMENT", _request(callers, [Spec("grad-cam", target=99)])),
        ("INVALID_ARGUMENT", _request(callers, [], image=input_pb2.EncodedImage(data=chance.randbytes(2000)))),
        ("INVALID_ARGUMENT", _request(callers, [], image=input_pb2.EncodedImage(data=_IMAGES[1][:500]))),
        (
            "INVALID_ARGUMENT",
            _request(
                callers, [], tensor=input_pb2.Tensor(data_type=input_pb2.DATA_TYPE_FLOAT32, shape=(3, 5), data=b"")
            ),
        ),
    ]
    expected, asked = chance.choice(bad)
    outcome = await _told(callers.explain.Explain(asked, timeout=60), maps=0)
    return Outcome("REFUSED") if outcome.status == expected else Outcome(outcome.status, [f"{expected} was expected"])


async def _reloads(callers: Callers) -> Outcome:
    """Gives a model new files, or takes it out of memory and back: whoever asks it meanwhile is told what is right."""
    asked = _request(callers, [Spec("grad-cam")], model="reloaded")
    load = model_service_pb2.LoadModelRequest(model="reloaded")
    async with callers.reloading:
        try:
            if callers.chance.random() < 0.5:
                (callers.repository / "reloaded" / "1" / "model.pt").touch()
                loading = asyncio.ensure_future(callers.models.LoadModel(load, timeout=60))
                # The old one answers until the new one does.
                meanwhile = await _told(callers.explain.Explain(asked, timeout=60), maps=1)
                await loading
            else:
                await callers.models.UnloadModel(model_service_pb2.UnloadModelRequest(model="reloaded"), timeout=60)
                meanwhile = await _told(callers.explain.Explain(asked, timeout=60), maps=1)
                if meanwhile.status == "NOT_FOUND":
                    meanwhile = Outcome("OK")
                await callers.models.LoadModel(load, timeout=60)
        except grpc.aio.AioRpcError as error:
            return Outcome(error.code().name, [error.details() or ""])
        if meanwhile.status != "OK" or meanwhile.wrong:
            return meanwhile
        return await _told(callers.explain.Explain(asked, timeout=60), maps=1)


def _act(name: str, weight: float, perform: Callable[[Callers], Awaitable[Outcome]], *allowed: str) -> Act:
    return Act(name=name, weight=weight, allowed=frozenset({*allowed, _BUSY}), perform=perform)


PROBE = _act("probe", 0, _probe, "OK")
"""Always the same small request: its times are what is compared from beginning to end."""

ACTS: Mapping[str, Act] = {
    act.name: act
    for act in (
        _act("explains", 8, _explains, "OK"),
        _act("amplifies", 2, _amplifies, "OK"),
        _act("mirrors", 8, _mirrors, "OK", "CANCELLED", "DEADLINE_EXCEEDED"),
        _act("reads slowly", 0.5, _reads_slowly, "OK"),
        _act("asks wrongly", 2, _asks_wrongly, "REFUSED"),
        _act("reloads", 0.2, _reloads, "OK"),
    )
}


def _jpeg(width: int, height: int) -> bytes:
    pixels = np.random.default_rng(width).integers(0, 256, (height // 8, width // 8, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).resize((width, height)).save(file, "JPEG")
    return file.getvalue()


_IMAGES = [_jpeg(width, height) for width, height in _SIZES]
_ROW = np.random.default_rng(0).standard_normal((3, _SIDE, _SIDE)).astype("<f4").tobytes()
