"""Reads a request of Triton: the prompt, the options, and what is to be sent."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pydantic import Field, field_validator

from medusa_runtime import GenerationOptions, Manifest, OptionError
from medusa_serve.protocol.base import FieldError
from medusa_serve.protocol.sampling import SamplingFields
from medusa_serve.triton.tensors import FLAGS, SAMPLING_INPUTS

Values = Callable[[str], list[Any] | None]  # the values of an input by its name; None if the request has no such input


class SamplingParameters(SamplingFields):
    """vLLM's sampling parameters."""

    logprobs: int | None = Field(None, ge=0, le=100, description="tell how likely the tokens are, and others were")

    @field_validator("structured_outputs", mode="before")
    @classmethod
    def _unpacked(cls, value: Any) -> Any:
        """The vLLM backend takes them as text within the text."""
        try:
            return json.loads(value) if isinstance(value, str) else value
        except (ValueError, RecursionError) as error:
            raise FieldError("structured_outputs", f"'structured_outputs' is not valid JSON: {error}") from error


@dataclass(frozen=True)
class Asked:
    """A request that was read."""

    prompt: str | list[dict[str, Any]]
    options: GenerationOptions
    streams: bool
    echoed: str  # the text before the first answer's text
    outputs: frozenset[str]  # those that are sent beside text_output and index


def read_request(values: Values, parameters: str | None, manifest: Manifest) -> Asked:
    """Read a request.

    Args:
        values: gives the values of an input.
        parameters: the request's parameters as JSON text. They count as `sampling_parameters` if that input is missing.
        manifest: the bundle's, which has defaults.

    Raises:
        OptionError, ApiError: something in it cannot be used.
    """
    streams = _flag(values, "stream")
    text, messages = _text(values, "text_input"), _json(values, "messages", list)
    if (text is None) == (messages is None):
        raise OptionError("the request needs one of the inputs text_input and messages, and not both")
    outputs = frozenset(flag.name.removeprefix("return_") for flag in FLAGS if _flag(values, flag.name))
    sampling = _sampling(values, parameters)
    fields = sampling.sampling_options(manifest) | {"logprobs": _logprobs(sampling, outputs)}
    own = _json(values, "options", dict) or {}
    fields = {name: value for name, value in fields.items() if value is not None} | {"raw": text is not None} | own
    options = GenerationOptions.of(**fields)
    return Asked(text if text is not None else messages or [], options, streams, _echoed(values, text, streams), outputs)


def _sampling(values: Values, parameters: str | None) -> SamplingParameters:
    given = _given(values, parameters)
    if "stream" in given:
        raise OptionError("sampling_parameters holds stream; give it as the input stream")
    return SamplingParameters.of(json.dumps(given).encode())


def _given(values: Values, parameters: str | None) -> dict[str, Any]:
    """The sampling parameters of all inputs, by vLLM's names."""
    given: dict[str, Any] | None = _json(values, "sampling_parameters", dict)
    if given is None:
        found = _parsed("the request's parameters", parameters or "{}", dict)
        given = {name: value for name, value in found.items() if not name.startswith("triton_")}
    for spec in SAMPLING_INPUTS:
        found_values = values(spec.name)
        if found_values is None:
            continue
        name = "stop" if spec.name == "stop_words" else spec.name
        value = [_decoded(spec.name, entry) for entry in found_values if entry] if spec.is_list else found_values[0]
        if value == []:
            continue
        if spec.name == "bad_words":
            raise OptionError("the input bad_words is not supported; leave it out, or use logit_bias in sampling_parameters")
        if name in given:
            raise OptionError(f"sampling_parameters holds {name}, and there is an input {spec.name}; give one of them")
        given[name] = value
    return given


def _logprobs(sampling: SamplingParameters, outputs: frozenset[str]) -> int | None:
    """How many likely tokens are told: as asked for, else none beside the token itself if an output needs it."""
    needed = 0 if outputs & {"logprobs", "cumulative_logprob"} else None
    return needed if sampling.logprobs is None else sampling.logprobs


def _echoed(values: Values, text: str | None, streams: bool) -> str:
    """The prompt, if it is to stand before the answer: the vLLM backend does so unless it streams or is told not to."""
    given = values("exclude_input_in_output")
    excludes = bool(given[0]) if given is not None else streams or text is None
    if excludes or text is None:
        if not excludes:
            raise OptionError("exclude_input_in_output is false, and the prompt is messages; it needs text_input")
        return ""
    if streams:
        raise OptionError("exclude_input_in_output is false, and stream is true; a stream does not repeat the prompt")
    return text


def _flag(values: Values, name: str) -> bool:
    found = values(name)
    return bool(found[0]) if found else False


def _text(values: Values, name: str) -> str | None:
    found = values(name)
    return _decoded(name, found[0]) if found else None


def _decoded(name: str, value: Any) -> str:
    try:
        return value.decode() if isinstance(value, bytes) else str(value)
    except UnicodeDecodeError as error:
        raise OptionError(f"the input {name} is not UTF-8 text") from error


def _json(values: Values, name: str, kind: type) -> Any:
    text = _text(values, name)
    return None if text is None else _parsed(f"the input {name}", text, kind)


def _parsed(what: str, text: str, kind: type) -> Any:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise OptionError(f"{what} is not valid JSON: {error}") from error
    if not isinstance(found, kind):
        raise OptionError(f"{what} is {found!r:.80}; it must be a JSON {'list' if kind is list else 'object'}")
    return found
