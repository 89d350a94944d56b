"""Which servers are compared, the command that starts each, and how each is asked.

Every server gets the same weights, at most the same number of rows in a pass and the same threads for torch; each waits the same
time for a batch to fill where it has such a setting. `__main__.py` starts one at a time.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable, Mapping
from contextlib import AbstractAsyncContextManager
from functools import partial
from pathlib import Path

from benchmarks.peers import answers
from benchmarks.peers.answers import MODEL, Ask
from benchmarks.peers.processes import free_ports

_SERVERS = Path(__file__).parent / "servers"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """What all servers share.

    Attributes:
        folder: with the materials; runtime files of servers go there too.
        python: interpreter of the peers' environment.
        max_batch: most rows in a pass.
        threads: torch's.
        window_seconds: how long peers wait for a batch to fill.
        device: "cpu" or "cuda".
    """

    folder: Path
    python: Path
    max_batch: int
    threads: int
    window_seconds: float
    device: str


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """One start of a server: the command, what it adds to the environment, and how to ask it."""

    command: tuple[str, ...]
    environment: Mapping[str, str]
    connect: Callable[[], AbstractAsyncContextManager[Ask]]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Contender:
    """A server in one configuration.

    Attributes:
        name: on the command line and in the JSON file.
        title: in the table.
        explains: whether its answers carry a heatmap.
        is_default: whether it takes part unless others are named.
        launch: prepares one start, on ports that are free now.
    """

    name: str
    title: str
    explains: bool
    is_default: bool
    launch: Callable[[Setup], Launch]


def _camserve(setup: Setup, *, precision: str, explains: bool) -> Launch:
    """`camserve serve` over a repository of one TorchScript archive: all settings at their defaults but those that are shared."""
    (port,) = free_ports(1)
    command = [str(Path(sys.executable).with_name("camserve")), "serve", "--log-level", "warning"]
    command += ["--models", str(setup.folder / f"repository-{precision}"), "--device", setup.device]
    command += ["--listen", f"127.0.0.1:{port}", "--metrics-listen", "", "--max-batch-rows", str(setup.max_batch)]
    command += ["--drain-delay-seconds", "0"]
    return Launch(
        command=tuple(command),
        environment={"CAMSERVE_TORCH_THREADS": str(setup.threads), "OMP_NUM_THREADS": str(setup.threads)},
        connect=partial(answers.camserve, port, explains=explains),
    )


def _script(setup: Setup, *, file: str, form: str, path: str, is_upload: bool) -> Launch:
    """LitServe and Ray Serve are started by a script of ours, as their guides do."""
    (port,) = free_ports(1)
    command = [str(setup.python), str(_SERVERS / file), "--port", str(port), "--form", form, "--device", setup.device]
    command += ["--weights", str(setup.folder / "resnet50.pth"), "--threads", str(setup.threads)]
    command += ["--max-batch", str(setup.max_batch), "--window", str(setup.window_seconds)]
    return Launch(
        command=tuple(command),
        environment=_peer_environment(setup),
        connect=partial(answers.http, port, path=path, is_upload=is_upload),
    )


def _mlserver(setup: Setup, *, form: str) -> Launch:
    """`mlserver start` over a folder with its two settings files; one parallel worker, its default, keeps the loop free."""
    grpc_port, http_port, metrics_port = free_ports(3)
    folder = setup.folder / f"mlserver-{form}" / MODEL
    folder.mkdir(parents=True, exist_ok=True)
    server = {
        "debug": False,
        "host": "127.0.0.1",
        "grpc_port": grpc_port,
        "http_port": http_port,
        "metrics_port": metrics_port,
    }
    (folder / "settings.json").write_text(json.dumps(server), encoding="utf-8")
    extra = {"form": form, "threads": setup.threads, "device": setup.device}
    model = {
        "name": MODEL,
        "implementation": "on_mlserver.Explaining",
        "max_batch_size": setup.max_batch,
        "max_batch_time": setup.window_seconds,
        "parameters": {"extra": {"weights": str(setup.folder / "resnet50.pth"), **extra}},
    }
    (folder / "model-settings.json").write_text(json.dumps(model), encoding="utf-8")
    return Launch(
        command=(str(setup.python.with_name("mlserver")), "start", str(folder)),
        environment=_peer_environment(setup),
        connect=partial(answers.open_inference, grpc_port),
    )


def _peer_environment(setup: Setup) -> dict[str, str]:
    return {
        "OMP_NUM_THREADS": str(setup.threads),
        "PYTHONPATH": str(_SERVERS),
        "PYTHONDONTWRITEBYTECODE": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
    }


def _peers() -> list[Contender]:
    forms = {
        "readme": "pytorch-grad-cam as its README",
        "tuned": "pytorch-grad-cam, weights frozen",
        "tuned-channels-last": "pytorch-grad-cam, weights frozen, channels last",
        "predict": "prediction only",
    }
    servers: dict[str, tuple[str, Callable[..., Launch]]] = {
        "litserve": ("LitServe", partial(_script, file="on_litserve.py", path="/predict", is_upload=True)),
        "ray": ("Ray Serve", partial(_script, file="on_ray.py", path="/", is_upload=False)),
        "mlserver": ("MLServer", _mlserver),
    }
    return [
        Contender(
            name=f"{server}-{form}",
            title=f"{title}, {words}",
            explains=form != "predict",
            is_default=server == "litserve" or form == "readme",
            launch=partial(launch, form=form),
        )
        for server, (title, launch) in servers.items()
        for form, words in forms.items()
    ]


CONTENDERS = {
    contender.name: contender
    for contender in (
        *(
            Contender(
                name=f"camserve-{precision}",
                title=f"camserve, {precision}",
                explains=True,
                is_default=True,
                launch=partial(_camserve, precision=precision, explains=True),
            )
            for precision in ("float32", "bfloat16")
        ),
        Contender(
            name="camserve-predict",
            title="camserve, float32, prediction only",
            explains=False,
            is_default=True,
            launch=partial(_camserve, precision="float32", explains=False),
        ),
        *_peers(),
    )
}
