"""What a PromQL expression asks for, by a real parser."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

import promql_parser as promql

VARIABLES = {"$__rate_interval": "5m", "$__interval": "1m", "$model": ".*", "$instance": ".*"}  # as Grafana fills them in


@dataclass
class Selector:
    """One selector, such as ``name{label="value"}``."""

    name: str
    matchers: list[tuple[str, str, str]]  # label, operator, value

    def matches(self, name: str, labels: dict[str, str]) -> bool:
        """Whether a series is selected; labels that only Prometheus knows are not looked at."""
        return name == self.name and all(
            _holds(operator, value, labels[label]) for label, operator, value in self.matchers if label in labels
        )


@dataclass
class Query:
    """The selectors of an expression, and the labels that it groups or joins by."""

    selectors: list[Selector] = field(default_factory=list)
    groups: set[str] = field(default_factory=set)


def parsed(expression: str) -> Query:
    """Parse an expression.

    Raises:
        ValueError: it is no PromQL.
    """
    for name, value in VARIABLES.items():
        expression = expression.replace(name, value)
    query = Query()
    for part in _parts(promql.parse(expression)):
        if isinstance(part, promql.VectorSelector):
            matchers = [(one.name, OPERATORS[str(one.op)], one.value) for one in part.matchers.matchers]
            query.selectors.append(Selector(part.name, matchers))
        elif isinstance(part, promql.AggregateExpr) and part.modifier is not None:
            query.groups |= set(part.modifier.labels)
        elif isinstance(part, promql.BinaryExpr) and part.modifier is not None and part.modifier.matching is not None:
            query.groups |= set(part.modifier.matching.labels)
    return query


def _parts(expression: object) -> Iterator[object]:
    yield expression
    match expression:
        case promql.BinaryExpr():
            yield from _parts(expression.lhs)
            yield from _parts(expression.rhs)
        case promql.AggregateExpr() | promql.ParenExpr() | promql.UnaryExpr() | promql.SubqueryExpr():
            yield from _parts(expression.expr)
        case promql.Call():
            for argument in expression.args:
                yield from _parts(argument)
        case promql.MatrixSelector():
            yield from _parts(expression.vector_selector)


OPERATORS = {"MatchOp.Equal": "=", "MatchOp.NotEqual": "!=", "MatchOp.Re": "=~", "MatchOp.NotRe": "!~"}


def _holds(operator: str, wanted: str, value: str) -> bool:
    if operator in ("=", "!="):
        return (value == wanted) == (operator == "=")
    return bool(re.fullmatch(wanted, value)) == (operator == "=~")
