"""`MedusaLM`: what a service embeds. Text or messages in, text out, decoded several tokens a step."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from medusa_runtime.backends import open_backend
from medusa_runtime.engine import DecodingEngine, DecodingStats, FinishReason, SequenceStep
from medusa_runtime.errors import BundleError
from medusa_runtime.manifest import Manifest
from medusa_runtime.text import Prompt, TextCodec, TextStream
from medusa_runtime.tree import CandidateTree

DEFAULT_NEW_TOKENS = 256


@dataclass(frozen=True)
class GenerationChunk:
    """What one step added to the answer."""

    text: str  # may be empty while a character is incomplete
    token_ids: list[int]
    num_accepted: int  # drafts accepted in this step
    finish_reason: FinishReason | None = None


@dataclass(frozen=True)
class GenerationResult:
    """A whole answer."""

    text: str
    token_ids: list[int]  # the end-of-sequence token included, where the answer ended by one
    finish_reason: FinishReason
    stats: DecodingStats


class MedusaLM:
    """A bundle, loaded and ready to answer.

    Use `from_bundle`. One object answers one request (or one batch) at a time.
    """

    def __init__(self, engine: DecodingEngine, codec: TextCodec) -> None:
        self.engine = engine
        self.codec = codec

    @classmethod
    def from_bundle(
        cls,
        path: str | Path,
        backend: str = "auto",
        *,
        tree: CandidateTree | None = None,
        num_threads: int = 0,
        verify_files: bool = True,
        allow_failed: bool = False,
    ) -> MedusaLM:
        """Load a bundle.

        Args:
            path: the bundle's directory.
            backend: one of `medusa_runtime.BACKENDS`.
            tree: the candidate tree; none for the one the bundle names.
            num_threads: for a CPU backend; 0 for one a core.
            verify_files: compare every file with the manifest's digest first (about a second a gigabyte).
            allow_failed: load even a bundle whose validation failed.

        Raises:
            BundleError: it is no bundle, it does not match its manifest, or its validation failed.
            BackendError, MissingExtraError: the backend cannot run it here.
            TreeError: the tree does not fit the bundle's heads.
        """
        manifest = Manifest.load(path)
        if manifest.validation.status == "failed" and not allow_failed:
            raise BundleError(
                f"{path} failed its validation ({manifest.validation.report}); export it again, "
                "or allow it on purpose (allow_failed=True, --allow-failed)"
            )
        if verify_files:
            manifest.require_intact(path)
        runner = open_backend(path, manifest, backend, num_threads=num_threads)
        return cls(DecodingEngine(runner, tree), TextCodec(path))

    def generate(
        self,
        prompt: Prompt,
        max_new_tokens: int | None = None,
        *,
        medusa: bool = True,
        tree: CandidateTree | None = None,
        raw: bool = False,
        ignore_eos: bool = False,
    ) -> GenerationResult:
        """Answer a prompt. Arguments and errors as for `stream`."""
        stats = DecodingStats()
        chunks = list(
            self.stream(prompt, max_new_tokens, medusa=medusa, tree=tree, raw=raw, ignore_eos=ignore_eos, stats=stats)
        )
        finish_reason = chunks[-1].finish_reason
        assert finish_reason is not None  # the last chunk of a stream always says why it is the last
        return GenerationResult(
            text="".join(chunk.text for chunk in chunks),
            token_ids=[token for chunk in chunks for token in chunk.token_ids],
            finish_reason=finish_reason,
            stats=stats,
        )

    def generate_batch(
        self,
        prompts: Sequence[Prompt],
        max_new_tokens: int | None = None,
        *,
        medusa: bool = True,
        tree: CandidateTree | None = None,
        raw: bool = False,
        ignore_eos: bool = False,
    ) -> list[GenerationResult]:
        """Answer several prompts side by side, one forward pass a step for all of them.

        Arguments and errors as for `stream`. The statistics are the batch's, and the same in each result.
        """
        stats = DecodingStats()
        encoded = [self.codec.encode(prompt, raw=raw) for prompt in prompts]
        steps = self._decode(encoded, max_new_tokens, medusa=medusa, tree=tree, ignore_eos=ignore_eos, stats=stats)
        token_ids: list[list[int]] = [[] for _ in prompts]
        texts, streams = [""] * len(prompts), [TextStream(self.codec) for _ in prompts]
        reasons: list[FinishReason] = ["length"] * len(prompts)
        for step in itertools.chain.from_iterable(steps):
            token_ids[step.sequence] += step.token_ids
            texts[step.sequence] += streams[step.sequence].push(step.token_ids)
            if step.finish_reason is not None:
                texts[step.sequence] += streams[step.sequence].finish()
                reasons[step.sequence] = step.finish_reason
        return [GenerationResult(text, ids, reason, stats) for text, ids, reason in zip(texts, token_ids, reasons, strict=True)]

    def stream(
        self,
        prompt: Prompt,
        max_new_tokens: int | None = None,
        *,
        medusa: bool = True,
        tree: CandidateTree | None = None,
        raw: bool = False,
        ignore_eos: bool = False,
        stats: DecodingStats | None = None,
    ) -> Iterator[GenerationChunk]:
        """Answer a prompt, one chunk a step.

        Args:
            prompt: messages, or one user message as text.
            max_new_tokens: at most so many tokens; none for 256, or what still fits after the prompt.
            medusa: False for plain autoregressive decoding; the tokens are the same.
            tree: a candidate tree for this request.
            raw: take text as it is, without the chat template.
            ignore_eos: go on to max_new_tokens.
            stats: an object to count into.

        Raises:
            OptionError, CapacityError, TreeError: at the call, before any work.
            StaleStreamError: on reading on after a later request has begun to decode.
        """
        prompt_ids = self.codec.encode(prompt, raw=raw)
        steps = self._decode([prompt_ids], max_new_tokens, medusa=medusa, tree=tree, ignore_eos=ignore_eos, stats=stats)

        def chunks() -> Iterator[GenerationChunk]:
            stream = TextStream(self.codec)
            for [step] in steps:
                text = stream.push(step.token_ids)
                if step.finish_reason is not None:
                    text += stream.finish()
                yield GenerationChunk(text, step.token_ids, step.num_accepted, step.finish_reason)

        return chunks()

    def _decode(
        self,
        prompts: list[list[int]],
        max_new_tokens: int | None,
        *,
        medusa: bool,
        tree: CandidateTree | None,
        ignore_eos: bool,
        stats: DecodingStats | None,
    ) -> Iterator[list[SequenceStep]]:
        if max_new_tokens is None:
            room = self.engine.backend.manifest.limits.max_seq_len - max(map(len, prompts), default=0)
            max_new_tokens = max(1, min(DEFAULT_NEW_TOKENS, room))
        eos_token_ids = () if ignore_eos else None
        return self.engine.generate(prompts, max_new_tokens, medusa=medusa, tree=tree, eos_token_ids=eos_token_ids, stats=stats)
