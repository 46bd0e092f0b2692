"""What a request may ask for, checked before any work."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, InstanceOf, ValidationError, ValidationInfo, field_validator, model_validator

from medusa_runtime.drafting.tree import CandidateTree, DynamicTree
from medusa_runtime.errors import OptionError

MAX_SEED = (1 << 64) - 1
KINDS = {  # what pydantic has stranger words for
    "tree": "a CandidateTree or a DynamicTree",
    "logit_bias": "token ids with numbers, such as {42: -5.0}",
    "json_schema": "a JSON schema as a dictionary",
    "stop_token_ids": "a list of token ids",
    "stop": "a list of texts",
    "choice": "a list of texts",
}
Tree = InstanceOf[CandidateTree] | InstanceOf[DynamicTree]


class DecodingOptions(BaseModel):
    """How token ids are decoded. Use `of` to make one from a user's values: its errors are one line.

    With `acceptance="exact"` the candidate tree changes the speed and nothing else: at temperature 0 the tokens are those of
    greedy decoding, above it they are samples of exactly the model's distribution, and the same seed gives the same
    tokens whatever the tree and whatever else is decoded meanwhile, but for ties within the rounding of a forward pass.
    At temperature 0 nothing is drawn: top_k, top_p, min_p and typical acceptance then have nothing to do.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    max_new_tokens: int | None = Field(None, ge=1, description="at most so many tokens; none for 256, or what fits")
    min_new_tokens: int = Field(0, ge=0, description="no end-of-sequence or stop token before so many tokens")
    temperature: float = Field(0.0, ge=0, le=100, description="0 is greedy")
    top_k: int = Field(0, ge=0, description="sample from the k most likely tokens; 0 for all")
    top_p: float = Field(1.0, gt=0, le=1, description="sample from the fewest tokens that have this probability together")
    min_p: float = Field(0.0, ge=0, le=1, description="leave out tokens with less than this part of the best one's probability")
    repetition_penalty: float = Field(1.0, gt=0, le=10, description="divides positive logits of tokens in prompt or answer")
    presence_penalty: float = Field(0.0, ge=-2, le=2, description="subtracted from logits of tokens in the answer")
    frequency_penalty: float = Field(0.0, ge=-2, le=2, description="subtracted for each time a token is in the answer")
    logit_bias: Mapping[int, float] = Field(default_factory=dict, description="added to logits, by token id")
    seed: int | None = Field(None, ge=0, le=MAX_SEED, description="none for a random one")
    stop_token_ids: tuple[int, ...] = Field((), description="end the answer, besides the model's own end-of-sequence tokens")
    ignore_eos: bool = Field(False, description="go on after end-of-sequence tokens")
    logprobs: int | None = Field(None, ge=0, le=100, description="log-probabilities of each token and of so many likely ones")
    acceptance: Literal["exact", "typical"] = Field("exact", description="which drafts are accepted")
    posterior_threshold: float = Field(0.09, gt=0, le=1, description="typical acceptance: the paper's epsilon")
    posterior_alpha: float = Field(0.3, gt=0, le=1, description="typical acceptance: the paper's delta")
    medusa: bool = Field(True, description="False for plain autoregressive decoding")
    tree: Tree | None = Field(None, description="which continuations are verified; none for the engine's own")
    prompt_lookup: bool | None = Field(
        None, description="also draft what came after the same tokens before; none for the engine's own choice"
    )

    @classmethod
    def of(cls, options: Self | None = None, /, **fields: Any) -> Self:
        """Options from values of a user's, instead of the fields of other options where those are given.

        Raises:
            OptionError: one line with the field's name, its value and what may be.
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


class GenerationOptions(DecodingOptions):
    """How a request is answered: `DecodingOptions`, and what is about text."""

    stop: tuple[str, ...] = Field((), description="texts that end the answer; they are not part of it")
    n: int = Field(1, ge=1, le=128, description="how many answers")
    raw: bool = Field(False, description="take the prompt as it is, without the chat template")
    json_schema: Mapping[str, Any] | None = Field(None, description="the answer is JSON that this schema allows")
    regex: str | None = Field(None, description="the answer matches this whole expression")
    choice: tuple[str, ...] = Field((), description="the answer is one of these texts")

    @field_validator("stop", "choice", mode="before")
    @classmethod
    def _texts(cls, texts: Any, info: ValidationInfo) -> Any:
        texts = (texts,) if isinstance(texts, str) else texts
        if isinstance(texts, list | tuple) and "" in texts:
            raise ValueError(f"{info.field_name} holds an empty text; it cannot be empty")
        return texts

    @model_validator(mode="after")
    def _one_structure(self) -> Self:
        structures = [name for name in ("json_schema", "regex", "choice") if name in self.structure]
        if len(structures) > 1:
            raise ValueError(f"{structures[0]} and {structures[1]} exclude each other")
        if structures and self.ignore_eos:
            raise ValueError(f"{structures[0]} and ignore_eos exclude each other: the structure says where the answer ends")
        return self

    @property
    def structure(self) -> dict[str, Any]:
        """What restricts the answer's form: at most one of json_schema, regex and choice, with its value."""
        asked = {"json_schema": self.json_schema, "regex": self.regex, "choice": self.choice or None}
        return {name: value for name, value in asked.items() if value is not None}


def _line(error: ValidationError, model: type[BaseModel]) -> str:
    """A validation error as a user wants to read it."""
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
