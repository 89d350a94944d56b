"""A real Prometheus over a loaded server: what deploy/ and docs/ promise of metrics, alerts and dashboard, seen from outside."""

from __future__ import annotations

import asyncio
import collections
import math
import re
import subprocess
from collections.abc import Iterator, Mapping

import grpc
import pytest
from support.credentials import key_entry
from support.deployed import DEPLOY, ROOT, RULES, dashboard_queries, metric_names
from support.identity import MODELS, Kind, request, write_repository
from support.load import Served, served_folder
from support.prometheus import Prometheus, prometheus
from support.streams import draw, send_all

from camserve.client import Client, Credentials, Unauthenticated
from camserve.v1 import explanation_service_pb2_grpc

pytestmark = pytest.mark.needs_prometheus

# Small enough that the image of `Kind.IMAGE` is refused at the door.
SETTINGS = {"max_held_bytes": 1 << 20, "slice_seconds": 0.001, "torch_threads": 1, "log_level": "error"}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """Two models that work, one of them with a rule whose sample leaves everybody out, and one that cannot be loaded."""
    folder = tmp_path_factory.mktemp("scraped")
    repository = write_repository(folder / "models")
    with (repository / MODELS[0] / "model.toml").open("a", encoding="utf-8") as card:
        card.write('\n[[explain]]\nname = "audit"\nsample = 0.0\nmethod = "grad-cam"\n')
    (repository / "broken" / "1").mkdir(parents=True)
    (repository / "broken" / "1" / "model.pt").write_bytes(b"no archive")
    # It knows a caller, and lets everybody else explain.
    callers = folder / "callers.toml"
    callers.write_text(key_entry("line-3", ["explain"])[1], encoding="utf-8")
    with served_folder(repository, folder / "log", **SETTINGS, callers=str(callers), allow_anonymous=True) as server:
        yield server


def ask(served: Served, model: str, kind: Kind) -> str:
    """Sends one request; its status."""
    with grpc.insecure_channel(served.process.target) as channel:
        stub = explanation_service_pb2_grpc.ExplanationServiceStub(channel)
        try:
            list(stub.Explain(request(1, kind, model)))
        except grpc.RpcError as error:
            return str(error.code().name)
        return "OK"


@pytest.fixture(scope="module")
def sent(served: Served) -> Mapping[str, int]:
    """Load of every kind; how many requests ended in which status, before those whose callers left."""
    asked = [(model, kind) for model in (*MODELS, "nobody") for kind in Kind] * 5
    return collections.Counter(ask(served, model, kind) for model, kind in asked)


@pytest.fixture(scope="module")
def watched(served: Served, sent: Mapping[str, int], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    """A Prometheus that has scraped the server."""
    with prometheus(tmp_path_factory.mktemp("prometheus"), served.metrics_port) as watching:
        watching.wait(lambda: watching.value('up{job="camserve"}') == 1, "the target is up")
        yield watching


@pytest.mark.parametrize(
    "arguments",
    [
        ["check", "rules", "camserve.rules.yml"],
        ["check", "config", "prometheus.yml"],
        ["test", "rules", "camserve.rules.test.yml"],
    ],
    ids=lambda arguments: " ".join(arguments[:2]),
)
def test_promtool_finds_no_fault(arguments: list[str]) -> None:
    """Prometheus' own tool reads the rules and the configuration, and the rules' unit tests pass."""
    done = subprocess.run(  # noqa: S603 - a fixed command
        ["promtool", *arguments],  # noqa: S607 - found on the PATH, as the marker says
        cwd=DEPLOY / "prometheus",
        capture_output=True,
        text=True,
        check=False,
    )

    assert 0 == done.returncode, done.stdout + done.stderr
    assert "SUCCESS" in done.stdout + done.stderr


def test_counts_are_those_of_what_was_sent(watched, sent):
    """Prometheus counts as many requests of each status as were sent."""
    assert {"OK", "INVALID_ARGUMENT", "NOT_FOUND"} == set(sent)
    for code, count in sent.items():
        assert count == watched.value(f'sum(camserve_requests_total{{job="camserve", code="{code}"}})')
    assert sent["OK"] == watched.value("sum(camserve_first_message_seconds_count)")


@pytest.fixture(scope="module")
def stormed(served: Served, watched: Prometheus) -> Prometheus:
    """After a storm in which callers left, and a wrong key, seen by Prometheus."""
    asyncio.run(send_all(served.process.target, draw(300, seed=3), concurrency=32, is_checked=False))
    # Callers who left early may not have reached it, so the server tells how many it saw.
    watched.wait(
        lambda: watched.value("sum(camserve_requests_total)") == served.metric("camserve_requests_total"),
        "every request of the storm",
    )
    watched.wait(lambda: watched.value("count(camserve_cancelled_total)") is not None, "somebody left")
    stranger = Client(served.process.target, credentials=Credentials(api_key="camserve_mistyped"))
    with stranger, pytest.raises(Unauthenticated):
        stranger.models()
    watched.wait(lambda: watched.value("camserve_refused_callers_total") == 1, "somebody was refused")
    return watched


def test_everything_named_has_samples(stormed):
    """Every metric that an alert, the dashboard or docs/operations.md names has samples after load of every kind."""
    text = (ROOT / "docs/operations.md").read_text(encoding="utf-8")
    told = {
        f"{name}_bucket" if kind else name
        for names, kind in re.findall(r"^\| ((?:`(?:camserve|process)_\w+`(?:, )?)+)( H)? \|", text, re.MULTILINE)
        for name in re.findall(r"\w+", names)
    }
    asked = {
        name
        for expression in [rule["expr"] for rule in RULES] + dashboard_queries()
        for name in metric_names(expression)
    }

    assert len(told) > 20
    assert [] == [name for name in sorted(told | asked) if not stormed.query(f"count({name})")]


def test_quantiles_are_numbers(stormed):
    """Every histogram gives a 99th percentile for each of its label values that was seen, within its buckets."""
    histograms = sorted({series["metric"]["__name__"] for series in stormed.query('{__name__=~"camserve_.+_bucket"}')})

    assert len(histograms) > 5
    for name in histograms:
        found = stormed.query(f"histogram_quantile(0.99, sum by (model, phase, encoding, le) ({name}))")
        assert found
        values = [float(series["value"][1]) for series in found]
        assert all(0 < value < math.inf for value in values), (name, values)


def test_rules_and_panels_are_evaluated(stormed):
    """Prometheus evaluates every rule, and every panel's query with the variables that Grafana puts in."""
    groups = stormed.get("rules")["groups"]
    stormed.wait(
        lambda: all(rule["health"] != "unknown" for group in stormed.get("rules")["groups"] for rule in group["rules"]),
        "every rule was evaluated",
    )
    groups = stormed.get("rules")["groups"]

    assert len(RULES) == sum(len(group["rules"]) for group in groups)
    assert [] == [
        rule for group in groups for rule in group["rules"] if rule["health"] != "ok" or rule.get("lastError")
    ]
    for expression in dashboard_queries():
        filled = re.sub(r"\$(instance|model)\b", ".+", expression).replace("$__rate_interval", "1m")
        assert isinstance(stormed.query(filled), list)


def test_alerts_fire_for_what_is_wrong(served, stormed):
    """The model that could not be loaded is reported by name; the server, once it is gone, as down."""
    not_ready = {"alertname": "CamserveNotReady", "severity": "page", "job": "camserve"}
    instance = f"127.0.0.1:{served.metrics_port}"

    def fires(**labels: str) -> bool:
        return any(not_ready | {"instance": instance} | labels == alert for alert in stormed.firing())

    stormed.wait(lambda: fires(model="broken", version="1"), "the alert of the broken model")
    assert not any(
        alert.get("model") in MODELS for alert in stormed.firing() if alert["alertname"] == "CamserveNotReady"
    )

    served.close()
    stormed.wait(fires, "the alert of the server that is down")
    assert 0 == stormed.value('up{job="camserve"}')
