"""Structured output: the tokens that may come next by a JSON schema, a regular expression, a list of choices or a grammar.

The grammars are llguidance's. It is imported here alone, and only when a request asks for a structure.
"""

from __future__ import annotations

import json
import re
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from threading import Lock
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from medusa_runtime.errors import MissingExtraError, OptionError, RequestError, first_line
from medusa_runtime.text.codec import TextCodec
from medusa_runtime.text.stack import with_stack
from medusa_runtime.text.tokenising import encoded

if TYPE_CHECKING:
    import llguidance

# As json.dumps writes it. Free white space would let a model that is unsure write nothing else.
JSON_FORM: Any = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
MAX_COMPILED = 64  # structures that are kept compiled
# Bytes of a structure. Some take a time to compile that grows with the square of their length.
MAX_BYTES = {"json_schema": 1 << 18, "regex": 1 << 16, "choice": 1 << 18, "grammar": 1 << 16}
# llguidance compiles rules that refer to rules by recursion, and a stack that overflows ends the process. A rule has at least
# 20 bytes, and takes 20 kB of stack at most.
STACK_BYTES, STACK_BYTES_A_BYTE = 1 << 24, 1 << 10
# Keywords of JSON Schema that restrict nothing. With one of the others, a schema means something.
ANNOTATIONS = {
    *("$schema", "$id", "$anchor", "$comment", "$defs", "$vocabulary", "definitions", "title", "description"),
    *("default", "examples", "example", "deprecated", "readOnly", "writeOnly", "nullable", "x-guidance"),
}
RESTRICTIONS = {
    *("type", "enum", "const", "$ref", "$dynamicRef", "allOf", "anyOf", "oneOf", "not", "if", "then", "else", "format"),
    *("properties", "patternProperties", "additionalProperties", "unevaluatedProperties", "propertyNames", "required"),
    *("minProperties", "maxProperties", "dependentRequired", "dependentSchemas", "dependencies"),
    *("items", "prefixItems", "additionalItems", "unevaluatedItems", "contains", "minContains", "maxContains"),
    *("minItems", "maxItems", "uniqueItems", "minLength", "maxLength", "pattern", "contentEncoding", "contentMediaType"),
    *("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"),
}


class GrammarCompiler:
    """Makes guides for a tokenizer. Any thread may use it.

    Making it costs nothing. The first `compile` takes about a second, for the tokenizer; structures are compiled once, and the
    last `MAX_COMPILED` of them are kept.

    Args:
        codec: the bundle's.
        vocab_size: tokens that the model tells apart, those with a lower id. Others are never allowed.
        eos_token_ids: the tokens that end an answer. Those that the model does not know are left out.
    """

    def __init__(self, codec: TextCodec, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        self._codec = codec
        self._vocab_size = vocab_size
        self._eos_token_ids = [token for token in eos_token_ids if 0 <= token < vocab_size]
        self._making = Lock()
        self._tokenizer: llguidance.LLTokenizer | None = None
        self._using = Lock()
        self._compiled: OrderedDict[str, llguidance.LLMatcher] = OrderedDict()  # the one used last is at the end

    def compile(self, structure: Mapping[str, Any]) -> GrammarGuide:
        """A guide for one answer.

        Args:
            structure: as `GenerationOptions.structure`: one of json_schema, regex, choice and grammar, with its value.

        Raises:
            OptionError: the structure is malformed, or asks for something that cannot be guided.
            MissingExtraError: llguidance is not installed.
        """
        [(name, value)] = structure.items()
        try:
            _check_size(name, value)
            grammar = _grammar(name, value)
        except (ValueError, TypeError, RecursionError) as error:
            raise OptionError(f"{name} cannot be used: {first_line(error)}") from error
        return GrammarGuide(self._matcher(name, grammar), self._vocab_size)

    def _matcher(self, name: str, grammar: str) -> llguidance.LLMatcher:
        """A matcher at its beginning: a copy of the one that was compiled for an equal structure."""
        with self._using:
            found = self._compiled.get(grammar)
        if found is None:
            found = with_stack(STACK_BYTES + STACK_BYTES_A_BYTE * len(grammar), lambda: self._compile(name, grammar))
        with self._using:
            self._compiled[grammar] = found
            self._compiled.move_to_end(grammar)
            while len(self._compiled) > MAX_COMPILED:
                self._compiled.popitem(last=False)
            return found.deep_copy()

    def _compile(self, name: str, grammar: str) -> llguidance.LLMatcher:
        library = _llguidance()
        limits = library.LLParserLimits(verbose_errors=False)  # its errors would tell the answer so far
        found: llguidance.LLMatcher = library.LLMatcher(self._made_tokenizer(), grammar, log_level=0, limits=limits)
        if not found.is_error():
            found.compute_bitmask()  # copies then need not find out again what may come first
        if found.is_error():
            told = "no text follows it" if "NoExtension" in found.get_error() else " ".join(found.get_error().split())
            raise OptionError(f"{name} cannot be used: {told}")
        return found

    def _made_tokenizer(self) -> llguidance.LLTokenizer:
        with self._making:
            if self._tokenizer is None:
                self._tokenizer = self._make_tokenizer()
            return self._tokenizer

    def _make_tokenizer(self) -> llguidance.LLTokenizer:
        if not self._eos_token_ids:
            raise OptionError("this model has no end-of-sequence token, so that no structure could end")
        library = _llguidance()
        try:
            words = library.TokenizerWrapper(_Words(self._codec, self._vocab_size, self._eos_token_ids))
            made: llguidance.LLTokenizer = library.LLTokenizer(words, n_vocab=self._vocab_size, eos_token=self._eos_token_ids)
        except ValueError as error:
            raise OptionError(f"this model's tokenizer cannot be guided: {first_line(error)}") from error
        return made


class GrammarGuide:
    """The state of one answer's grammar; see `drafting.guide.Guide`. It stands after the answer's last decided token."""

    def __init__(self, matcher: llguidance.LLMatcher, vocab_size: int) -> None:
        self._matcher = matcher
        self._vocab_size = vocab_size

    def copy(self) -> GrammarGuide:
        """Another answer's state, at the same place."""
        return GrammarGuide(self._matcher.deep_copy(), self._vocab_size)

    def advance(self, token_ids: Sequence[int]) -> None:
        """See `Guide.advance`."""
        self._matcher.consume_tokens(list(token_ids))
        self._check()

    def allowed(self, path: Sequence[int]) -> npt.NDArray[np.bool_]:
        """See `Guide.allowed`. [V]"""
        self.advance(path)
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        self._check()
        self._matcher.rollback(len(path))
        return np.unpackbits(bits, count=self._vocab_size, bitorder="little").view(np.bool_)

    def lets_pass(self, path: Sequence[int]) -> bool:
        """See `Guide.lets_pass`."""
        return bool(self._matcher.validate_tokens(list(path)) == len(path))

    def forced(self) -> list[int]:
        """See `Guide.forced`."""
        return list(self._matcher.compute_ff_tokens())

    def _check(self) -> None:
        if self._matcher.is_error():
            raise RequestError(f"the structure cannot be followed: {first_line(ValueError(self._matcher.get_error()))}")


def _llguidance() -> Any:
    try:
        import llguidance  # noqa: PLC0415 - an extra
    except ImportError as error:
        raise MissingExtraError("llguidance", "structured") from error
    return llguidance


def _check_size(name: str, value: Any) -> None:
    text = json.dumps(value) if name == "json_schema" else "|".join(value) if name == "choice" else str(value)
    if (size := len(text.encode())) > MAX_BYTES[name]:
        raise ValueError(f"it has {size} bytes; it must have at most {MAX_BYTES[name]}")


def _grammar(name: str, value: Any) -> str:
    """A structure in llguidance's form."""
    library = _llguidance()
    match name:
        case "json_schema":
            _check_schema(value)
            return str(library.LLMatcher.grammar_from_json_schema(json.dumps(dict(value)), overrides=JSON_FORM))
        case "regex":
            if (len(value) - len(value.rstrip("\\"))) % 2:  # llguidance would leave it out
                raise ValueError("it ends with a backslash that escapes nothing")
            return str(library.LLMatcher.grammar_from_regex(value))
        case "choice":
            return str(library.LLMatcher.grammar_from_regex("|".join(re.escape(text) for text in value)))
        case "grammar":
            return str(library.grammar_from("grammar", value))
    raise ValueError("there is no such structure; json_schema, regex, choice and grammar are")


def _check_schema(schema: Mapping[str, Any]) -> None:
    """Refuse a schema that restricts nothing though something was meant: unknown keywords say nothing to anybody."""
    stray = [str(key) for key in schema if key not in ANNOTATIONS | RESTRICTIONS]
    if stray and RESTRICTIONS.isdisjoint(schema):
        raise ValueError(f"it restricts nothing: {', '.join(stray)} are no keywords of JSON Schema; {{}} allows any JSON")


class _Words:
    """A tokenizer for llguidance. It reads text as text, also if it is spelled like a special token."""

    def __init__(self, codec: TextCodec, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        settings = codec.tokenizer.to_str()
        num_tokens = max(codec.tokenizer.get_vocab().values(), default=0) + 1
        base = _llguidance().LLTokenizer(settings, n_vocab=max(vocab_size, num_tokens), eos_token=list(eos_token_ids))
        self.eos_token_id, self.bos_token_id = eos_token_ids[0], None
        self.tokens = [base.decode_bytes([token]) for token in range(vocab_size)]
        self.special_token_ids = [token for token in range(vocab_size) if base.is_special_token(token)]
        self._plain = Tokenizer.from_str(settings)
        self._plain.encode_special_tokens = True

    def __call__(self, text: str | bytes) -> list[int]:
        text = text.decode() if isinstance(text, bytes) else text
        ids = list(encoded(self._plain, text, add_special_tokens=False).ids)
        return ids if max(ids, default=0) < len(self.tokens) else self._known_ids(text.encode())

    def _known_ids(self, data: bytes) -> list[int]:
        """Token ids that the model knows, if the tokenizer gives others: the longest that fits, again and again."""
        special = set(self.special_token_ids)
        known = {token: token_id for token_id, token in enumerate(self.tokens) if token and token_id not in special}
        longest = max(map(len, known))
        ids: list[int] = []
        while data:
            token = next((data[:size] for size in range(longest, 0, -1) if data[:size] in known), None)
            if token is None:
                raise ValueError(f"no token that the model knows begins {data[:8]!r}")
            ids.append(known[token])
            data = data[len(token) :]
        return ids
