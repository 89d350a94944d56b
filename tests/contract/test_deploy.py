"""Claims about what operators run: the image, the stack around it, its alerts and its dashboard.

Files are read, one health probe and one server are run; nothing here needs a container engine.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import sys
from asyncio import create_subprocess_exec
from asyncio.subprocess import PIPE
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import yaml
from prometheus_client import CollectorRegistry
from support.credentials import key_entry
from support.deployed import DASHBOARD, DEPLOY, ROOT, RULES, dashboard_queries, metric_names, panels
from support.servers import Metrics as MetricsPage
from support.servers import serving

from camserve.server.background import BackgroundServer
from camserve.server.health import Health
from camserve.server.metrics import Metrics
from camserve.server.pages import Pages
from camserve.server.settings import Settings

COMPOSE_FILES = sorted(DEPLOY.glob("compose*.yaml"))
DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8")

_TYPE = re.compile(r"^# TYPE (\S+) (\S+)$", re.MULTILINE)
_HISTOGRAM_SUFFIXES = ("_bucket", "_sum", "_count")


def series_names(page: str) -> set[str]:
    """Every series name that a metrics page can carry, from its TYPE lines: they come before any sample."""
    names = set()
    for name, kind in _TYPE.findall(page):
        if not name.endswith("_created"):
            names |= {name + suffix for suffix in _HISTOGRAM_SUFFIXES} if kind == "histogram" else {name}
    return names


def label_names(expression: str) -> set[str]:
    """The labels that an expression selects or groups by."""
    selected = re.findall(r"(\w+)\s*(?:=~|!~|!=|=)\s*\"", expression)
    grouped = re.findall(r"\b(?:by|on|without)\s*\(([^)]*)\)", expression)
    return {*selected, *(name.strip() for names in grouped for name in names.split(",") if name.strip())}


def dashboard_expressions() -> list[str]:
    """Everything that the dashboard sends to Prometheus."""
    variables = [entry["definition"] for entry in DASHBOARD["templating"]["list"] if entry["type"] == "query"]
    return dashboard_queries() + variables


def expressions() -> list[str]:
    """Everything that deploy/ asks Prometheus."""
    return dashboard_expressions() + [rule["expr"] for rule in RULES]


@pytest.fixture(scope="module")
def exported(demo_server: BackgroundServer) -> set[str]:
    """The series names on the metrics page of a running server."""
    return series_names(MetricsPage(demo_server).text())


def test_every_metric_asked_for_is_exported(exported: set[str]) -> None:
    """No panel and no alert waits for a metric that does not exist."""
    asked = {expression: metric_names(expression) for expression in expressions()}

    assert {} == {expression: names - exported for expression, names in asked.items() if names - exported}
    assert [] == [expression for expression, names in asked.items() if not names]


def test_every_label_asked_for_exists() -> None:
    """No panel and no alert selects or groups by a label that no instrument carries."""
    ours = {name for item in vars(Metrics()).values() for name in getattr(item, "_labelnames", ())}
    known = {*ours, "le", "instance", "job", "version", "torch"}
    asked = {expression: label_names(expression) for expression in expressions()}

    assert {} == {expression: names - known for expression, names in asked.items() if names - known}


def test_every_instrument_is_on_the_dashboard(exported: set[str]) -> None:
    """What is measured can be seen, without writing PromQL first."""
    shown = {name for expression in dashboard_expressions() for name in metric_names(expression)}
    stems = {re.sub(r"_(bucket|sum|count)$", "", name) for name in shown}
    ours = {re.sub(r"_(bucket|sum|count)$", "", name) for name in exported if name.startswith("camserve_")}

    assert set() == ours - stems


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: str(rule["alert"]))
def test_alert_tells_what_to_do(rule: dict[str, Any]) -> None:
    """Whoever is woken reads how bad it is, what happened and where to look, and not because of a single scrape."""
    assert rule["labels"]["severity"] in {"page", "ticket"}
    assert rule["annotations"]["summary"]
    assert len(rule["annotations"]["description"]) > 100
    assert rule["for"]


def test_alerts_have_a_place_in_the_documentation() -> None:
    """Every alert is explained in docs/operations.md."""
    text = (ROOT / "docs/operations.md").read_text(encoding="utf-8")

    assert [] == [rule["alert"] for rule in RULES if rule["alert"] not in text]


def test_rules_are_tested() -> None:
    """Every alert appears in the file of promtool's unit tests."""
    text = (DEPLOY / "prometheus/camserve.rules.test.yml").read_text(encoding="utf-8")

    assert [] == [rule["alert"] for rule in RULES if rule["alert"] not in text]


def test_panels_are_told_apart() -> None:
    """Panels have ids of their own, a title and a description, and do not overlap."""
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        cells = {(place["x"] + column, place["y"] + line) for column in range(place["w"]) for line in range(place["h"])}
        assert set() == taken & cells
        assert place["x"] + place["w"] <= 24
        taken |= cells

    assert len(DASHBOARD["panels"]) == len({panel["id"] for panel in DASHBOARD["panels"]})
    assert all(panel["title"] and panel["description"] for panel in panels())


def test_dashboard_asks_the_provisioned_data_source() -> None:
    """The dashboard's default data source is the one that compose provisions."""
    path = DEPLOY / "grafana/provisioning/datasources/prometheus.yaml"
    (source,) = yaml.safe_load(path.read_text(encoding="utf-8"))["datasources"]
    (variable,) = [entry for entry in DASHBOARD["templating"]["list"] if entry["type"] == "datasource"]

    assert source["uid"] == variable["current"]["value"]
    assert {"${datasource}"} == {panel["datasource"]["uid"] for panel in panels()}


@pytest.mark.parametrize("path", COMPOSE_FILES, ids=lambda path: path.name)
def test_compose_mounts_exist(path: Path) -> None:
    """Every file and folder that compose mounts is in the tree; a missing one would become an empty folder in the container."""
    compose = yaml.safe_load(path.read_text(encoding="utf-8"))
    named = set(compose.get("volumes", {}))
    sources = [mount.split(":")[0] for service in compose["services"].values() for mount in service.get("volumes", [])]

    assert [] == [source for source in sources if source not in named and not (DEPLOY / source).exists()]


def test_compose_pins_its_images() -> None:
    """Every image that is not built here carries a full version."""
    services = yaml.safe_load((DEPLOY / "compose.yaml").read_text(encoding="utf-8"))["services"]
    pulled = [service["image"] for service in services.values() if "build" not in service]

    assert pulled
    assert [] == [image for image in pulled if not re.search(r":v?\d+\.\d+\.\d+$", image)]


def test_compose_sets_existing_settings() -> None:
    """CAMSERVE_ variables name settings; a misspelt one would be ignored in silence."""
    given = set(re.findall(r"CAMSERVE_[A-Z_]+", DOCKERFILE + (DEPLOY / "compose.yaml").read_text(encoding="utf-8")))

    assert set() == given - {f"CAMSERVE_{name.upper()}" for name in Settings.model_fields}


def test_compose_waits_for_the_drain() -> None:
    """Compose does not kill a server that is still finishing accepted requests."""
    service = yaml.safe_load((DEPLOY / "compose.yaml").read_text(encoding="utf-8"))["services"]["camserve"]
    delay = float(service["environment"]["CAMSERVE_DRAIN_DELAY_SECONDS"])
    drain: float = Settings.model_fields["drain_seconds"].default

    assert int(service["stop_grace_period"].removesuffix("s")) > delay + drain


def test_prometheus_scrapes_the_metrics_port() -> None:
    """Prometheus asks the port that camserve listens on by default, under the job name that the alerts expect."""
    path = DEPLOY / "prometheus/prometheus.yml"
    jobs = {job["job_name"]: job for job in yaml.safe_load(path.read_text(encoding="utf-8"))["scrape_configs"]}
    port = Settings.model_fields["metrics_listen"].default.rpartition(":")[2]

    assert [f"camserve:{port}"] == jobs["camserve"]["static_configs"][0]["targets"]


def test_dockerfile_copies_what_exists() -> None:
    """Every source of a COPY is in the tree, and .dockerignore lets it into the build."""
    copies = [shlex.split(line)[1:] for line in DOCKERFILE.splitlines() if line.startswith("COPY ")]
    sources = [
        word
        for words in copies
        if not any(word.startswith("--from=") for word in words)
        for word in words[:-1]
        if not word.startswith("--")
    ]
    let_in = [
        line[1:] for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines() if line.startswith("!")
    ]

    assert sources
    assert [] == [source for source in sources if not (ROOT / source).exists()]
    assert [] == [
        source for source in sources if not any(source == name or source.startswith(f"{name}/") for name in let_in)
    ]


def test_image_is_not_root() -> None:
    """The last USER of the image is a number other than 0, which Kubernetes can check."""
    user = re.findall(r"^USER (\S+)$", DOCKERFILE, re.MULTILINE)[-1]

    assert int(user.split(":")[0]) > 0


def test_image_leaves_its_tools_behind() -> None:
    """What builds stays in the first stage: the last takes the environment and the parts of the container, nothing else."""
    last = DOCKERFILE[DOCKERFILE.rindex("\nFROM ") :]

    assert 2 == len(re.findall(r"^FROM ", DOCKERFILE, re.MULTILINE))
    assert ["/opt/camserve", "deploy/container/start"] == [
        next(word for word in line.split()[1:] if not word.startswith("--"))
        for line in last.splitlines()
        if line.startswith("COPY ")
    ]
    assert not re.search(r"\b(pip|uv|apt-get|curl)\b", re.sub(r"^#.*$", "", last, flags=re.MULTILINE))


def test_compose_builds_with_arguments_that_the_image_has() -> None:
    """Both files build the one Dockerfile, which tells CPU and CUDA apart by an argument."""
    builds = [
        service["build"].get("args", {})
        for path in COMPOSE_FILES
        for service in yaml.safe_load(path.read_text(encoding="utf-8"))["services"].values()
        if "build" in service
    ]

    assert [{"TORCH_BACKEND": ""}, {"TORCH_BACKEND": "cpu"}] == builds
    assert {"TORCH_BACKEND"} <= set(re.findall(r"^ARG (\w+)=", DOCKERFILE, re.MULTILINE))


def test_image_runs_the_probe_that_it_brings() -> None:
    """HEALTHCHECK names a file that COPY puts there."""
    command = re.search(r"^HEALTHCHECK .*\\\n\s+CMD (.*)$", DOCKERFILE, re.MULTILINE)

    assert command is not None
    assert ["python", "/usr/local/lib/camserve/healthcheck.py"] == json.loads(command[1])
    assert "deploy/container/healthcheck.py /usr/local/lib/camserve/\n" in DOCKERFILE


def test_image_exposes_the_default_ports() -> None:
    """EXPOSE names the ports that the settings default to."""
    ports = {Settings.model_fields[name].default.rpartition(":")[2] for name in ("listen", "metrics_listen")}

    assert ports == set(re.search(r"^EXPOSE (.*)$", DOCKERFILE, re.MULTILINE)[1].split())  # type: ignore[index]


@pytest.fixture
async def health_server() -> AsyncIterator[tuple[Health, int]]:
    """Our health service on a port of its own, serving."""
    server, health = grpc.aio.server(), Health()
    health.add_to(server)
    await health.set_server(is_serving=True)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    yield health, port
    await server.stop(None)


async def _probe(port: int, *arguments: str, page: str | None = None) -> tuple[int | None, str]:
    """Runs the image's health probe as Docker would, with gRPC on a port and the page at an address; "" for no page."""
    probe = await create_subprocess_exec(
        sys.executable,
        DEPLOY / "container/healthcheck.py",
        *arguments,
        env=os.environ
        | {"CAMSERVE_LISTEN": f"0.0.0.0:{port}"}
        | ({} if page is None else {"CAMSERVE_METRICS_LISTEN": page}),
        stderr=PIPE,
    )
    _, complaint = await probe.communicate()
    return probe.returncode, complaint.decode()


@pytest.mark.parametrize("reason", ["", "the device thread has stood still for 61 s"])
async def test_probe_asks_whether_the_server_is_alive(reason: str) -> None:
    """By the page of a server that has one: not ready is no reason to restart it, and what is one is passed on."""
    pages = Pages("127.0.0.1:0", CollectorRegistry(), liveness=lambda: reason, readiness=lambda: "loading")
    try:
        found = await _probe(1, page=f"0.0.0.0:{pages.port}")
    finally:
        pages.close()

    assert ((1, f"127.0.0.1:{pages.port}: 503: {reason}\n") if reason else (0, "")) == found


async def test_probe_fails_where_nothing_answers() -> None:
    """A process that is gone, or not there yet, is not alive."""
    status, complaint = await _probe(1, page="127.0.0.1:1")

    assert 1 == status
    assert complaint.startswith("127.0.0.1:1: no answer: ")


@pytest.mark.parametrize("arguments", [(), ("",), ("camserve.v1.ExplanationService",)])
async def test_probe_passes_a_serving_server(health_server: tuple[Health, int], arguments: tuple[str, ...]) -> None:
    """It asks for readiness when a service is named, and where there is no page."""
    assert (0, "") == await _probe(health_server[1], *arguments, page=None if arguments else "")


async def test_probe_fails_a_draining_server(health_server: tuple[Health, int]) -> None:
    """The probe fails, and says why, once the server drains."""
    health, port = health_server
    await health.drain()

    assert (1, f"127.0.0.1:{port}: NOT_SERVING\n") == await _probe(port, "")


async def test_probe_fails_an_unknown_model(health_server: tuple[Health, int]) -> None:
    """Asked for a model that is not there, the probe fails."""
    status, complaint = await _probe(health_server[1], "camserve/absent")

    assert 1 == status
    assert "NOT_FOUND" in complaint


async def test_probe_asks_a_server_with_tls_by_its_page(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is given no authority to trust; the page says whether the whole server is ready."""
    monkeypatch.setenv("CAMSERVE_TLS_CERTIFICATE", "server.pem")
    pages = Pages("127.0.0.1:0", CollectorRegistry(), liveness=lambda: "", readiness=lambda: "loading")
    try:
        found = await _probe(1, "", page=f"127.0.0.1:{pages.port}")
    finally:
        pages.close()

    assert (1, f"127.0.0.1:{pages.port}: 503: loading\n") == found


async def test_probe_shows_its_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that knows its callers tells of models to them alone."""
    key, entry = key_entry("probe", ["explain"])
    (tmp_path / "callers.toml").write_text(entry)
    with serving(callers=tmp_path / "callers.toml") as server:
        before = await _probe(server.app.port, "camserve/absent")
        monkeypatch.setenv("CAMSERVE_API_KEY", key)
        after = await _probe(server.app.port, "camserve/absent")
        whole = await _probe(server.app.port, "")

    assert "UNAUTHENTICATED" in before[1]
    assert "NOT_FOUND" in after[1]
    assert (0, "") == whole


@pytest.mark.parametrize(
    ("given", "expected"), [("/srv/models", "/srv/models"), ("", "/models" if Path("/models").is_dir() else "")]
)
async def test_start_keeps_a_named_repository(given: str, expected: str) -> None:
    """The image's entry point takes /models only when nothing else was named and something is mounted there."""
    shown = await create_subprocess_exec(
        DEPLOY / "container/start",
        "sh",
        "-c",
        'printf %s "$CAMSERVE_REPOSITORY"',
        env=os.environ | {"CAMSERVE_REPOSITORY": given},
        stdout=PIPE,
    )

    assert expected.encode() == (await shown.communicate())[0]
