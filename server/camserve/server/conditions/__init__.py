"""Conditions over what a model said: the `when` of a rule in, a function of a reading out. Nothing here knows the rules.

`models/config.py` compiles them to see that they can be; `rules/` keeps the result with the rule.
"""

from __future__ import annotations

from camserve.server.conditions.condition import CompiledCondition, check_condition
from camserve.server.conditions.expressions import ExpressionError
from camserve.server.conditions.variables import VARIABLES, Variable

__all__ = ["VARIABLES", "CompiledCondition", "ExpressionError", "Variable", "check_condition"]
