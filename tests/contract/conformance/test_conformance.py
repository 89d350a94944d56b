"""Our served maps against pytorch-grad-cam, torchcam and captum: every method, under the gates of `gates.py`.

Where a library does not do what its paper says, our profile of that name is compared here, and `test_disagreements.py` names what
is different.
"""

from __future__ import annotations

import pytest
from contract.conformance.gates import COMPARISONS, Comparison
from contract.conformance.networks import Case
from contract.conformance.served import Served
from contract.conformance.table import Measured

# A map of both signs in most networks, and one of the best class.
CLASSES = (0, 5)


@pytest.mark.parametrize(
    ("comparison", "case"),
    [
        pytest.param(comparison, case, id=f"{comparison}, {case}")
        for comparison in COMPARISONS
        for case in comparison.cases
    ],
)
def test_served_map_is_the_librarys(
    served: Served, measured: list[Measured], comparison: Comparison, case: Case
) -> None:
    """Within the gate, for two classes."""
    found = []
    for class_index in CLASSES:
        question = case.question(class_index)
        ours = comparison.shown(served.map(case.network, question, comparison.asked), case.side)
        found.append(comparison.measure(comparison.answer(question), ours))

    measured.append(
        Measured(
            library=comparison.library,
            method=comparison.method,
            network=str(case),
            difference=max(found),
            limit=comparison.limit,
        )
    )
    assert max(found) <= comparison.limit, comparison.reason
