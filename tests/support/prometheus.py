"""A real Prometheus over a real metrics page, with the configuration and the rules of deploy/ at a test's pace.

`tests/e2e/test_prometheus.py` asks it over its HTTP API, as Grafana and Alertmanager would be told.
"""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml
from support.deployed import DEPLOY

__all__ = ["Prometheus", "prometheus"]

_PACE = "250ms"
_PATIENCE_SECONDS = 180


class Prometheus:
    """Asks a running one.

    Args:
        port: of its HTTP API.
    """

    def __init__(self, port: int) -> None:
        self._url = f"http://127.0.0.1:{port}/api/v1/"

    def get(self, path: str, **parameters: str) -> Any:
        """The data of an answer of its API.

        Raises:
            urllib.error.HTTPError: it refused, such as an expression that it cannot read.
        """
        with urllib.request.urlopen(f"{self._url}{path}?{urllib.parse.urlencode(parameters)}", timeout=60) as answer:  # noqa: S310 - on loopback
            return json.load(answer)["data"]

    def query(self, expression: str) -> list[dict[str, Any]]:
        """The series of an expression as they are now, each with its labels (`metric`) and its `value`."""
        return self.get("query", query=expression)["result"]

    def value(self, expression: str) -> float | None:
        """The value of an expression that has one series; None while it has none."""
        found = self.query(expression)
        assert len(found) < 2, f"{expression} has {len(found)} series"
        return float(found[0]["value"][1]) if found else None

    def firing(self) -> list[dict[str, str]]:
        """The labels of every alert that fires."""
        return [alert["labels"] for alert in self.get("alerts")["alerts"] if alert["state"] == "firing"]

    def wait(self, is_so: Callable[[], bool], what: str) -> None:
        """Asks again until it is so: scrapes and evaluations have no events to await."""
        until = time.monotonic() + _PATIENCE_SECONDS
        while not is_so():
            assert time.monotonic() < until, f"in vain: {what}"
            time.sleep(0.1)


@contextlib.contextmanager
def prometheus(folder: Path, metrics_port: int) -> Iterator[Prometheus]:
    """Runs one that scrapes a page several times a second; alerts fire as soon as they are true.

    Args:
        folder: for its files.
        metrics_port: of the page, on loopback.
    """
    config = yaml.safe_load((DEPLOY / "prometheus/prometheus.yml").read_text(encoding="utf-8"))
    config["global"].update(scrape_interval=_PACE, evaluation_interval=_PACE)
    config["scrape_configs"] = [job for job in config["scrape_configs"] if job["job_name"] == "camserve"]
    (job,) = config["scrape_configs"]
    job["static_configs"] = [{"targets": [f"127.0.0.1:{metrics_port}"]}]
    (rule_file,) = config["rule_files"]
    rules = yaml.safe_load((DEPLOY / "prometheus" / rule_file).read_text(encoding="utf-8"))
    for group in rules["groups"]:
        for rule in group["rules"]:
            rule["for"] = "0s"
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config), encoding="utf-8")
    (folder / rule_file).write_text(yaml.safe_dump(rules), encoding="utf-8")
    command = [
        "prometheus",
        f"--config.file={folder / 'prometheus.yml'}",
        f"--storage.tsdb.path={folder / 'series'}",
        "--web.listen-address=127.0.0.1:0",
    ]
    log = folder / "prometheus.log"
    with log.open("wb") as stderr, subprocess.Popen(command, stderr=stderr) as process:  # noqa: S603 - what deploy/ runs
        try:
            yield Prometheus(_port(process, log))
        finally:
            process.terminate()
            process.wait(timeout=180)


def _port(process: subprocess.Popen[bytes], log: Path) -> int:
    """Reads the log until it says that it is ready, and on which port."""
    until = time.monotonic() + _PATIENCE_SECONDS
    while time.monotonic() < until and process.poll() is None:
        text = log.read_text(encoding="utf-8", errors="replace")
        found = re.search(r'msg="Listening on".* address=\S+:(\d+)', text)
        if found and "Server is ready" in text:
            return int(found[1])
        time.sleep(0.05)
    raise AssertionError(f"Prometheus did not start:\n{log.read_text(encoding='utf-8', errors='replace')}")
