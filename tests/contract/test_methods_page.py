"""docs/methods.md and the record behind `camserve methods` are what the code does now."""

from __future__ import annotations

import inspect
import json
import re
import typing
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from support.scenes import ModelScene, finish, small_halves

from camserve.client.cli import main
from camserve.server import jobs
from camserve.server.cam.methods import METHODS, Amplified, Family
from camserve.server.jobs import Parameters
from camserve.server.reference.facts import DEFAULTS, facts_of
from camserve.server.reference.page import page
from camserve.server.reference.pictures import FAMILIES
from camserve.server.reference.record import RECORD, read_record
from camserve.server.reference.trials import TARGETS, make_record

ROOT = Path(__file__).resolve().parents[2]
REMEDY = "it is written from the code: run `make docs` and commit what changed"


@pytest.fixture(scope="module")
def record():
    """Everything tried anew."""
    return make_record()


def test_the_record_is_what_happens(record) -> None:
    """Each method on each form of program and about each target, with every reason."""
    assert json.loads(RECORD.read_text(encoding="utf-8")) == json.loads(record.to_json()), REMEDY


def test_the_page_is_what_the_code_says(record) -> None:
    """Word for word."""
    assert (ROOT / "docs/methods.md").read_text(encoding="utf-8") == page(record), REMEDY


def test_every_target_is_tried() -> None:
    """All that a request can name, but for reference images, which become vectors."""
    asked = {type(asked) for asked, _ in TARGETS.values()} | {type(placed) for _, placed in TARGETS.values()}

    assert set(typing.get_args(jobs.About)) - asked == {jobs.Reference, jobs.ReferenceTensor}


def test_every_parameter_has_its_default_told() -> None:
    """Of every method, and of nothing else."""
    assert set(DEFAULTS) == {(slug, name) for slug, method in METHODS.items() for name in method.parameters}


@pytest.mark.parametrize(
    ("slug", "name"),
    [
        (slug, name)
        for (slug, name), default in DEFAULTS.items()
        if not isinstance(default, str) and isinstance(METHODS[slug].arithmetic, Amplified)
    ],
)
def test_a_default_is_told_as_it_is(slug: str, name: str) -> None:
    """A map made with the number that is told has the bits of one made without it; one more makes another map."""
    halves = small_halves()
    image = torch.randn(1, 3, 12, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def made(**changed: float) -> torch.Tensor:
        cheap = {"channels": 2} if "channels" in METHODS[slug].parameters else {}
        scene = ModelScene(
            model=halves,
            inputs=image,
            chunk_rows=64,
            tail_chunk_rows=64,
            reads=METHODS[slug].reads,
            parameters=Parameters(**{**cheap, **changed}),
        )
        return finish(METHODS[slug].arithmetic.steps(scene))

    default = DEFAULTS[slug, name]

    assert torch.equal(made(), made(**{name: default}))
    assert not torch.equal(made(), made(**{name: default + 1}))


@pytest.mark.parametrize("family", FAMILIES)
def test_pictures_are_there_and_small(family: Family) -> None:
    """One for each family that the shipped model has methods of, below 150 kB, shown on its page."""
    path = ROOT / f"docs/pictures/{family.value}.png"

    assert path.stat().st_size < 150_000
    with Image.open(path) as picture:
        picture.verify()
    assert f"(../pictures/{path.name})" in (ROOT / f"docs/methods/{family.value}.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("family", Family)
def test_a_family_page_tells_of_every_method(family: Family) -> None:
    """By its slug, and of no method that there is not."""
    text = (ROOT / f"docs/methods/{family.value}.md").read_text(encoding="utf-8")
    slugs = {slug for slug, method in METHODS.items() if method.family is family}

    assert slugs <= set(re.findall(r"`([a-z+-]+)`", text))


def test_the_command_lists_every_method() -> None:
    """As a table and as JSON."""
    table = CliRunner().invoke(main, ["methods"], env={"COLUMNS": "200"})
    entries = json.loads(CliRunner().invoke(main, ["methods", "--json"]).stdout)

    assert list(METHODS) == [entry["slug"] for entry in entries]
    assert [] == [slug for slug in METHODS if slug not in table.stdout]


@pytest.mark.parametrize("slug", METHODS)
def test_the_command_shows_a_method_in_full(slug: str) -> None:
    """Its paper, its parameters with their defaults, what it takes and what it works on."""
    shown = CliRunner().invoke(main, ["methods", slug], env={"COLUMNS": "1000"}).stdout
    facts = facts_of(METHODS[slug])

    assert facts.paper in shown
    assert [] == [p.name for p in facts.parameters if f"{p.name} ({p.default})" not in shown]
    assert [] == [
        form for form, told in read_record().programs[slug].items() if f"{form}: {told or 'works'}" not in shown
    ]


def test_a_mistyped_method_is_told() -> None:
    """With the nearest there is."""
    done = CliRunner().invoke(main, ["methods", "grad-cat"])

    assert 2 == done.exit_code
    assert "did you mean 'grad-cam'?" in done.stderr


def test_help_does_not_load_torch() -> None:
    """It takes seconds, and whoever reads the help need not wait."""
    from camserve.server.reference import command  # noqa: PLC0415 - only its source is looked at

    outside = inspect.getsource(command).partition("def methods")[0]

    assert "camserve.server" not in outside.partition("if TYPE_CHECKING:")[0]
