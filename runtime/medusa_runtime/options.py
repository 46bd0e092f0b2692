"""The options of a request, checked before any work."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, InstanceOf, ValidationError, ValidationInfo, field_validator, model_validator

from medusa_runtime.bundle.manifest import GenerationFacts
from medusa_runtime.drafting.tree import CandidateTree, DynamicTree
from medusa_runtime.errors import OptionError

MAX_SEED = (1 << 64) - 1
MAX_SECONDS = 1e6  # 11 days: longer than any request, and short enough for every clock and lock
KINDS = {  # what pydantic describes less clearly
    "tree": "a CandidateTree or a DynamicTree",
    "logit_bias": "token ids with numbers, such as {42: -5.0}",
    "json_schema": "a JSON schema as a dictionary",
    "stop_token_ids": "a list of token ids",
    "suppress_tokens": "a list of token ids",
    "begin_suppress_tokens": "a list of token ids",
    "stop": "a list of texts",
    "choice": "a list of texts",
    "tools": "a list of dictionaries",
    "documents": "a list of dictionaries",
    "template_options": "a dictionary of names with values, such as {'enable_thinking': False}",
}
STRUCTURES = ("json_schema", "regex", "choice", "grammar")
WRAPPER_KEYS = {"type", "name", "description", "strict", "schema", "json_schema"}  # of OpenAI's `response_format`
Tree = InstanceOf[CandidateTree] | InstanceOf[DynamicTree]
Options = TypeVar("Options", bound="DecodingOptions")


class DecodingOptions(BaseModel):
    """How token ids are decoded. Use `of` to make one from a user's values: its errors are one line.

    None stands for a field's default in every field, as if the field was not given.

    With `acceptance="exact"` the candidate tree changes the speed and nothing else. At temperature 0 the tokens are those of
    greedy decoding. Above it they are samples of exactly the model's distribution. The same seed gives the same tokens with
    any tree and beside any other requests, except for ties within the rounding of a forward pass.
    At temperature 0 nothing is drawn, so top_k, top_p, min_p and typical acceptance have no effect.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    max_new_tokens: int | None = Field(
        None, ge=0, description="the most tokens of an answer; 0 only reads the prompt; omit for 256, or for what fits"
    )
    min_new_tokens: int = Field(0, ge=0, description="no end-of-sequence or stop token before the answer has this many tokens")
    temperature: float = Field(0.0, ge=0, le=100, description="0 is greedy")
    top_k: int = Field(0, ge=0, description="sample from the k most likely tokens; 0 for all")
    top_p: float = Field(1.0, gt=0, le=1, description="sample from the fewest tokens that have this probability together")
    min_p: float = Field(0.0, ge=0, le=1, description="leave out tokens with less than this part of the best one's probability")
    repetition_penalty: float = Field(
        1.0, gt=0, le=10, description="divides positive logits, and multiplies negative ones, of tokens in prompt or answer"
    )
    presence_penalty: float = Field(0.0, ge=-2, le=2, description="subtracted from logits of tokens in the answer")
    frequency_penalty: float = Field(0.0, ge=-2, le=2, description="subtracted for each time a token is in the answer")
    logit_bias: Mapping[int, float] = Field(default_factory=dict, description="added to logits, by token id")
    suppress_tokens: tuple[int, ...] = Field((), description="token ids that are never given out")
    begin_suppress_tokens: tuple[int, ...] = Field((), description="token ids that are not given out as the first token")
    seed: int | None = Field(None, ge=0, le=MAX_SEED, description="of the random numbers; omit for a random seed")
    stop_token_ids: tuple[int, ...] = Field(
        (), description="token ids that end the answer, as the model's own end-of-sequence tokens do"
    )
    ignore_eos: bool = Field(False, description="go on after end-of-sequence tokens")
    logprobs: int | None = Field(
        None, ge=0, le=100, description="tell each token's log-probability, and those of this many likely tokens"
    )
    prompt_logprobs: int | None = Field(
        None, ge=0, le=100, description="the same for each token of the prompt, given the tokens before it"
    )
    drafts: bool = Field(False, description="tell the draft that each step verified, with each chunk of the answer")
    acceptance: Literal["exact", "typical"] = Field("exact", description="which drafts are accepted")
    posterior_threshold: float = Field(0.09, gt=0, le=1, description="typical acceptance: the paper's epsilon")
    posterior_alpha: float = Field(0.3, gt=0, le=1, description="typical acceptance: the paper's delta")
    medusa: bool = Field(True, description="False for plain autoregressive decoding")
    tree: Tree | None = Field(None, description="which continuations are verified; omit for the engine's own tree")
    prompt_lookup: bool | None = Field(
        None, description="also draft what came after the same tokens before; omit for the engine's own choice"
    )
    deadline_seconds: float | None = Field(
        None, gt=0, le=MAX_SECONDS, description="the answer ends this long after the request was made, with what it has by then"
    )
    max_queue_seconds: float | None = Field(
        None, ge=0, le=MAX_SECONDS, description="the longest wait for a slot; after it the request fails"
    )

    @classmethod
    def of(cls, options: Self | None = None, /, **fields: Any) -> Self:
        """Options from a user's values. A field that is given replaces the same field of `options`.

        Raises:
            OptionError: one line with the field's name, its value, and what the field allows.
        """
        if options is not None and not isinstance(options, cls):
            raise OptionError(f"the options are {options!r}; they must be {cls.__name__}, or named, such as max_new_tokens=64")
        given = (
            {name: getattr(options, name) for name in options.model_fields_set if name in cls.model_fields} if options else {}
        )
        try:
            return cls(**(given | fields))
        except ValidationError as error:
            raise OptionError(_line(error, cls)) from error

    @model_validator(mode="before")
    @classmethod
    def _without_nones(cls, given: Any) -> Any:
        """Leave out each field that is None, so that it gets its default and does not count as set."""
        if not isinstance(given, dict):
            return given
        return {name: value for name, value in given.items() if value is not None or name not in cls.model_fields}

    @field_validator("logit_bias")
    @classmethod
    def _finite(cls, biases: Mapping[int, float]) -> Mapping[int, float]:
        for token, bias in biases.items():
            if not -100 <= bias <= 100:
                raise ValueError(f"logit_bias is {bias} for token {token}; it must be between -100 and 100")
        return biases

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.max_new_tokens is not None and self.min_new_tokens > self.max_new_tokens:
            raise ValueError(
                f"min_new_tokens is {self.min_new_tokens}; it must be at most max_new_tokens, {self.max_new_tokens}"
            )
        return self

    @property
    def is_sampled(self) -> bool:
        """Whether tokens are drawn at random."""
        return self.temperature > 0

    @property
    def has_penalties(self) -> bool:
        """Whether logits depend on the tokens before."""
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1.0, 0.0, 0.0)

    @property
    def named_tokens(self) -> dict[str, Iterable[int]]:
        """The token ids that options name, by option. All of them have to be in the vocabulary."""
        names = ("logit_bias", "suppress_tokens", "begin_suppress_tokens", "stop_token_ids")
        return {name: getattr(self, name) for name in names}


class GenerationOptions(DecodingOptions):
    """How a request is answered: `DecodingOptions`, and the options that concern text and time."""

    stop: tuple[str, ...] = Field((), description="texts that end the answer; they are not part of it")
    n: int = Field(1, ge=1, le=128, description="how many answers")
    raw: bool = Field(False, description="take the prompt as it is, without the chat template")
    chat_template: str | None = Field(
        None, description="the name of one of the bundle's chat templates; omit for the default one"
    )
    tools: tuple[Mapping[str, Any], ...] = Field(
        (), description="functions that the model may call, as JSON schemas; for the chat template"
    )
    documents: tuple[Mapping[str, Any], ...] = Field(
        (), description="texts that the model may use, such as {'title': …, 'text': …}; for the chat template"
    )
    template_options: Mapping[str, Any] = Field(
        default_factory=dict, description="further variables of the chat template, such as {'enable_thinking': False}"
    )
    add_generation_prompt: bool = Field(True, description="end the prompt with the beginning of an assistant's message")
    continue_final_message: bool = Field(
        False, description="go on with the last message, which is left open, instead of beginning a new one"
    )
    plain_content: bool = Field(
        False, description="read messages as plain text, so that text which looks like a special token is no special token"
    )
    max_prompt_tokens: int | None = Field(
        None, ge=1, description="refuse a longer prompt; omit for the bundle's own limit alone"
    )
    skip_special_tokens: bool = Field(True, description="leave special tokens out of the answer's text")
    json_schema: Mapping[str, Any] | None = Field(None, description="the answer is JSON that this schema allows")
    regex: str | None = Field(None, description="the answer matches this whole expression")
    choice: tuple[str, ...] = Field((), description="the answer is one of these texts")
    grammar: str | None = Field(
        None, description="the answer follows this grammar, in llguidance's Lark form or llama.cpp's GBNF"
    )

    @field_validator("stop", "choice", mode="before")
    @classmethod
    def _texts(cls, texts: Any, info: ValidationInfo) -> Any:
        texts = (texts,) if isinstance(texts, str) else texts
        if isinstance(texts, list | tuple) and "" in texts:
            raise ValueError(f"{info.field_name} holds an empty text; it cannot be empty")
        if info.field_name == "choice" and isinstance(texts, list | tuple) and not texts:
            raise ValueError("choice is an empty list; name at least one text, or leave it out")
        return texts

    @field_validator("grammar", "chat_template")
    @classmethod
    def _filled(cls, text: str | None, info: ValidationInfo) -> str | None:
        if text is not None and not text.strip():
            raise ValueError(f"{info.field_name} is {text!r}; it cannot be empty")
        return text

    @field_validator("json_schema")
    @classmethod
    def _unwrapped(cls, schema: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
        """Refuse OpenAI's wrapper of a schema, which as a schema would allow any JSON."""
        if schema is not None and schema.keys() <= WRAPPER_KEYS:
            for key in ("schema", "json_schema"):
                if isinstance(schema.get(key), Mapping):
                    raise ValueError(f"json_schema holds the schema under {key!r}, as in OpenAI's API; pass the inner schema")
        return schema

    @field_validator("template_options")
    @classmethod
    def _own_names(cls, values: Mapping[str, Any]) -> Mapping[str, Any]:
        own = ("messages", "tools", "documents", "chat_template", "add_generation_prompt", "continue_final_message")
        if taken := [name for name in own if name in values]:
            where = "the prompt" if taken[0] == "messages" else f"the option {taken[0]}"
            raise ValueError(f"template_options holds {taken[0]}; give it as {where}")
        return values

    @model_validator(mode="after")
    def _one_structure(self) -> Self:
        structures = [name for name in STRUCTURES if name in self.structure]
        if len(structures) > 1:
            raise ValueError(f"{structures[0]} and {structures[1]} exclude each other")
        if structures and self.ignore_eos:
            raise ValueError(f"{structures[0]} and ignore_eos exclude each other: the structure says where the answer ends")
        if structures and self.max_new_tokens == 0:
            raise ValueError(f"max_new_tokens is 0; with {structures[0]} it must be at least 1")
        longest = max((len(text.encode(errors="surrogatepass")) for text in self.choice), default=0)
        if self.choice and self.min_new_tokens > longest:  # a token has at least one byte
            raise ValueError(
                f"min_new_tokens is {self.min_new_tokens}; the longest text of choice has at most {longest} tokens"
            )
        return self

    @model_validator(mode="after")
    def _one_form_of_prompt(self) -> Self:
        if self.raw:
            names = ("chat_template", "tools", "documents", "template_options", "continue_final_message")
            if templated := [name for name in names if getattr(self, name)]:
                raise ValueError(f"raw and {templated[0]} exclude each other: a raw prompt has no chat template")
        if self.continue_final_message and self.add_generation_prompt and "add_generation_prompt" in self.model_fields_set:
            raise ValueError("continue_final_message and add_generation_prompt exclude each other; leave one of them out")
        return self

    @property
    def begins_message(self) -> bool:
        """Whether the chat template begins the assistant's message: `add_generation_prompt`, unless the last one goes on."""
        return self.add_generation_prompt and not self.continue_final_message

    @property
    def structure(self) -> dict[str, Any]:
        """The option that restricts the answer's form, with its value: one of json_schema, regex, choice and grammar."""
        asked = {"json_schema": self.json_schema, "regex": self.regex, "choice": self.choice or None, "grammar": self.grammar}
        return {name: value for name, value in asked.items() if value is not None}


def with_defaults(options: Options, generation: GenerationFacts | None) -> Options:
    """Options with a bundle's defaults in the fields that a request did not set.

    Defaults for sampling (top_k, top_p, min_p) only go to requests that sample. A default temperature is never taken: requests
    are greedy unless they set one. A default never makes a request contradict itself: `min_new_tokens` is lowered to the
    request's max_new_tokens, and left out if a structure says where the answer ends.

    Args:
        options: as the request set them. A field counts as set if it was given and is not None.
        generation: the defaults, as `Manifest.generation` has them; None for no defaults.
    """
    if generation is None:
        return options
    defaults = generation.defaults.model_dump(exclude_none=True)
    if options.is_sampled:
        defaults |= generation.sampling.model_dump(exclude_none=True, exclude={"temperature"})
    if "min_new_tokens" in defaults:
        if isinstance(options, GenerationOptions) and options.structure:
            del defaults["min_new_tokens"]
        elif options.max_new_tokens is not None:
            defaults["min_new_tokens"] = min(defaults["min_new_tokens"], options.max_new_tokens)
    missing = {name: value for name, value in defaults.items() if name not in options.model_fields_set}
    return type(options).of(options, **missing) if missing else options


def _line(error: ValidationError, model: type[BaseModel]) -> str:
    """A validation error in one line for users."""
    first = error.errors()[0]
    name = str(first["loc"][0]) if first["loc"] else ""
    match first["type"]:
        case "extra_forbidden":
            near = difflib.get_close_matches(name, model.model_fields, n=1)
            return f"there is no option {name}" + (f"; did you mean {near[0]}?" if near else "")
        case "value_error":
            return f"{first['ctx']['error']}"
    if first["type"] in {"tuple_type", "mapping_type", "dict_type", "is_instance_of"}:
        return f"{name} is {' '.join(repr(first['input']).split())}; it must be {KINDS[name]}"
    asked = first["msg"].removeprefix("Input should be ").removeprefix("a valid ").partition(", unable to parse")[0]
    return f"{name} is {' '.join(repr(first['input']).split())}; it must be {asked}"
