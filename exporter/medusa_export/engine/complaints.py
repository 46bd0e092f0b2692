"""TensorRT's reasons for refusing a graph, one line per node."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

MAX_NODES = 10
_SOURCE_PLACE = re.compile(r"\.?\s*\(?In \w+ at \S+:\d+\)?")  # a place in TensorRT's own sources
_PREAMBLE = re.compile(r"^(?:\w+::\w+: )?Error Code \d+: [\w ]+ \(|^Assertion failed: |^Invalid Node - .*")
_CONDITION = re.compile(r'^.* && "(?P<words>[^"]+)"$')  # a condition in C++, and then in words
_CAUSES = (  # words in the message → the cause, or what to do
    (("dynamic",), "the size must be known when the engine is built"),
    (("convertdtype", "same input types", "data type", "convertonnxweights"), "TensorRT does not support this type here"),
    (("plugin not found",), "the operator is neither TensorRT's nor standard ONNX"),
    (("workspace",), "raise --workspace or leave it out"),
    (("hw-specific datatypes",), "leave that GPU out or use other --weights"),
    (("dedicated kernel",), "TensorRT has no kernel for attention of this dtype or shape"),
)


def parser_complaints(parser: Any) -> list[str]:
    """A line for each of the first `MAX_NODES` nodes that a parser refused, and the number of the others."""
    lines = list(dict.fromkeys(_complaint(parser.get_error(index)) for index in range(parser.num_errors)))
    more = len(lines) - MAX_NODES
    return [*lines[:MAX_NODES], f"… and {more} more"] if more > 0 else lines


def first_complaint(messages: Sequence[str]) -> str:
    """The first logged error, in one line. It is usually the cause of the others."""
    first = next((message for message in messages if message.strip()), "TensorRT gave no reason")
    return _with_cause(_SOURCE_PLACE.sub("", first.strip().splitlines()[0]))


def _complaint(error: Any) -> str:
    place = f"{error.node_operator()} node {error.node_name()!r}: " if error.node_operator() else ""
    return place + _with_cause(_reason(error.desc()))


def _reason(description: str) -> str:
    """The words of a description, without C++ conditions and source places, which only help TensorRT's developers."""
    lines = (_PREAMBLE.sub("", _SOURCE_PLACE.sub("", line)).strip() for line in description.splitlines())
    first = next((line for line in lines if line), "TensorRT gave no reason")
    if first in ("false", "0"):  # the whole message for an unknown operator
        return "TensorRT has no such operator"
    worded = _CONDITION.match(first)
    return worded["words"] if worded else first


def _with_cause(reason: str) -> str:
    line = " ".join(reason.split())
    cause = next((cause for words, cause in _CAUSES if any(word in line.lower() for word in words)), None)
    return f"{line} ({cause})" if cause else line
