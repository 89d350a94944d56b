"""Claims about the documentation: it is complete, and what it says of settings and metrics is true."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
from prometheus_client import Counter, Info, generate_latest
from prometheus_client.metrics import MetricWrapperBase

from camserve.server.conditions import VARIABLES, check_condition
from camserve.server.metrics import Metrics
from camserve.server.models.config import ModelConfig
from camserve.server.settings import Settings

ROOT = Path(__file__).resolve().parents[2]
OPERATIONS = (ROOT / "docs/operations.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", *sorted((ROOT / "docs").rglob("*.md"))]


def section(title: str) -> str:
    """The text under one heading of operations.md."""
    return OPERATIONS.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def rows(title: str) -> dict[str, str]:
    """The first table of a section: the name in its first cell, without quotes, and the second cell as it is written."""
    cells = re.findall(r"^\| `(\w+)`[^|]*\| ([^|]*?) *\|", section(title), re.MULTILINE)
    return dict(cells)


def test_every_setting_is_told() -> None:
    """The table of settings has every setting and no other."""
    assert set(Settings.model_fields) == set(rows("Settings"))


@pytest.mark.parametrize("name", list(Settings.model_fields))
def test_default_is_told_as_it_is(name: str) -> None:
    """The table tells each setting's real default."""
    default = Settings.model_fields[name].default

    assert ("none" if default is None else f"`{default}`") == rows("Settings")[name]


def test_every_metric_is_told() -> None:
    """The table of metrics has every metric that a server exports and no other."""
    metrics = Metrics()
    metrics.build.info({"version": "0", "torch": "0"})
    exported = re.findall(r"^# TYPE (\S+)", generate_latest(metrics.registry).decode(), re.MULTILINE)
    told = re.findall(
        r"`((?:camserve|process)_\w+)`", "\n".join(re.findall(r"^\| `.*? \|", section("Metrics"), re.MULTILINE))
    )

    assert {name for name in exported if not name.endswith("_created")} == set(told)


@pytest.mark.parametrize(
    "instrument",
    [item for item in vars(Metrics()).values() if isinstance(item, MetricWrapperBase) and not isinstance(item, Info)],
    ids=lambda instrument: str(instrument._name),
)
def test_labels_are_told_as_they_are(instrument: MetricWrapperBase) -> None:
    """The table names exactly the labels of each instrument, in their order."""
    name = f"{instrument._name}_total" if isinstance(instrument, Counter) else instrument._name

    assert ", ".join(instrument._labelnames) == rows("Metrics")[name]


def blocks(title: str, language: str) -> list[str]:
    """The fenced blocks of a language in one section."""
    return re.findall(rf"^```{language}\n(.*?)^```", section(title), re.MULTILINE | re.DOTALL)


def test_every_variable_of_a_condition_is_told() -> None:
    """With its type and its meaning."""
    told = re.findall(r"^\| `(\w+)` \| ([^|]+) \| ([^|]+) \|$", section("Explain only if"), re.MULTILINE)

    assert [(name, variable.kind, variable.meaning) for name, variable in VARIABLES.items()] == told


def test_rules_that_are_shown_are_rules() -> None:
    """The examples of model.toml are read, and each example of a condition is one."""
    (tables,) = blocks("Explain only if", "toml")
    (conditions,) = blocks("Explain only if", "cel")

    rules = ModelConfig.model_validate(tomllib.loads(tables)).explain

    assert [("rejects", "grad-cam", 1.0), ("drift", "layercam", 0.01)] == [
        (rule.name, rule.method, rule.sample) for rule in rules
    ]
    assert 5 == len(conditions.splitlines())
    for line in conditions.splitlines():
        check_condition(line.partition("   ")[0])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    """Every relative link and picture of a page is in the tree."""
    links = re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text(encoding="utf-8"))

    assert [] == [link for link in links if "://" not in link and not (page.parent / link).exists()]


def anchors(page: Path) -> set[str]:
    """What a link into a page may name: its headings, as Git hosts write them."""
    headings = re.findall(
        r"^#+ (.*)$", re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL), re.MULTILINE
    )
    return {re.sub(r"[^\w -]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_into_pages_name_a_heading(page: Path) -> None:
    """A renamed heading takes its links along."""
    links = re.findall(r"\]\(([^)\s]*)#([^)\s]+)\)", page.read_text(encoding="utf-8"))

    assert [] == [
        f"{path}#{anchor}"
        for path, anchor in links
        if "://" not in path and anchor not in anchors((page.parent / path) if path else page)
    ]


def test_every_page_is_in_the_index() -> None:
    """docs/README.md leads to every page beside it."""
    index = (ROOT / "docs/README.md").read_text(encoding="utf-8")

    assert [] == [
        page.name for page in (ROOT / "docs").glob("*.md") if f"({page.name})" not in index and page.name != "README.md"
    ]
