"""`MedusaLM`: what a service embeds. Text or messages in, text out, decoded several tokens a step, many requests at once."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Self

from medusa_runtime.backends.choosing import choose_backend, open_backend
from medusa_runtime.bundle.cpu import device_key
from medusa_runtime.bundle.manifest import Manifest
from medusa_runtime.decoding.engine import DEFAULT_BATCH_SIZE, LOOKUP_NODES, DecodingEngine, check_batch_size
from medusa_runtime.drafting.costs import LearnedCosts, StepCosts, fitting_nodes
from medusa_runtime.drafting.ngrams import NGrams
from medusa_runtime.drafting.tree import CandidateTree, DynamicTree
from medusa_runtime.drafting.tuning import DeviceTuning, tuned
from medusa_runtime.errors import BundleError, OptionError, QueueFullError
from medusa_runtime.options import GenerationOptions
from medusa_runtime.sampling.shaping import Guide
from medusa_runtime.service.answer import Request
from medusa_runtime.service.handle import Handle
from medusa_runtime.service.results import GenerationResult, ServiceStats
from medusa_runtime.service.worker import Worker
from medusa_runtime.text.codec import Prompt, TextCodec
from medusa_runtime.text.grammar import GrammarCompiler


class MedusaLM:
    """A bundle, loaded and ready to answer: from any number of threads and tasks, with continuous batching.

    Use `from_bundle`. Requests that are under way at once share the steps of one engine; each gets the tokens it would get
    alone. Close it, or use it in a `with`; what is left open ends when neither it nor a handle of it is used any more.

    Args:
        engine: this object's alone.
        codec: the bundle's text.
        max_queue: answers that may wait for a slot; further requests are refused at once.
    """

    def __init__(self, engine: DecodingEngine, codec: TextCodec, *, max_queue: int = 128) -> None:
        if max_queue < 0:
            raise OptionError(f"max_queue is {max_queue}; it must be at least 0")
        self.engine = engine
        self.codec = codec
        self._worker = Worker(engine, codec, max_queue)
        model = engine.backend.manifest.model
        self._grammars = GrammarCompiler(codec, model.vocab_size, model.eos_token_ids)
        weakref.finalize(self, self._worker.stop).atexit = False  # which does not wait: a collector may run it under any lock

    @classmethod
    def from_bundle(
        cls,
        path: str | Path,
        backend: str = "auto",
        *,
        tree: CandidateTree | DynamicTree | None = None,
        max_batch_size: int | None = None,
        max_queue: int = 128,
        costs: StepCosts | Literal["auto", "learn", "measure"] | None = "auto",
        reuse_prefixes: bool = True,
        prompt_lookup: bool | None = None,
        device: str = "auto",
        num_threads: int = 0,
        cuda_graphs: bool | None = None,
        verify_files: bool = True,
        allow_failed: bool = False,
    ) -> MedusaLM:
        """Load a bundle.

        Args:
            path: the bundle's directory.
            backend: one of `medusa_runtime.BACKENDS`; auto takes the best there is here, see `medusa_runtime.choose_backend`.
            tree: which continuations are verified; none for the one that was tuned for this device, or else for one as large
                as the bundle's own, made anew at each step.
            max_batch_size: answers decoded at a time; none for 8, or as many as the bundle takes.
            max_queue: answers that may wait for a slot.
            costs: what steps cost here, so that trees shrink where they do not pay: "learn" it from the steps that are made
                anyway, "measure" it now, which takes some seconds, or a table from an earlier measurement. "auto" takes the
                table that `medusa-export tune` left in the bundle for this device, or else learns. None for trees that always
                have their full size. It changes no answer, but under typical acceptance, where the tree does.
            reuse_prefixes: start a prompt from what an earlier one that begins alike left in the cache.
            prompt_lookup: also draft what came after the same tokens before, where a request does not say. None for what was
                tuned for this device, where costs is "auto", or else for no.
            device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
            num_threads: for a CPU backend; 0 for one a core.
            cuda_graphs: on a GPU, whether steps are captured and replayed; see `medusa_runtime.open_backend`.
            verify_files: compare every file with the manifest's digest first (about a second a gigabyte).
            allow_failed: load even a bundle whose validation failed.

        Raises:
            BundleError: it is no bundle, it does not match its manifest, or its validation failed.
            BackendError, MissingExtraError: the backend cannot run it here.
            TreeError: the tree does not fit the bundle's heads.
            OptionError, CapacityError: max_batch_size or max_queue is out of range.
        """
        manifest = Manifest.load(path)
        if manifest.validation.status == "failed" and not allow_failed:
            raise BundleError(
                f"{path} failed its validation ({manifest.validation.report}); export it again, "
                "or allow it on purpose (allow_failed=True, --allow-failed)"
            )
        if verify_files:
            manifest.require_intact(path)
        place = choose_backend(manifest, backend, device)
        runner = open_backend(
            path, manifest, place.backend, device=place.device, num_threads=num_threads, cuda_graphs=cuda_graphs
        )
        if max_batch_size is None:
            max_batch_size = min(DEFAULT_BATCH_SIZE, manifest.limits.max_batch_size or DEFAULT_BATCH_SIZE)
        check_batch_size(manifest, max_batch_size)
        if costs == "auto":
            key = device_key(place.backend, num_threads=num_threads, processor=place.processor)
            tree, costs, prompt_lookup = _tuned_choice(
                tuned(path, manifest, key), manifest, max_batch_size, tree, prompt_lookup
            )
        tree = tree or DynamicTree(len(manifest.tree["parents"]))
        if costs == "measure":
            costs = StepCosts.measure(runner, max_batch_size=max_batch_size, max_nodes=tree.num_nodes)
        known = LearnedCosts() if costs == "learn" else costs
        engine = DecodingEngine(
            runner,
            tree,
            max_batch_size=max_batch_size,
            costs=known,
            reuse_prefixes=reuse_prefixes,
            prompt_lookup=bool(prompt_lookup),
            ngrams=NGrams.of_bundle(path, manifest),
        )
        return cls(engine, TextCodec(path), max_queue=max_queue)

    @property
    def manifest(self) -> Manifest:
        """The bundle's facts and limits."""
        return self.engine.backend.manifest

    def submit(self, prompt: Prompt, options: GenerationOptions | None = None, /, **fields: Any) -> Handle:
        """Queue a request and return at once.

        Args:
            prompt: messages, or one user message as text.
            options: how it is answered.
            **fields: fields of `GenerationOptions`, instead of those in `options`.

        Returns:
            What gives the answer as it comes, or whole, and cancels it. A handle that is dropped cancels its request.

        Raises:
            OptionError, CapacityError, TreeError: the request can never be answered; told before any work.
            QueueFullError: there are too many requests.
            ClosedError: this object is closed.
            MissingExtraError: a structure is asked for, and the package for it is not installed.
        """
        [request] = self._requests([prompt], options, fields)
        handle = self._worker.submit(request)
        handle.owner = self
        return handle

    def generate(self, prompt: Prompt, options: GenerationOptions | None = None, /, **fields: Any) -> GenerationResult:
        """Answer a prompt. Arguments and errors as for `submit`, and those of `Handle.result`."""
        return self.submit(prompt, options, **fields).result()

    def generate_batch(
        self, prompts: Sequence[Prompt], options: GenerationOptions | None = None, /, **fields: Any
    ) -> list[GenerationResult]:
        """Answer any number of prompts, side by side as far as there is room. Arguments and errors as for `generate`.

        All prompts are checked before the first is begun. Where the queue is full, the next one waits for an earlier one.
        """
        if not prompts:
            raise OptionError("there is no prompt")
        handles: list[Handle] = []
        num_done = 0
        for request in self._requests(prompts, options, fields):
            while True:
                try:
                    handles.append(self._worker.submit(request))
                    break
                except QueueFullError:
                    if num_done == len(handles):  # others fill it
                        raise
                    handles[num_done].result()
                    num_done += 1
        return [handle.result() for handle in handles]

    def stream(self, prompt: Prompt, options: GenerationOptions | None = None, /, **fields: Any) -> Handle:
        """Answer a prompt, one chunk a step: iterate over what is returned. Arguments and errors as for `submit`."""
        return self.submit(prompt, options, **fields)

    async def agenerate(self, prompt: Prompt, options: GenerationOptions | None = None, /, **fields: Any) -> GenerationResult:
        """`generate` for asyncio. Cancelling the task cancels the request."""
        return await self.submit(prompt, options, **fields).aresult()

    def astream(self, prompt: Prompt, options: GenerationOptions | None = None, /, **fields: Any) -> Handle:
        """`stream` for asyncio: iterate with `async for`. Leaving the loop cancels the request."""
        return self.submit(prompt, options, **fields)

    def stats(self) -> ServiceStats:
        """What is under way now, and what was done since this object was made."""
        return self._worker.stats()

    def close(self) -> None:
        """End all requests under way with `ClosedError`, and refuse new ones."""
        self._worker.stop()
        self._worker.join()
        self.engine.backend.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _requests(self, prompts: Sequence[Prompt], options: GenerationOptions | None, fields: dict[str, Any]) -> list[Request]:
        options = GenerationOptions.of(options, **fields)
        requests = []
        for prompt in prompts:
            prompt_ids = self.codec.encode(prompt, raw=options.raw)
            self.engine.check_request(prompt_ids, options)
            requests.append(Request(prompt_ids, options, self._guides(options)))
        return requests

    def _guides(self, options: GenerationOptions) -> list[Guide | None]:
        """What restricts each of a request's answers."""
        if not options.structure:
            return [None] * options.n
        guide = self._grammars.compile(options.structure, min_new_tokens=options.min_new_tokens)
        return [guide, *(guide.copy() for _ in range(options.n - 1))]


def _tuned_choice(
    found: DeviceTuning | None,
    manifest: Manifest,
    max_batch_size: int,
    tree: CandidateTree | DynamicTree | None,
    prompt_lookup: bool | None,
) -> tuple[CandidateTree | DynamicTree | None, StepCosts | Literal["learn"] | None, bool | None]:
    """Tree, costs and prompt lookup from a device's tuning, where there is one; what the caller says comes first."""
    if found is None:
        return tree, "learn", prompt_lookup
    prompt_lookup = found.prompt_lookup if prompt_lookup is None else prompt_lookup
    if tree is not None:
        return tree, found.costs, prompt_lookup
    lookup_nodes = fitting_nodes(manifest.limits, LOOKUP_NODES) if prompt_lookup else 0
    return *found.choice(max_batch_size, lookup_nodes), prompt_lookup
