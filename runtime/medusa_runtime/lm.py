"""`MedusaLM`, which a service embeds: text in, text out, several tokens per step, many requests at once."""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self, cast

import numpy as np

from medusa_runtime.bundle.cpu import Spin
from medusa_runtime.bundle.manifest import Manifest
from medusa_runtime.decoding.engine import DecodingEngine
from medusa_runtime.drafting.guide import Guide
from medusa_runtime.drafting.tree import CandidateTree, DynamicTree
from medusa_runtime.errors import ContextLengthError, OptionError
from medusa_runtime.opening import CostsChoice, open_engine
from medusa_runtime.options import GenerationOptions, with_defaults
from medusa_runtime.service.handle import Handle, Request
from medusa_runtime.service.results import GenerationChunk, GenerationResult, Health, ServiceStats
from medusa_runtime.service.worker import Worker
from medusa_runtime.text.codec import Prompt, TextCodec
from medusa_runtime.text.grammar import GrammarCompiler
from medusa_runtime.text.token_ids import open_codec

AnyPrompt = Prompt | Sequence[int]  # text, messages, or token ids


class MedusaLM:
    """A bundle, loaded and ready to answer: from any number of threads and tasks, with continuous batching.

    Use `from_bundle`. Requests that are under way at once share the steps of one engine; each gets the tokens it would get
    alone. Close it, or use it in a `with` or `async with`. It also closes once neither it nor a handle of it is used any more.

    Args:
        engine: must be used by this object alone.
        codec: the bundle's tokenizer and chat templates.
        max_queue: answers that may wait for a slot; further requests are refused at once.
    """

    def __init__(self, engine: DecodingEngine, codec: TextCodec, *, max_queue: int = 128) -> None:
        _check_queue(max_queue)
        self.engine = engine
        self.codec = codec
        self._worker = Worker(engine, codec, max_queue)
        self._closing = threading.Lock()
        model = engine.backend.manifest.model
        self._grammars = GrammarCompiler(codec, model.vocab_size, model.eos_token_ids)
        # stop() does not wait: a finalizer may run while this thread holds any lock, so it must not join
        weakref.finalize(self, self._worker.stop).atexit = False

    @classmethod
    def from_bundle(
        cls,
        path: str | Path,
        backend: str = "auto",
        *,
        tree: CandidateTree | DynamicTree | None = None,
        max_batch_size: int | None = None,
        max_queue: int = 128,
        costs: CostsChoice = "auto",
        reuse_prefixes: bool = True,
        prompt_lookup: bool | None = None,
        max_gap_seconds: float | None = None,
        max_cache_bytes: int | None = None,
        device: str = "auto",
        num_threads: int = 0,
        spin: Spin = "auto",
        cuda_graphs: bool | None = None,
        verify_files: bool = True,
        allow_failed: bool = False,
        allow_engine_code: bool = False,
    ) -> MedusaLM:
        """Load a bundle.

        Args:
            path: the bundle's directory.
            backend: one of `medusa_runtime.BACKENDS`; auto takes the best one, see `medusa_runtime.choose_backend`.
            tree: which continuations are verified. None for the tree that was tuned for this device; without a tuning, for a
                tree that is made again for each step and is as large as the bundle's own.
            max_batch_size: answers decoded at a time; None for 8, or as many as the bundle takes.
            max_queue: answers that may wait for a slot.
            costs: the costs of steps on this machine. With them, trees shrink if they do not pay. "learn" learns the costs
                from the steps that are made anyway. "measure" measures them now, which takes some seconds. A table is one
                from an earlier measurement. "auto" takes the table that `medusa-export tune` left in the bundle for this
                device; without one, it learns. Tables are corrected by the steps that are made. With None, trees always have
                their full size. Costs change no answer, except under typical acceptance, which depends on the
                tree.
            reuse_prefixes: start a prompt from the cache entries of an earlier one that begins alike.
            prompt_lookup: for requests that do not say: also draft the tokens that followed the same tokens earlier. None
                for the choice that was tuned for this device if costs is "auto", else for False.
            max_gap_seconds: the longest time that reading prompts may take between two steps of answers that are decoded.
                A small value keeps streams steady; a large one gives the first token of new requests sooner. None for six
                times as long as a step of decoding takes.
            max_cache_bytes: the largest KV cache. If the answers under way need more, the youngest wait until others have
                ended. None for all the memory there is: on a CPU, the machine's or its container's.
            device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
            num_threads: for a CPU backend; 0 for one per core.
            spin: for a CPU backend, how threads wait for work within a step: "auto", "on" or "off"; see
                `medusa_runtime.open_backend`.
            cuda_graphs: on a GPU, whether steps are captured and replayed; see `medusa_runtime.open_backend`.
            verify_files: compare every file with the manifest's digest first (about a second per gigabyte).
            allow_failed: load even a bundle whose validation failed.
            allow_engine_code: run the code that version-compatible engines bring, in this process.

        Raises:
            BundleError: the path holds no bundle, or one that does not match its manifest or failed its validation.
            BackendError, MissingExtraError: the backend cannot run the bundle on this machine.
            TreeError: the tree does not fit the bundle's heads.
            OptionError, CapacityError: another argument is out of range.
        """
        _check_queue(max_queue)
        engine = open_engine(
            path,
            backend,
            tree=tree,
            max_batch_size=max_batch_size,
            costs=costs,
            reuse_prefixes=reuse_prefixes,
            prompt_lookup=prompt_lookup,
            max_gap_seconds=max_gap_seconds,
            max_cache_bytes=max_cache_bytes,
            device=device,
            num_threads=num_threads,
            spin=spin,
            cuda_graphs=cuda_graphs,
            verify_files=verify_files,
            allow_failed=allow_failed,
            allow_engine_code=allow_engine_code,
        )
        return cls(engine, open_codec(path, engine.backend.manifest), max_queue=max_queue)

    @property
    def manifest(self) -> Manifest:
        """The bundle's facts and limits."""
        return self.engine.backend.manifest

    @property
    def max_under_way(self) -> int:
        """The most answers that there is room for at a time: those that are decoded, and those that wait."""
        return self._worker.most

    def submit(self, prompt: AnyPrompt, options: GenerationOptions | None = None, /, **fields: Any) -> Handle:
        """Queue a request and return at once.

        Args:
            prompt: messages, one user message as text, or token ids, which are taken as they are.
            options: how the prompt is answered.
            **fields: fields of `GenerationOptions`, instead of those in `options`.

        Returns:
            The handle of the request. It gives the answer as it comes, or whole, and cancels the request; a handle that is
            dropped cancels it too.

        Raises:
            OptionError, CapacityError, TreeError: the request can never be answered. This is found before any work.
            QueueFullError: there are too many requests.
            ClosedError: this object is closed.
            MissingExtraError: a structure is asked for, and the package for it is not installed.
        """
        return self._submit(self._request(prompt, GenerationOptions.of(options, **fields)))

    async def asubmit(self, prompt: AnyPrompt, options: GenerationOptions | None = None, /, **fields: Any) -> Handle:
        """`submit` for asyncio: another thread tokenises the prompt and compiles a structure, so the event loop goes on."""
        import asyncio  # noqa: PLC0415 - only callers of asyncio need it

        checked = GenerationOptions.of(options, **fields)
        return self._submit(await asyncio.to_thread(self._request, prompt, checked))

    def generate(self, prompt: AnyPrompt, options: GenerationOptions | None = None, /, **fields: Any) -> GenerationResult:
        """Answer a prompt. Arguments and errors as for `submit`, and those of `Handle.result`."""
        return self.submit(prompt, options, **fields).result()

    def generate_batch(
        self, prompts: Sequence[AnyPrompt], options: GenerationOptions | None = None, /, **fields: Any
    ) -> list[GenerationResult]:
        """Answer any number of prompts, side by side as far as there is room. Arguments and errors as for `generate`.

        All prompts are checked before the first is begun. While the queue is full, the next one waits.
        """
        if not isinstance(prompts, Sequence) or not prompts:
            raise OptionError("there is no prompt; generate_batch takes a list of prompts")
        if isinstance(prompts, str) or isinstance(prompts[0], int | np.integer | Mapping):
            raise OptionError("prompts is a single prompt; generate_batch takes a list of prompts, and generate takes one")
        checked = GenerationOptions.of(options, **fields)
        requests = [self._request(prompt, checked) for prompt in prompts]
        handles = []
        for request in requests:
            request.since = time.perf_counter()
            handles.append(self._submit(request, waits=True))
        return [handle.result() for handle in handles]

    def stream(self, prompt: AnyPrompt, options: GenerationOptions | None = None, /, **fields: Any) -> Handle:
        """Answer a prompt, one chunk a step: iterate over what is returned. Arguments and errors as for `submit`."""
        return self.submit(prompt, options, **fields)

    async def agenerate(
        self, prompt: AnyPrompt, options: GenerationOptions | None = None, /, **fields: Any
    ) -> GenerationResult:
        """`generate` for asyncio. Cancelling the task cancels the request."""
        return await (await self.asubmit(prompt, options, **fields)).aresult()

    async def astream(
        self, prompt: AnyPrompt, options: GenerationOptions | None = None, /, **fields: Any
    ) -> AsyncIterator[GenerationChunk]:
        """`stream` for asyncio: iterate with `async for`. Leaving the loop cancels the request.

        Errors of `submit` come with the first chunk. `asubmit` gives the handle, which can be iterated over as well.
        """
        async with await self.asubmit(prompt, options, **fields) as handle:
            async for chunk in handle:
                yield chunk

    def warm_up(self, batch_sizes: Sequence[int] = (1,), max_new_tokens: int = 8) -> None:
        """Answer some meaningless prompts, so that devices compile and caches fill before the first request comes.

        They count in `stats`.

        Args:
            batch_sizes: how many answers are decoded side by side.
            max_new_tokens: tokens of each answer.

        Raises:
            OptionError: a batch size is not between 1 and the most answers that are decoded at a time.
        """
        most = self.engine.max_batch_size
        if not isinstance(batch_sizes, Sequence):
            raise OptionError(f"batch_sizes is {batch_sizes!r}; it must be a list of whole numbers from 1 to {most}")
        for size in batch_sizes:
            if type(size) is not int or not 1 <= size <= most:
                raise OptionError(f"batch_sizes holds {size!r}; it must be a whole number from 1 to {most}")
        options = GenerationOptions(max_new_tokens=max_new_tokens, ignore_eos=True)
        for size in batch_sizes:
            self.generate_batch([[number % self.manifest.model.vocab_size] * 16 for number in range(size)], options)

    def stats(self) -> ServiceStats:
        """The answers under way now, and counts since this object was made."""
        return self._worker.stats()

    def health(self) -> Health:
        """Whether requests are taken; if not, why not and since when."""
        return self._worker.health()

    def close(self) -> None:
        """End all requests under way with `ClosedError`, refuse new ones, and free the memory of the model.

        In a child of a fork, nothing happens: threads, graphs and cache are the parent's.
        """
        if not self._worker.is_of_this_process:
            return
        self._worker.stop()
        with self._closing:
            self._worker.join()
            self.engine.backend.save()
            self.engine.backend.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        import asyncio  # noqa: PLC0415 - only callers of asyncio need it

        await asyncio.to_thread(self.close)

    def _submit(self, request: Request, *, waits: bool = False) -> Handle:
        handle = self._worker.submit(request, waits=waits)
        handle.owner = self
        return handle

    def _request(self, prompt: AnyPrompt, options: GenerationOptions) -> Request:
        """Check a request, and turn its text into tokens and its structure into a grammar."""
        since = time.perf_counter()
        options = with_defaults(options, self.manifest.generation)
        stop, special_stops = self._split_stops(options.stop)
        if special_stops:
            options = options.model_copy(update={"stop_token_ids": (*options.stop_token_ids, *special_stops)})
        prompt_ids, most = self._prompt_ids(prompt, options), options.max_prompt_tokens
        if most is not None and len(prompt_ids) > most:
            raise ContextLengthError(f"the prompt has {len(prompt_ids)} tokens; there is room for {most}: shorten it")
        decoding = self.engine.check(prompt_ids, options)
        return Request(decoding, self._guides(options), stop, special_stops, since, options.skip_special_tokens)

    def _prompt_ids(self, prompt: AnyPrompt, options: GenerationOptions) -> list[int]:
        if isinstance(prompt, Sequence) and prompt and all(map(_is_token_id, prompt)):
            return [int(token) for token in cast("Sequence[int]", prompt)]
        limit = self.manifest.limits.max_seq_len
        return self.codec.encode(
            cast("Prompt", prompt),
            raw=options.raw,
            template=options.chat_template,
            template_options=options.template_options or None,
            tools=options.tools or None,
            documents=options.documents or None,
            add_generation_prompt=None if options.begins_message else False,  # None: if there is a template
            continue_final_message=options.continue_final_message,
            plain_content=options.plain_content,
            max_tokens=min(options.max_prompt_tokens or limit, limit),
        )

    def _split_stops(self, stop: Sequence[str]) -> tuple[list[str], dict[int, str]]:
        """Stop texts that can come out of decoding, and those that are special tokens, which do not."""
        special = {token: text for text in stop if (token := self.codec.special_token_id(text)) is not None}
        return [text for text in stop if text not in special.values()], special

    def _guides(self, options: GenerationOptions) -> list[Guide | None]:
        """The guide of each of a request's answers; None if nothing restricts them."""
        if not options.structure:
            return [None] * options.n
        guide = self._grammars.compile(options.structure)
        return [guide, *(guide.copy() for _ in range(options.n - 1))]


def _is_token_id(part: object) -> bool:
    return isinstance(part, int | np.integer) and not isinstance(part, bool)


def _check_queue(max_queue: int) -> None:
    if type(max_queue) is not int or max_queue < 0:
        raise OptionError(f"max_queue is {max_queue!r}; it must be a whole number of at least 0")
