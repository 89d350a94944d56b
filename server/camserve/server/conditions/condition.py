"""A condition of a rule: an expression over `VARIABLES`, asked of one row at a time on the device thread."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from camserve.server.conditions.expressions import EvaluationError, Expression
from camserve.server.conditions.variables import VARIABLES, Subject
from camserve.server.errors import ExecutionFailed, Reason
from camserve.server.jobs import Circumstances, Reading

__all__ = ["CompiledCondition", "check_condition"]

_TYPES: Final = {name: variable.kind for name, variable in VARIABLES.items()}


class CompiledCondition:
    """A `jobs.Condition`.

    Attributes:
        variables: names that it looks at.

    Args:
        text: a CEL expression.
        class_labels: of the model, by class index.

    Raises:
        ExpressionError: it cannot be compiled.
    """

    def __init__(self, text: str, class_labels: Sequence[str] = ()) -> None:
        self._expression = Expression(text, _TYPES)
        self._class_labels = class_labels
        self.variables = self._expression.variables
        self._readers = [(name, VARIABLES[name].read) for name in _TYPES if name in self.variables]

    def __call__(self, reading: Reading, circumstances: Circumstances) -> bool:
        """Whether it holds.

        Args:
            reading: of the row; finite.
            circumstances: of its request.

        Raises:
            ExecutionFailed: it has no value here, such as the first label of an empty list.
        """
        subject = Subject(reading, circumstances, self._class_labels)
        try:
            return self._expression.holds({name: read(subject) for name, read in self._readers})
        except EvaluationError as error:
            raise ExecutionFailed(
                Reason.RULE_FAILED,
                f"the condition {self._expression.text!r} has no value here: {error}",
                metadata={"condition": self._expression.text, "problem": error},
            ) from error


def check_condition(text: str) -> None:
    """Raises ExpressionError unless the text is a condition, whatever the model."""
    Expression(text, _TYPES)
