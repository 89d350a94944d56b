from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from pydantic import Field, SecretStr

from camserve.server.cli import serve
from camserve.server.settings import Settings, Source, SourcedSettings, SourceKind, load_settings
from camserve.server.settings_page import json_page, toml_page


@pytest.fixture(autouse=True)
def _no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the machine sets is not what these tests ask about."""
    for name in Settings.model_fields:
        monkeypatch.delenv(f"CAMSERVE_{name.upper()}", raising=False)


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A configuration file that sets three settings."""
    path = tmp_path / "camserve.toml"
    path.write_text('max_batch_rows = 2\nmax_requests = 20\nlog_format = "json"\n', encoding="utf-8")
    return path


def run(*arguments: str | Path) -> Result:
    """Runs `camserve serve --print-config`."""
    return CliRunner().invoke(serve, ["--print-config", *map(str, arguments)])


def told(result: Result) -> Mapping[str, Any]:
    """What was printed as JSON, by name."""
    assert 0 == result.exit_code, result.output
    return {entry["name"]: entry for entry in json.loads(result.stdout)}


def test_every_setting_is_told_with_its_source(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Flags by how they are written, variables by how they are written, files by path; nothing is served."""
    monkeypatch.setenv("CAMSERVE_MAX_REQUESTS", "30")
    monkeypatch.setenv("camserve_max_specs", "5")

    settings = told(run("--json", "--config", config, "--max-batch-rows", "4", "--models", "/srv/models"))

    assert list(Settings.model_fields) == list(settings)
    assert {
        "max_batch_rows": (4, "flag", "--max-batch-rows"),
        "repository": ("/srv/models", "flag", "--models"),
        "max_requests": (30, "environment", "CAMSERVE_MAX_REQUESTS"),
        "max_specs": (5, "environment", "camserve_max_specs"),
        "log_format": ("json", "file", str(config)),
        "max_maps": (128, "default", ""),
    } == {
        name: (settings[name]["value"], settings[name]["source"], settings[name]["place"])
        for name in ("max_batch_rows", "repository", "max_requests", "max_specs", "log_format", "max_maps")
    }
    assert all(entry["description"] == Settings.model_fields[name].description for name, entry in settings.items())


def test_what_is_shown_to_people_can_be_given_back(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The page is a configuration file with the same settings, each with its source beside it."""
    monkeypatch.setenv("CAMSERVE_PLAN_CACHE", "")
    page = run("--config", config, "--listen", "127.0.0.1:0").stdout
    again = tmp_path / "again.toml"
    again.write_text(page, encoding="utf-8")
    expected = load_settings(config, listen="127.0.0.1:0")
    monkeypatch.delenv("CAMSERVE_PLAN_CACHE")

    assert expected == load_settings(again)
    assert 'plan_cache = ""  # environment: CAMSERVE_PLAN_CACHE' in page
    assert 'listen = "127.0.0.1:0"  # flag: --listen' in page
    assert f"max_requests = 20  # file: {config}" in page
    assert "# Largest request message.\nmax_request_bytes = 67108864  # default" in page
    assert "# repository = none  # default" in page


def test_secrets_are_not_shown() -> None:
    """A setting of the type SecretStr is masked on both pages, without anybody having to think of it."""

    class WithSecret(Settings):
        """As a setting for a token would be declared."""

        token: SecretStr = Field(SecretStr("swordfish"), description="A token.")

    sources = {name: Source(kind=SourceKind.DEFAULT) for name in WithSecret.model_fields}
    sourced = SourcedSettings(settings=WithSecret(), sources=sources)

    assert "swordfish" not in toml_page(sourced, {}) + json_page(sourced, {})
    assert '# token = "**********"  # default' in toml_page(sourced, {})


def test_a_wrong_setting_is_told_as_at_the_start(config: Path) -> None:
    """One complaint, with the name; no page."""
    result = run("--config", config, "--max-batch-rows", "0")

    assert 1 == result.exit_code
    assert "Error: max_batch_rows: Input should be greater than or equal to 1, not 0\n" == result.stderr
    assert not result.stdout


def test_json_alone_is_wrong_usage() -> None:
    """It is not what makes logs JSON, and says so."""
    result = CliRunner().invoke(serve, ["--json"])

    assert 2 == result.exit_code
    assert "--log-format json" in result.stderr


def test_files_of_secrets_are_told_by_their_paths_alone(tmp_path: Path) -> None:
    """What is in them is not read for the page."""
    (tmp_path / "server.key").write_text("swordfish", encoding="utf-8")
    (tmp_path / "server.pem").write_text("swordfish", encoding="utf-8")

    page = run("--tls-key", tmp_path / "server.key", "--tls-certificate", tmp_path / "server.pem", "--allow-anonymous")

    assert 0 == page.exit_code, page.output
    assert f'tls_key = "{tmp_path / "server.key"}"  # flag: --tls-key' in page.stdout
    assert "allow_anonymous = true  # flag: --allow-anonymous" in page.stdout
    assert "swordfish" not in page.output
