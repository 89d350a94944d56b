"""A typed expression: text and the types of its variables arrive, a function that can be asked often leaves.

The language is CEL (cel.dev) in its authors' own library, cel-expr-python: of five kept ones it alone checks names and types when
it compiles and tells where they are wrong, needs nothing else, takes 6 µs, and bounds what an expression may cost: 32 levels of
nesting, 10 000 steps of a loop, regular expressions in linear time, and no way to anything but its variables. Read by
`condition.py`.
"""

from __future__ import annotations

import difflib
import functools
import re
from collections.abc import Mapping
from typing import Any, Final

__all__ = ["LONGEST", "EvaluationError", "Expression", "ExpressionError"]

LONGEST: Final = 2000
"""Characters of an expression: far more than a person writes, and compiled within milliseconds."""

_PROBLEM = re.compile(r"^(?:\w+: )?ERROR: <input>:(-?\d+):(-?\d+): (.*?)(?: \[\w+\])?$", re.MULTILINE)
_CODES = re.compile(r"^[A-Z_]+: | \[[A-Z_]+\]$")
_UNDECLARED = re.compile(r"undeclared reference to '(\w+)'")
_NO_OVERLOAD = re.compile(r"no matching overload for '_?(\S+?)_?' applied to '\((.*)\)'")


class ExpressionError(ValueError):
    """The text is no such expression; says what is wrong and where."""


class EvaluationError(Exception):
    """An expression has no value for these variables, such as the first of no elements."""


class Expression:
    """A compiled expression that is true or false.

    Attributes:
        text: as it was written.
        variables: names that it looks at.

    Args:
        text: CEL.
        types: of the variables there are, by name, in CEL's words, such as `list<string>`.

    Raises:
        ExpressionError: too long, not CEL, an unknown name, wrong types, or not a truth value.
    """

    def __init__(self, text: str, types: Mapping[str, str]) -> None:
        if len(text) > LONGEST:
            raise ExpressionError(f"it has {len(text)} characters, and at most {LONGEST} are taken")
        self.text = text
        signature = tuple(types.items())
        self._compiled = _compiled(text, signature)
        kind = self._compiled.return_type().name()
        if kind != "BOOL":
            raise ExpressionError(f"it gives a {kind.lower()}; a condition is true or false, such as score < 0.6")
        self.variables = frozenset(name for name in types if _looks_at(text, signature, name))

    def holds(self, values: Mapping[str, object]) -> bool:
        """Its value.

        Args:
            values: of its variables; others are not looked at.

        Raises:
            EvaluationError: it has none.
        """
        try:
            found = self._compiled.eval(data=values)
        except RuntimeError as error:
            raise EvaluationError(_first_line(error)) from error
        value = found.value()
        if found.type().name() != "BOOL":
            raise EvaluationError(_first_line(value))
        return bool(value)


@functools.cache
def _environment(signature: tuple[tuple[str, str], ...]) -> Any:
    from cel_expr_python import cel  # noqa: PLC0415 - 14 MB that only models with conditions need

    return cel.NewEnv(variables={name: cel.Type(kind) for name, kind in signature})


def _compiled(text: str, signature: tuple[tuple[str, str], ...]) -> Any:
    try:
        return _environment(signature).compile(text)
    except RuntimeError as error:
        raise ExpressionError(_told(str(error), [name for name, _ in signature])) from error


def _looks_at(text: str, signature: tuple[tuple[str, str], ...], name: str) -> bool:
    """Whether the expression is none without this variable: the library tells names apart better than a search would."""
    try:
        _compiled(text, tuple(pair for pair in signature if pair[0] != name))
    except ExpressionError:
        return True
    return False


def _told(report: str, names: list[str]) -> str:
    """The library's report in a sentence or two: each problem with its line and column, and what helps."""
    problems = _PROBLEM.findall(report)
    if not problems:
        return _first_line(report)
    told = []
    for line, column, said in problems:
        where = f"line {line}, column {column}: " if int(line) > 0 else ""
        told.append(where + said.removesuffix(" (in container '')") + _advice(said, names))
    return "; ".join(dict.fromkeys(told))


def _advice(said: str, names: list[str]) -> str:
    if undeclared := _UNDECLARED.search(said):
        near = difflib.get_close_matches(undeclared[1], names, n=1)
        return f" (did you mean {near[0]}? known: {', '.join(names)})" if near else f" (known: {', '.join(names)})"
    overload = _NO_OVERLOAD.search(said)
    if overload and {"double", "int"} <= set(overload[2].split(", ")):
        return " (write the whole number with a point, such as 1.0)"
    if "mismatched input 'and'" in said or "mismatched input 'or'" in said:
        return " (write && for and, || for or, ! for not)"
    if "token recognition error at: '= '" in said:
        return " (write == for equal)"
    return ""


def _first_line(error: object) -> str:
    return _CODES.sub("", str(error).partition("\n")[0])
