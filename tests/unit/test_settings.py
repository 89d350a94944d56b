from __future__ import annotations

from pathlib import Path

import pydantic
import pytest

from camserve.server.settings import Settings, complaint, load_settings


@pytest.fixture(autouse=True)
def _no_variables(monkeypatch):
    """What the machine sets is not what these tests ask about."""
    for name in Settings.model_fields:
        monkeypatch.delenv(f"CAMSERVE_{name.upper()}", raising=False)


@pytest.fixture
def config(tmp_path) -> Path:
    """A configuration file that sets three settings."""
    path = tmp_path / "camserve.toml"
    path.write_text('max_batch_rows = 2\nmax_requests = 20\nlog_format = "json"\n', encoding="utf-8")
    return path


def test_flags_go_before_environment_before_file_before_defaults(config, monkeypatch):
    """Each source wins over those behind it, setting by setting."""
    monkeypatch.setenv("CAMSERVE_MAX_BATCH_ROWS", "3")
    monkeypatch.setenv("CAMSERVE_MAX_REQUESTS", "30")

    settings = load_settings(config, max_batch_rows=4, max_requests=None)

    assert 4 == settings.max_batch_rows
    assert 30 == settings.max_requests
    assert "json" == settings.log_format
    assert Settings.model_fields["max_specs"].default == settings.max_specs


def test_the_case_of_a_variable_does_not_change_who_wins(config, monkeypatch):
    """A lower-case variable counts, and goes before the file too."""
    monkeypatch.setenv("camserve_max_batch_rows", "3")

    assert 3 == load_settings(config).max_batch_rows


def test_settings_are_frozen():
    """Nobody changes a running server's settings."""
    with pytest.raises(pydantic.ValidationError, match="frozen"):
        load_settings().max_requests = 1


def test_an_unknown_key_in_the_file_is_named(tmp_path):
    """A typing error in the file is refused, not ignored."""
    path = tmp_path / "camserve.toml"
    path.write_text("max_batch_row = 2\n", encoding="utf-8")

    with pytest.raises(ValueError, match="max_batch_row\n"):
        load_settings(path)


def test_an_unknown_flag_is_named():
    """A name that is no setting is refused."""
    with pytest.raises(ValueError, match="max_batch_row\n"):
        load_settings(max_batch_row=2)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"max_batch_row": 2}, "max_batch_row is no setting; did you mean max_batch_rows? (--print-config shows all)"),
        ({"tls_certificate": "a.pem"}, "tls_certificate and tls_key come together: give both or neither"),
        ({"device": "tpu", "max_requests": "many"}, "device: 'tpu' is not a device; write auto, cpu, cuda or cuda:0"),
    ],
)
def test_wrong_settings_are_told_in_a_line_each(given, told):
    """Without the names of our classes and types, which help nobody who starts a server."""
    with pytest.raises(ValueError, match="validation") as caught:
        load_settings(**given)

    lines = complaint(caught.value).split("\n")
    assert told in lines
    assert len(given) == len(lines)


def test_variables_of_others_are_let_be(monkeypatch):
    """Kubernetes sets these in every pod beside a service named camserve."""
    monkeypatch.setenv("CAMSERVE_PORT", "tcp://10.0.0.1:50051")
    monkeypatch.setenv("CAMSERVE_SERVICE_HOST", "10.0.0.1")

    assert Settings.model_fields["listen"].default == load_settings().listen


def test_a_file_that_is_not_toml_is_named(tmp_path):
    """The text tells which file and where."""
    path = tmp_path / "camserve.toml"
    path.write_text("max_batch_rows: 2\n", encoding="utf-8")

    with pytest.raises(ValueError, match=r"camserve\.toml is not TOML: .*line 1"):
        load_settings(path)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("listen", ""),
        ("listen", "50051"),
        ("listen", ":50051"),
        ("listen", "localhost"),
        ("listen", "0.0.0.0:65536"),
        ("listen", "0.0.0.0:-1"),
        ("metrics_listen", "8002"),
        ("device", "gpu"),
        ("device", "cuda:"),
        ("torch_threads", -1),
        ("max_batch_rows", 0),
        ("max_batch_rows", "many"),
        ("batch_window_seconds", -0.001),
        ("batch_window_seconds", float("nan")),
        ("batch_window_seconds", 2),
        ("max_requests", 0),
        ("max_held_bytes", 1),
        ("caller_requests_per_second", -1),
        ("caller_requests_per_second", float("nan")),
        ("caller_burst", 0.5),
        ("caller_concurrency", -1),
        ("max_connections", 0),
        ("max_connection_streams", 0),
        ("max_metadata_bytes", 100),
        ("handshake_seconds", 0),
        ("receive_seconds", 0),
        ("idle_connection_seconds", -1),
        ("connection_age_seconds", -1),
        ("min_ping_seconds", -1),
        ("max_image_pixels", 0),
        ("drain_seconds", -1),
        ("stall_seconds", 0),
        ("log_format", "xml"),
        ("log_level", "loud"),
    ],
)
def test_a_bad_value_names_its_setting(name, value):
    """The text tells which setting is wrong."""
    with pytest.raises(ValueError, match=rf"\n{name}\n"):
        load_settings(**{name: value})


@pytest.mark.parametrize("address", ["127.0.0.1:0", "[::]:50051", "localhost:8002", "0.0.0.0:65535"])
def test_addresses_are_host_and_port(address):
    """Names, both families of addresses, and port 0."""
    settings = load_settings(listen=address, metrics_listen=address)

    assert (address, address) == (settings.listen, settings.metrics_listen)


def test_an_empty_metrics_address_means_no_page():
    """The metrics page can be left out; the port for requests cannot."""
    assert not load_settings(metrics_listen="").metrics_listen


def test_zero_decoders_means_one_for_each_core():
    """The number of decode threads is resolved."""
    assert 3 == load_settings(decode_threads=3).decoders
    assert load_settings(decode_threads=0).decoders >= 1


@pytest.mark.parametrize("name", list(Settings.model_fields))
def test_every_setting_says_why_someone_would_change_it(name):
    """A setting without a description is not finished."""
    assert Settings.model_fields[name].description


def test_an_empty_plan_cache_is_none(monkeypatch):
    """Compiled plans are then not kept, rather than kept in the working directory."""
    monkeypatch.setenv("CAMSERVE_PLAN_CACHE", "")
    assert load_settings().plan_cache is None
    assert Path("/var/cache/plans") == load_settings(plan_cache=Path("/var/cache/plans")).plan_cache


@pytest.mark.parametrize(
    ("max_requests", "asked", "concurrency"),
    [(256, None, 192), (3, None, 2), (1, None, 1), (256, 300, 300), (256, 0, 0)],
)
def test_no_caller_can_take_the_whole_door_unless_told(max_requests, asked, concurrency):
    """By itself a caller may have three quarters of the places under way; a door of one place has no quarters."""
    settings = load_settings(max_requests=max_requests, caller_concurrency=asked)

    assert concurrency == settings.caller_limits.concurrency


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"jwt_keys": "issuer.pem"}, "jwt_keys needs jwt_audience"),
        ({"jwt_keys": "issuer.pem", "jwt_audience": ""}, "jwt_keys needs jwt_audience"),
        ({"jwt_audience": "camserve"}, "need jwt_keys"),
        ({"jwt_issuer": "https://issuer.example"}, "need jwt_keys"),
        ({"tls_certificate": "server.pem"}, "come together"),
        ({"tls_key": "server.key"}, "come together"),
        ({"tls_client_ca": "ca.pem"}, "needs tls_certificate"),
        ({"listen": "unix:"}, "is not an address"),
        ({"metrics_listen": "unix:/run/page"}, "is not an address"),
    ],
)
def test_what_does_not_go_together_is_refused(given, why):
    """Half of a pair protects nobody."""
    with pytest.raises(ValueError, match=why):
        load_settings(**given)


def test_a_server_listens_on_its_own_machine_unless_it_is_told_otherwise():
    """So that nobody opens one to others by accident; a socket is an address too."""
    assert "127.0.0.1:50051" == load_settings().listen
    assert "unix:/run/camserve.sock" == load_settings(listen="unix:/run/camserve.sock").listen
