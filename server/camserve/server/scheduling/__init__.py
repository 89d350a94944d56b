"""The room that decides what the device does next: pure functions and bookkeeping of what waits, what it costs and who is due.

`queue.py` holds what waits and asks `decide` whenever the device is free; what passes took comes back to `CostModel` and to
`Shares`. Nothing here sleeps, locks, knows the time by itself or touches a tensor. docs/scheduling.md tells the rules in words.
"""

from camserve.server.scheduling.admission import Forecast
from camserve.server.scheduling.backlog import Backlog, Load
from camserve.server.scheduling.costs import CostModel, Line
from camserve.server.scheduling.planner import Cut, Decision, Limits, decide
from camserve.server.scheduling.returns import Returns
from camserve.server.scheduling.shares import Charge, Shares
from camserve.server.scheduling.work import BatchKey, Candidate, WorkKey

__all__ = [
    "Backlog",
    "BatchKey",
    "Candidate",
    "Charge",
    "CostModel",
    "Cut",
    "Decision",
    "Forecast",
    "Limits",
    "Line",
    "Load",
    "Returns",
    "Shares",
    "WorkKey",
    "decide",
]
