"""Claims about how the course of a soak is judged."""

from __future__ import annotations

import math

import pytest
from soak.mixture import Course, Window
from soak.verdict import Limits, judge, markdown

MIB = 1 << 20


def window(place: int, **changes: float) -> Window:
    """A minute of a server that is well."""
    given = {
        "ended_seconds": 60.0 * (place + 1),
        "resident_bytes": 700.0 * MIB,
        "descriptors": 15,
        "threads": 20,
        "probes": 300,
        "probe_p50_seconds": 0.005,
        "probe_p99_seconds": 0.020,
        "cpu_share": 0.3,
    }
    return Window(**{**given, **changes})


def course(*windows: Window, **changes: object) -> Course:
    """One in which everybody was answered."""
    found = Course(windows=list(windows), **changes)
    found.ends["probe", "OK"] = 300 * len(windows)
    return found


def unwell(found: Course, left: list[str] | None = None, **limits: float) -> list[str]:
    """The names of what is not well."""
    return [finding.name for finding in judge(found, left or [], Limits(**limits)) if not finding.is_well]


def test_a_level_course_is_well():
    """A server that stays as it was passes."""
    assert [] == unwell(course(*map(window, range(120))))


def test_growth_within_the_first_tenth_is_no_growth():
    """What a server takes in its first tenth it may keep."""
    windows = [window(place, resident_bytes=(600 + 10 * min(place, 11)) * MIB) for place in range(120)]

    assert [] == unwell(course(*windows))


def test_growth_is_seen_behind_a_single_peak():
    """A quarter of a MiB a minute is too much in two hours, one large request is not."""
    growing = [window(place, resident_bytes=(600 + place / 4) * MIB) for place in range(120)]
    peaked = [window(place, resident_bytes=(900 if place == 119 else 600) * MIB) for place in range(120)]

    assert ["memory"] == unwell(course(*growing))
    assert [] == unwell(course(*peaked))


def test_drift_is_judged_only_with_a_limit():
    """A tenth more at the 99th percentile is told, and held against the server where the machine is calm."""
    windows = [window(place, probe_p99_seconds=0.020 if place < 60 else 0.022) for place in range(120)]

    assert ["p99"] == unwell(course(*windows))
    assert [] == unwell(course(*windows), drift=math.inf)


def test_windows_without_a_probe_do_not_count():
    """A window in which no probe ended says nothing of the 99th percentile."""
    windows = [window(place, probe_p99_seconds=math.nan if place % 2 else 0.02) for place in range(120)]

    assert [] == unwell(course(*windows))


def test_a_course_without_probes_is_not_well():
    """Where nothing was measured nothing is proved."""
    windows = [window(place, probe_p99_seconds=math.nan) for place in range(120)]

    assert ["p99"] == unwell(course(*windows))
    assert ["p99"] == unwell(course(*windows), drift=math.inf)


def test_a_quarter_without_probes_is_well_where_drift_is_not_judged():
    """A busy machine answers none for a while; there is nothing to compare then, and nothing that was to be compared."""
    windows = [window(place, probe_p99_seconds=math.nan if place > 80 else 0.02) for place in range(120)]

    assert ["p99"] == unwell(course(*windows))
    assert [] == unwell(course(*windows), drift=math.inf)


def test_descriptors_must_be_flat():
    """One more every ten minutes is a leak."""
    windows = [window(place, descriptors=15 + place // 10) for place in range(120)]

    assert ["file descriptors"] == unwell(course(*windows))


def test_wrong_answers_and_what_is_left_behind_are_not_well():
    """A complaint, a request that is still held and an early end are each told by name."""
    found = course(*map(window, range(120)), is_whole=False)
    found.complain("explains number 3: INTERNAL")

    assert ["answers", "left behind", "length"] == unwell(found, ["camserve_hooks 2"])


@pytest.mark.parametrize("count", [0, 3])
def test_too_few_windows_are_not_judged(count):
    """A soak that ended at once proves nothing."""
    assert "windows" in unwell(course(*map(window, range(count))))


def test_page_tells_findings_acts_windows_and_faults():
    """The page has every finding, how acts ended, a dozen windows and the complaints."""
    found = course(*map(window, range(120)))
    found.complain("explains number 3: INTERNAL")
    page = markdown(found, judge(found, [], Limits()), "Soak")

    assert page.startswith("# Soak\n")
    assert "**not well**: answers: 36000 acts, 1 wrong" in page
    assert "| probe | OK 36000 |" in page
    assert "- explains number 3: INTERNAL" in page
    assert 12 == page.count(" | 700.0 | ")
