"""`camserve keys`: what it prints, and what it leaves in the file."""

from __future__ import annotations

import json
import stat
import threading

import pytest
from click.testing import CliRunner, Result

from camserve.server.callers.api_keys import digest_of
from camserve.server.callers.caller_file import read_caller_file
from camserve.server.callers.command import keys

PEOPLE = """# who may call
[[certificate]]
identity = "spiffe://plant/line-1"   # the first line
roles = ["explain"]
"""


def run(*arguments: object) -> Result:
    """Runs the command."""
    return CliRunner().invoke(keys, [str(argument) for argument in arguments])


def added(path, name: str, *options: str) -> str:
    """Adds a key and returns it."""
    result = run("add", name, "--role", "explain", *options, "--file", path)
    assert 0 == result.exit_code, result.output
    return result.stdout.strip()


def test_a_key_is_printed_once_and_only_its_hash_kept(tmp_path):
    """On standard output alone, so that a shell can take it; the file is for its owner."""
    path = tmp_path / "callers.toml"

    key = added(path, "line-3", "--role", "admin", "--expires", "90d")

    (entry,) = read_caller_file(path.read_bytes()).key
    assert ("line-3", digest_of(key), {"explain", "admin"}) == (entry.name, entry.sha256, entry.roles)
    assert entry.expires is not None
    assert key not in path.read_text()
    assert 0o600 == stat.S_IMODE(path.stat().st_mode)
    assert ["callers.toml"] == [file.name for file in tmp_path.iterdir()]


def test_what_people_wrote_stays(tmp_path):
    """Comments and other entries, and the file's rights; a key that goes takes its own comment along."""
    path = tmp_path / "callers.toml"
    path.write_text(PEOPLE)
    path.chmod(0o640)
    added(path, "first")
    path.write_text(path.read_text().replace("[[key]]", "# to be replaced in May\n[[key]]"))
    second = added(path, "second")

    result = run("revoke", "first", "--file", path)

    assert 0 == result.exit_code, result.output
    assert [digest_of(second)] == [entry.sha256 for entry in read_caller_file(path.read_bytes()).key]
    assert path.read_text().startswith(PEOPLE)
    assert "May" not in path.read_text()
    assert 0o640 == stat.S_IMODE(path.stat().st_mode)


def test_one_key_of_a_name_can_go_while_the_other_stays(tmp_path):
    """So that a key is changed without a gap."""
    path = tmp_path / "callers.toml"
    old, new = added(path, "line-3"), added(path, "line-3")

    result = run("revoke", "line-3", "--id", digest_of(old)[:8], "--file", path)

    assert 0 == result.exit_code, result.output
    assert [digest_of(new)] == [entry.sha256 for entry in read_caller_file(path.read_bytes()).key]


def test_keys_are_listed_with_their_state(tmp_path):
    """For people and for programs."""
    path = tmp_path / "callers.toml"
    added(path, "now")
    added(path, "over", "--expires", "2099-01-01")
    path.write_text(
        path.read_text().replace("2099-01-01", "2020-01-01")
    )  # As if made then: no such key can be made now.
    added(path, "later", "--not-before", "2100-01-01T00:00:00Z")

    rows = json.loads(run("list", "--json", "--file", path).stdout)

    assert [("now", "valid"), ("over", "expired"), ("later", "not yet valid")] == [
        (row["name"], row["state"]) for row in rows
    ]
    assert "later" in run("list", "--file", path).stdout


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (("add", "a b\n", "--role", "explain"), "printable"),
        (("add", "a", "--role", "root"), "'root' is not one of"),
        (("add", "a"), "--role"),
        (("add", "a", "--role", "explain", "--expires", "soon"), "write 90d"),
        (("add", "a", "--role", "explain", "--expires", "1d", "--not-before", "2d"), "never be valid"),
        (("add", "a", "--role", "explain", "--expires", "2020-01-01"), "is over: this key would never be valid"),
        (("revoke", "nobody"), "has no key of 'nobody'"),
        (("revoke", "line-3", "--id", "ffffffff"), "it has "),
    ],
)
def test_what_cannot_be_done_is_told(tmp_path, arguments, why):
    """And the file stays as it was."""
    path = tmp_path / "callers.toml"
    added(path, "line-3")
    before = path.read_bytes()

    result = run(*arguments, "--file", path)

    assert 0 != result.exit_code
    assert why in result.output
    assert before == path.read_bytes()


@pytest.mark.parametrize("arguments", [("list",), ("add", "a", "--role", "explain")])
def test_a_file_that_is_not_there_is_named_first(tmp_path, arguments):
    """Or its folder, where one is to be made; without the number of the error."""
    result = run(*arguments, "--file", tmp_path / "absent" / "callers.toml")

    assert 1 == result.exit_code
    assert result.output.startswith(f"Error: {tmp_path / 'absent'}")
    assert result.output.endswith(": No such file or directory\n")


def test_a_broken_file_is_not_written_to(tmp_path):
    """It is told what is wrong with it."""
    path = tmp_path / "callers.toml"
    path.write_text("[[key]\n")

    result = run("add", "a", "--role", "explain", "--file", path)

    assert 1 == result.exit_code
    assert "not TOML" in result.output
    assert "[[key]\n" == path.read_text()


def test_two_at_a_time_lose_nothing(tmp_path):
    """Each change waits for the other."""
    path = tmp_path / "callers.toml"
    threads = [threading.Thread(target=keys.main, args=(["add", f"n{index}", "--role", "explain", "--file", str(path)],),
                                kwargs={"standalone_mode": False}) for index in range(8)]  # fmt: skip
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert {f"n{index}" for index in range(8)} == {entry.name for entry in read_caller_file(path.read_bytes()).key}
