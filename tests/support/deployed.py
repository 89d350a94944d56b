"""What deploy/ asks Prometheus: the alerts' expressions and the dashboard's, and the names in them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

__all__ = ["DASHBOARD", "DEPLOY", "ROOT", "RULES", "dashboard_queries", "metric_names", "panels"]

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
DASHBOARD: dict[str, Any] = json.loads((DEPLOY / "grafana/dashboards/camserve.json").read_text(encoding="utf-8"))
RULES: list[dict[str, Any]] = [
    rule
    for group in yaml.safe_load((DEPLOY / "prometheus/camserve.rules.yml").read_text(encoding="utf-8"))["groups"]
    for rule in group["rules"]
]

_METRIC = re.compile(r"\b(?:camserve|process)_[a-z0-9_]+")


def metric_names(expression: str) -> set[str]:
    """The names in a PromQL expression; what stands in quotes is no name."""
    return set(_METRIC.findall(re.sub(r'"[^"]*"', "", expression)))


def panels() -> Iterator[dict[str, Any]]:
    """The dashboard's panels without its row titles."""
    return (panel for panel in DASHBOARD["panels"] if panel["type"] != "row")


def dashboard_queries() -> list[str]:
    """The PromQL of the dashboard's panels and annotations, with Grafana's variables in it."""
    asked = [target["expr"] for panel in panels() for target in panel["targets"]]
    return asked + [entry["expr"] for entry in DASHBOARD["annotations"]["list"] if "expr" in entry]
