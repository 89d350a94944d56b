"""The wall clock may be set at any time, by people and by daemons: nothing may ask it but who calls, and until when they may."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# What log lines, spans and reports are stamped with is read by people, and credentials are valid from one day to another.
# Nothing else is told the time of day.
ALLOWED = {
    "server/camserve/server/callers/command.py",
    "server/camserve/server/callers/guard.py",
    "server/camserve/server/logs.py",
    "server/camserve/server/spans.py",
    "client/camserve/client/bench/command.py",
}
WALL = {
    "time": {"time", "time_ns", "localtime", "gmtime", "ctime", "strftime", "clock_gettime"},
    "datetime": {"now", "utcnow", "today", "fromtimestamp"},
    "date": {"today", "fromtimestamp"},
}


def asked(path: Path) -> list[str]:
    """Every place of a file where the time of day is asked, by module or by name."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name | ast.Attribute):
            owner = node.value.id if isinstance(node.value, ast.Name) else node.value.attr
            if node.attr in WALL.get(owner, ()):
                found.append(f"{path.name}:{node.lineno} {owner}.{node.attr}")
        if isinstance(node, ast.ImportFrom) and node.module == "time":
            found += [f"{path.name}:{node.lineno} {name.name}" for name in node.names if name.name in WALL["time"]]
    return found


def test_nothing_is_decided_by_the_time_of_day():
    """Server and client measure and wait by monotonic clocks, which nobody sets: a jump of the clock cannot end a request."""
    files = [*(ROOT / "server/camserve/server").rglob("*.py"), *(ROOT / "client/camserve/client").rglob("*.py")]

    assert [] == [
        place for path in sorted(files) if str(path.relative_to(ROOT)) not in ALLOWED for place in asked(path)
    ]


def test_the_time_of_day_would_be_found(tmp_path: Path):
    """The look itself: each way of asking is seen, and monotonic clocks are not."""
    path = tmp_path / "late.py"
    path.write_text(
        "import time, datetime\nfrom time import time as now\nnow()\ntime.time()\n"
        "datetime.datetime.now()\ntime.monotonic()\ntime.perf_counter()\n",
        encoding="utf-8",
    )

    assert ["late.py:2 time", "late.py:4 time.time", "late.py:5 datetime.now"] == sorted(asked(path))
