"""The fields that all requests for answers share, and the options of the runtime that they stand for."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from medusa_runtime import CandidateTree, DynamicTree, Manifest, TreeError
from medusa_serve.protocol.base import FieldError, Items, RequestBody, at_most, unsupported

REQUEST_ID = r"^[A-Za-z0-9._:\-]{1,128}$"
MAX_STOPS, MAX_STOP_LENGTH, MAX_TOP_LOGPROBS = 64, 1000, 20
MAX_TOKEN_IDS, MAX_METADATA = 4096, 1000  # items of the fields that name tokens, and of notes
MAX_TREE_NODES, MAX_TREE_DEPTH = 1024, 32
TOKEN_ID = re.compile(r"[0-9]{1,9}")
ANY_OBJECT: dict[str, Any] = {"type": "object"}


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class StreamOptions(_Part):
    """OpenAI's `stream_options`."""

    include_usage: bool = Field(False, description="end the stream with a chunk that has the token counts and no choices")
    continuous_usage_stats: bool = Field(False, description="tell token counts with every chunk (vLLM)")
    include_obfuscation: bool | None = Field(None, description="has no effect here")


class MedusaFields(_Part):
    """Our own fields: how drafts are made, and what is told about them."""

    enabled: bool = Field(True, description="false for plain autoregressive decoding")
    tree: dict[str, Any] | None = Field(None, description="a candidate tree: choices, or parents and ranks")
    tree_nodes: int | None = Field(None, ge=1, description="a dynamic tree of this many nodes")
    prompt_lookup: bool | None = Field(None, description="also draft what came after the same tokens before")
    acceptance: Literal["exact", "typical"] = Field("exact", description="which drafts are accepted")
    posterior_threshold: float | None = Field(None, gt=0, le=1, description="typical acceptance: the paper's epsilon")
    posterior_alpha: float | None = Field(None, gt=0, le=1, description="typical acceptance: the paper's delta")
    drafts: bool = Field(False, description="tell the draft of each step with its chunk; for streams")

    @model_validator(mode="after")
    def _one_tree(self) -> Self:
        if self.tree is not None and self.tree_nodes is not None:
            raise FieldError("medusa.tree", "'medusa.tree' and 'medusa.tree_nodes' exclude each other")
        if self.tree is not None and _is_large(self.tree):
            raise FieldError(
                "medusa.tree",
                f"'medusa.tree' must have at most {MAX_TREE_NODES} nodes, and a depth of {MAX_TREE_DEPTH} at most",
            )
        try:
            self.options()
        except TreeError as error:
            raise FieldError("medusa.tree", f"'medusa.tree' cannot be used: {error}") from error
        return self

    def options(self) -> dict[str, Any]:
        """Fields of `GenerationOptions`."""
        tree: CandidateTree | DynamicTree | None = DynamicTree(self.tree_nodes) if self.tree_nodes else None
        if self.tree is not None:
            tree = CandidateTree.from_json(self.tree)
        return {
            "medusa": self.enabled,
            "tree": tree,
            "prompt_lookup": self.prompt_lookup,
            "acceptance": self.acceptance,
            "posterior_threshold": self.posterior_threshold,
            "posterior_alpha": self.posterior_alpha,
            "drafts": self.drafts,
        }


def _is_large(tree: Mapping[str, Any]) -> bool:
    """Whether a tree has more nodes, or is deeper, than any that is of use: to read it would take long."""
    lists = [nodes for nodes in tree.values() if isinstance(nodes, list)]
    depths = [len(choice) for nodes in lists for choice in nodes[:MAX_TREE_NODES] if isinstance(choice, list)]
    return max(map(len, lists), default=0) > MAX_TREE_NODES or max(depths, default=0) > MAX_TREE_DEPTH


class JsonSchemaFormat(_Part):
    """The schema of `response_format`."""

    name: str | None = Field(None, description="has no effect here")
    description: str | None = Field(None, description="has no effect here")
    schema_: dict[str, Any] = Field(alias="schema", description="the JSON schema that the answer follows")
    strict: bool | None = Field(None, description="has no effect here: answers always follow the schema")


class ResponseFormat(_Part):
    """OpenAI's `response_format`."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise FieldError("response_format", "'response_format' needs json_schema if, and only if, its type is json_schema")
        return self

    @property
    def json_value(self) -> dict[str, Any] | None:
        """The schema that the answer follows; None for text."""
        if self.json_schema is not None:
            return self.json_schema.schema_
        return ANY_OBJECT if self.type == "json_object" else None


class StructuredOutputs(_Part):
    """vLLM's `structured_outputs`."""

    json_: dict[str, Any] | None = Field(None, alias="json")
    regex: str | None = None
    choice: Items[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None


class UnusedFields(RequestBody):
    """Fields of OpenAI that change no answer; they are taken and not looked at."""

    user: str | None = Field(None, description="who the end user is")
    metadata: Annotated[dict[str, str], at_most(MAX_METADATA)] | None = Field(None, description="notes of the client")
    safety_identifier: str | None = Field(None, description="who the end user is")
    prompt_cache_key: str | None = Field(None, description="a hint for caches")
    service_tier: Literal["auto", "default"] | None = Field(None, description="a price class")


class SamplingFields(UnusedFields):
    """How an answer is decoded."""

    model: str | None = Field(None, description="the model's name; omit for the one that is served")
    n: int = Field(1, ge=1, le=128, description="answers to each prompt")
    seed: int | None = Field(None, description="the same seed and fields give the same answer")
    stop: str | Items[str] | None = Field(None, description="texts that end the answer, which does not contain them")
    stop_token_ids: Annotated[Items[int], at_most(MAX_TOKEN_IDS)] | None = Field(
        None, description="token ids that end the answer (vLLM)"
    )
    temperature: float | None = Field(None, ge=0, le=100, description="0 is greedy; omit for the model's own value, or 1")
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1, description="sample from this many likely tokens; -1 or 0 for all (vLLM)")
    min_p: float | None = Field(None, ge=0, le=1, description="(vLLM)")
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    repetition_penalty: float | None = Field(None, gt=0, le=10, description="(vLLM)")
    logit_bias: Annotated[dict[str, float], at_most(MAX_TOKEN_IDS)] | None = Field(
        None, description="numbers that are added to logits, by token id"
    )
    max_tokens: int | None = Field(None, ge=0, description="the most tokens of an answer; omit for all there is room for")
    min_tokens: int | None = Field(None, ge=0, description="the fewest tokens of an answer (vLLM)")
    ignore_eos: bool = Field(False, description="go on after end-of-sequence tokens (vLLM)")
    skip_special_tokens: bool = Field(True, description="leave special tokens out of the text (vLLM)")
    prompt_logprobs: int | None = Field(None, ge=0, le=100, description="tell how likely the prompt's tokens are (vLLM)")
    stream: bool | None = Field(None, description="send the answer while it is decoded, as Server-Sent Events")
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = Field(None, description="the form of the answer (vLLM)")
    guided_json: dict[str, Any] | None = Field(None, description="a JSON schema (vLLM)")
    guided_regex: str | None = Field(None, description="a regular expression (vLLM)")
    guided_choice: Items[str] | None = Field(None, description="texts, one of which is the answer (vLLM)")
    guided_grammar: str | None = Field(None, description="a grammar in llguidance's Lark form or llama.cpp's GBNF (vLLM)")
    request_id: str | None = Field(
        None, pattern=REQUEST_ID, description="the request's id in logs and in the response, as X-Request-Id (vLLM)"
    )
    priority: int | None = Field(None, description="0 alone: requests are taken in their order (vLLM)")
    medusa: MedusaFields = MedusaFields()

    @model_validator(mode="after")
    def _honoured(self) -> Self:
        if self.priority:
            raise unsupported("priority", "requests are taken in the order in which they come")
        if isinstance(self.stop, list) and len(self.stop) > MAX_STOPS:
            raise FieldError("stop", f"'stop' has {len(self.stop)} texts; it must have at most {MAX_STOPS}")
        if any(len(text) > MAX_STOP_LENGTH for text in ([self.stop] if isinstance(self.stop, str) else self.stop or [])):
            raise FieldError("stop", f"'stop' has a text of more than {MAX_STOP_LENGTH} characters")
        if self.stream_options is not None and not self.stream:
            raise FieldError("stream_options", "'stream_options' is given, and 'stream' is not true")
        if self.medusa.drafts and not self.stream:
            raise FieldError("medusa.drafts", "'medusa.drafts' needs 'stream': drafts are told with the chunks of an answer")
        if self.prompt_logprobs is not None and self.stream:
            raise unsupported("prompt_logprobs", "the prompt's log-probabilities cannot be streamed")
        structures = self._structures()
        if len(structures) > 1:
            first, second = list(structures)[:2]
            raise FieldError(second, f"'{first}' and '{second}' exclude each other: an answer has one form")
        for token in self.logit_bias or {}:
            if not TOKEN_ID.fullmatch(token):
                raise FieldError("logit_bias", f"'logit_bias' has the key '{token[:40]}'; its keys must be token ids")
        return self

    @property
    def usage_is_streamed(self) -> bool:
        """Whether a stream ends with a chunk of token counts."""
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def structure(self) -> dict[str, Any]:
        """The form that the answer has, as the runtime names it; none for free text."""
        return next(iter(self._structures().values()), {})

    def _structures(self) -> dict[str, dict[str, Any]]:
        """Every form that is asked for, by the field that asks."""
        outputs = self.structured_outputs or StructuredOutputs()
        asked: dict[str, tuple[str, Any]] = {
            "response_format": ("json_schema", self.response_format.json_value if self.response_format else None),
            "guided_json": ("json_schema", self.guided_json),
            "guided_regex": ("regex", self.guided_regex),
            "guided_choice": ("choice", self.guided_choice),
            "guided_grammar": ("grammar", self.guided_grammar),
            "structured_outputs.json": ("json_schema", outputs.json_),
            "structured_outputs.regex": ("regex", outputs.regex),
            "structured_outputs.choice": ("choice", outputs.choice),
            "structured_outputs.grammar": ("grammar", outputs.grammar),
            "structured_outputs.json_object": ("json_schema", ANY_OBJECT if outputs.json_object else None),
        }
        return {field: {name: value} for field, (name, value) in asked.items() if value is not None}

    def sampling_options(self, manifest: Manifest) -> dict[str, Any]:
        """Fields of `GenerationOptions`. Those that are None are left to the bundle.

        Args:
            manifest: the bundle's. Its temperature is used if the request has none, and 1 if neither has one.
        """
        return {
            "n": self.n,
            "seed": self.seed,
            "stop": self.stop,
            "stop_token_ids": self.stop_token_ids,
            "temperature": default_temperature(manifest) if self.temperature is None else self.temperature,
            "top_p": self.top_p,
            "top_k": 0 if self.top_k == -1 else self.top_k,
            "min_p": self.min_p,
            "presence_penalty": self.presence_penalty,
            "frequency_penalty": self.frequency_penalty,
            "repetition_penalty": self.repetition_penalty,
            "logit_bias": {int(token): bias for token, bias in (self.logit_bias or {}).items()} or None,
            "max_new_tokens": self.max_tokens,
            "min_new_tokens": self.min_tokens,
            "ignore_eos": self.ignore_eos or None,
            "skip_special_tokens": self.skip_special_tokens,
            "prompt_logprobs": self.prompt_logprobs,
            **self.structure,
            **self.medusa.options(),
        }


def default_temperature(manifest: Manifest) -> float:
    """The temperature of requests that name none: the checkpoint's, or OpenAI's default."""
    own = manifest.generation.sampling.temperature if manifest.generation is not None else None
    return 1.0 if own is None else own


def refuse_unsupported(given: Mapping[str, tuple[bool, str]]) -> None:
    """Refuse the first field that is used.

    Args:
        given: by field, whether it is used, and why it cannot be honoured.
    """
    for field, (is_used, why) in given.items():
        if is_used:
            raise unsupported(field, why)
