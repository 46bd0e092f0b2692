"""`medusa-export tune`: measures, searches, checks, and writes the result to the bundle."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from medusa_export.bundle.writable import require_writable
from medusa_export.measure.prompt_files import PROMPTS, read_prompts
from medusa_export.measure.tune.check import TOLERANCE, Checker, Prompts
from medusa_export.measure.tune.decode import in_turn, lookup_check, with_host_seconds
from medusa_export.measure.tune.keep import checks_off, keep
from medusa_export.measure.tune.others import OtherPrograms
from medusa_export.measure.tune.record import record
from medusa_export.measure.tune.search import EvaluatedAcceptance, Place, RecordedAcceptance, best_kind
from medusa_export.placement import place
from medusa_export.progress import count_stage, note, stage, step_stage, told
from medusa_export.provenance import provenance
from medusa_heads.errors import CheckpointError
from medusa_heads.replay import Evaluation
from medusa_runtime.backends.base import Backend
from medusa_runtime.backends.choosing import Placement, open_backend
from medusa_runtime.bundle.cpu import Spin, cpu_name, device_key, num_cores
from medusa_runtime.bundle.manifest import TUNING_NAME, Limits, Manifest
from medusa_runtime.decoding.engine import LOOKUP_NODES, DecodingEngine
from medusa_runtime.drafting.corrected import CorrectedCosts
from medusa_runtime.drafting.costs import StepCosts, fitting_capacities, fitting_nodes
from medusa_runtime.drafting.measuring import measure_grid
from medusa_runtime.drafting.ngrams import NGrams
from medusa_runtime.drafting.rounds import Rounds
from medusa_runtime.drafting.tuning import DeviceTuning, LookupCheck, Measurement, TunedBatch
from medusa_runtime.errors import BundleError, CapacityError, OptionError
from medusa_runtime.options import DecodingOptions
from medusa_runtime.text.codec import Prompt
from medusa_runtime.text.token_ids import open_codec

BATCH_SIZES, MAX_NODES, LENGTHS = (1, 2, 4, 8, 16), 64, (128, 512)
LOOKED_UP = 8  # groups of prompts that are decoded with and without prompt lookup
LOOKUP_TOKENS = 128  # new tokens of each at least: lookup gains most late in an answer
LOOKUP_COSTS = 0.97  # below this ratio of speeds, prompt lookup is off; two equal engines can differ by this much
RECORDED_TOGETHER = 8  # answers that are recorded in one batch
ATTEMPTS = 2  # how often costs are measured, if checks are off
SPARE = 16  # cache entries for drafts, in addition to prompt and answer
FREE = 0.1  # largest part of the cores that other programs use on a quiet machine
EVALUATION_NAME = "evaluation.json"  # in the heads' directory


@dataclass(frozen=True)
class TuneOptions:
    """Options of `medusa-export tune`; the command's help describes each."""

    bundle: Path
    heads: Path | None = None
    evaluation: Path | None = None
    prompts: Path | None = None
    batch_sizes: tuple[int, ...] = ()
    default_batch_sizes: tuple[int, ...] = BATCH_SIZES  # used if none are given, up to the bundle's largest
    max_nodes: int = MAX_NODES
    lengths: tuple[int, ...] = ()
    max_new_tokens: int = 64
    rounds: int = 5
    max_noise: float = 0.05
    max_seconds: float = 60.0
    backend: str = "auto"
    device: str = "auto"
    threads: int = 0
    spin: Spin = "auto"
    cuda_graphs: bool | None = None
    allow_engine_code: bool = False


def tune(options: TuneOptions) -> tuple[str, DeviceTuning]:
    """Measure a bundle on this device, find its best trees, check them, and write `tuning.json`. This takes a minute or two.

    If a check is off, the costs are measured once more. If one is off again, nothing is written: an earlier tuning stays.

    Returns the device's name in `tuning.json`, and its tuning.

    Raises:
        OptionError: an option cannot be used, or the prompts cannot be read.
        BundleError, BackendError: the bundle cannot be run on this machine.
        CapacityError: a batch is larger than the bundle's limit or than memory allows.
        CheckpointError: the evaluation is damaged, or belongs to other heads.
    """
    manifest = _checked(options.bundle)
    evaluation = _evaluation(options, manifest)
    require_writable(options.bundle, TUNING_NAME)
    texts = read_prompts(options.prompts) if options.prompts else PROMPTS
    batch_sizes = _batch_sizes(options, manifest.limits)
    max_nodes = fitting_nodes(manifest.limits, min(options.max_nodes, manifest.limits.max_seq_len // 2))
    placement = place(
        manifest,
        options.backend,
        options.device,
        threads=options.threads,
        spin=options.spin,
        cuda_graphs=options.cuda_graphs,
    )
    run = _open(options, manifest, placement, texts)

    acceptance: RecordedAcceptance | EvaluatedAcceptance
    if evaluation is not None:
        acceptance = EvaluatedAcceptance(evaluation, manifest.heads.top_k, max_nodes)
        source = f"the heads' evaluation ({evaluation.answers} answers, {evaluation.tokens} tokens)"
    else:
        acceptance = run.acceptance(max_nodes)
        rows = len(acceptance.record.ranks)
        source = f"{options.prompts.name if options.prompts else 'built-in prompts'} ({len(texts)} answers, {rows} tokens)"
    costs, measurement, batches = run.checked(acceptance, batch_sizes, max_nodes, options.lengths or LENGTHS)
    found = DeviceTuning(
        backend=placement.backend,
        processor=placement.processor or cpu_name(),
        threads=0 if placement.processor else options.threads or num_cores(),
        cores=num_cores(),
        provenance=provenance(),
        measurement=measurement,
        costs=costs,
        acceptance_from=source,
        accuracy=acceptance.accuracy[:, : manifest.heads.top_k].tolist(),
        capacity=run.entries(1),
        batches=batches,
    )
    lookup = run.lookup(found)
    run.backend.save()
    run.backend.close()
    is_used = lookup is not None and lookup.ratio >= LOOKUP_COSTS
    found = found.model_copy(update={"prompt_lookup": is_used, "lookup_check": lookup})
    device = device_key(placement.backend, num_threads=options.threads, spin=options.spin, processor=placement.processor)
    if not checks_off(found.batches):
        keep(options.bundle, manifest, device, found)
    return device, found


@dataclass(frozen=True)
class _Run:
    """A backend together with the prompts to decode on it."""

    backend: Backend
    prompts: Prompts
    new_tokens: int
    rounds: Rounds
    ngrams: NGrams | None

    def checked(
        self,
        acceptance: RecordedAcceptance | EvaluatedAcceptance,
        batch_sizes: Sequence[int],
        max_nodes: int,
        lengths: Sequence[int],
    ) -> tuple[StepCosts, Measurement, list[TunedBatch]]:
        """The costs of steps, and the best trees by them. If a check is off, all is measured again, in twice as many rounds."""
        for attempt in range(1, ATTEMPTS + 1):
            rounds = replace(self.rounds, least=attempt * self.rounds.least)
            costs, measurement = self.costs(rounds, batch_sizes, max_nodes, lengths)
            batches = self.batches(costs, acceptance)
            off = checks_off(batches)
            if not off or attempt == ATTEMPTS:
                break
            note(f"decoding was slower or faster than predicted at batch size {off}; the costs are measured once more")
        return costs, measurement, batches

    def costs(
        self, rounds: Rounds, batch_sizes: Sequence[int], max_nodes: int, lengths: Sequence[int]
    ) -> tuple[StepCosts, Measurement]:
        """The time of steps, including the host's share, and how well it could be measured."""
        widths = [1 << power for power in range(max_nodes.bit_length()) if 1 << power < max_nodes] + [max_nodes]
        capacities = fitting_capacities(self.backend.manifest.limits, [length + max_nodes for length in lengths], max_nodes)
        others = OtherPrograms()
        with stage("step costs") as tell:
            limits = f"at least {rounds.least + 1}, and no new one after {rounds.max_seconds:.0f} s"
            grid = measure_grid(
                self.backend,
                batch_sizes,
                widths,
                capacities,
                rounds=rounds,
                tell=lambda done: tell(f"{done} rounds; {limits}"),
            )
        costs = StepCosts(list(batch_sizes), widths, capacities, grid.step_seconds, grid.head_seconds)
        other_cores = others.cores()
        is_quiet = grid.noise <= rounds.max_noise and (other_cores or 0.0) <= FREE * num_cores()
        measurement = Measurement(rounds=grid.rounds, noise=grid.noise, other_cores=other_cores, is_quiet=is_quiet)
        with stage("the host's share of a step"):
            self.backend.resize(batch_sizes[-1], self.capacity(1))
            return with_host_seconds(self.backend, costs, self.prompts, self.ngrams), measurement

    def acceptance(self, max_nodes: int) -> RecordedAcceptance:
        """Which drafts would have been accepted in the prompts' greedy answers."""
        model, limits = self.backend.manifest.model, self.backend.manifest.limits
        with count_stage("record acceptance", len(self.prompts), "answers") as tell:
            tell(0, 0, 0)
            found = record(
                self.backend,
                self.prompts,
                max_new_tokens=self.new_tokens,
                end_ids=model.eos_token_ids,
                batch_size=min(RECORDED_TOGETHER, limits.max_batch_size or RECORDED_TOGETHER),
                tell=lambda done: tell(done, 0, done),
            )
        with stage("sort the drafts"):
            return RecordedAcceptance(found, self.backend.manifest.heads.top_k, max_nodes)

    def capacity(self, batch_size: int) -> int:
        """Resize the cache to what these answers need, and empty it. Returns the entries per slot."""
        limits = self.backend.manifest.limits
        longest = max(len(prompt) for prompt in self.prompts) + self.new_tokens + SPARE
        self.backend.resize(batch_size, limits.capacity or min(longest, limits.max_seq_len))
        return self.backend.capacity

    def entries(self, batch_size: int) -> int:
        """Cache entries of the longest sequence of a batch, averaged over the time of its decoding."""
        groups = [self.prompts[start : start + batch_size] for start in range(0, len(self.prompts), batch_size)]
        longest = [max(len(prompt) for prompt in group) for group in groups]
        return round(sum(longest) / len(longest) + self.new_tokens / 2)

    def batches(self, costs: StepCosts, acceptance: RecordedAcceptance | EvaluatedAcceptance) -> list[TunedBatch]:
        """The best trees for each batch size of the costs."""
        sizes, found = costs.batch_sizes, []
        checker = Checker(self.backend, self.prompts, self.new_tokens, self.rounds.max_seconds / len(sizes))
        with step_stage("check by decoding", len(sizes)) as one_more:
            for batch_size in told(sizes, one_more):
                self.capacity(batch_size)
                found.append(_tuned(Place(costs, batch_size, self.entries(batch_size)), acceptance, checker))
        return found

    def lookup(self, found: DeviceTuning) -> LookupCheck | None:
        """Decode some prompts in turn with and without prompt lookup, one at a time, with the engine of an opened tuned bundle.

        Args:
            found: the device's tuning. If batch size 1 was not tuned, the smallest one is used.
        """
        batch = found.batches[0].batch_size
        count = LOOKED_UP * batch
        prompts = [self.prompts[number * len(self.prompts) // count] for number in range(count)]  # spread over all of them
        limits = self.backend.manifest.limits
        room = (limits.capacity or limits.max_seq_len) - max(len(prompt) for prompt in prompts) - SPARE
        new_tokens = max(self.new_tokens, min(LOOKUP_TOKENS, room))
        replace(self, new_tokens=new_tokens).capacity(batch)
        without, with_it = self._engine(found, batch, 0), self._engine(found, batch, LOOKUP_NODES)
        with count_stage("try prompt lookup", count) as tell:
            tell(0, 0, 0)
            decoding = DecodingOptions(max_new_tokens=new_tokens)
            pairs = in_turn((without, with_it), prompts, decoding, lambda done: tell(done, 0, 0))
        return lookup_check(pairs, batch)

    def _engine(self, found: DeviceTuning, batch: int, lookup_nodes: int) -> DecodingEngine:
        """An engine like that of `MedusaLM.from_bundle`."""
        tree, costs = found.choice(batch, fitting_nodes(self.backend.manifest.limits, lookup_nodes))
        return DecodingEngine(
            self.backend,
            tree,
            max_batch_size=batch,
            costs=costs and CorrectedCosts(costs),
            reuse_prefixes=False,
            prompt_lookup=lookup_nodes > 0,
            ngrams=self.ngrams,
        )


def _open(options: TuneOptions, manifest: Manifest, placement: Placement, texts: Sequence[Prompt]) -> _Run:
    """Open the bundle's backend and encode the prompts."""
    with stage("open the bundle"):
        manifest.require_intact(options.bundle)
        backend = open_backend(
            options.bundle,
            manifest,
            placement.backend,
            device=placement.device,
            num_threads=options.threads,
            spin=options.spin,
            cuda_graphs=options.cuda_graphs,
            allow_engine_code=options.allow_engine_code,
        )
    new_tokens = min(options.max_new_tokens, manifest.limits.max_seq_len // 2)
    codec = open_codec(options.bundle, manifest)
    prompts = [codec.encode(text)[: manifest.limits.max_seq_len - new_tokens] for text in texts]
    rounds = Rounds(options.rounds, options.max_noise, options.max_seconds)
    return _Run(backend, prompts, new_tokens, rounds, NGrams.of_bundle(options.bundle, manifest))


def _tuned(place: Place, acceptance: RecordedAcceptance | EvaluatedAcceptance, checker: Checker) -> TunedBatch:
    """The best trees for a batch size. The better one is checked by decoding."""
    plain, static, dynamic = place.whole(1, 1.0), acceptance.static(place), acceptance.dynamic(place)
    best = best_kind(plain, static, dynamic)
    found = TunedBatch(batch_size=place.batch_size, best=best, plain=plain, static=static, dynamic=dynamic)
    check = checker.check(place, found, acceptance)
    return found.model_copy(update={"check": check, "as_predicted": check and abs(check.error) <= TOLERANCE})


def _checked(bundle: Path) -> Manifest:
    manifest = Manifest.load(bundle)
    if manifest.validation.status == "failed":
        raise BundleError(f"{bundle} failed its validation ({manifest.validation.report}); export it again before tuning")
    return manifest


def _evaluation(options: TuneOptions, manifest: Manifest) -> Evaluation | None:
    if options.heads is not None and options.evaluation is not None:
        raise OptionError("--heads and --evaluation exclude each other; give one")
    place = options.heads / EVALUATION_NAME if options.heads is not None else options.evaluation
    if place is None:
        return None
    evaluation = read_evaluation(place)
    if evaluation.heads != manifest.heads.sha256:
        raise CheckpointError(
            f"{place} belongs to other heads ({evaluation.heads[:12]}…) than the bundle's ({manifest.heads.sha256[:12]}…); "
            "evaluate the bundle's heads, or leave it out to measure acceptance by decoding"
        )
    return evaluation


def read_evaluation(path: Path) -> Evaluation:
    """Read the output of `medusa-export heads evaluate`.

    Raises:
        CheckpointError: the file is missing or damaged.
    """
    try:
        return Evaluation.model_validate_json(path.read_bytes())
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path} is not an evaluation of heads ({type(error).__name__}); make one with: medusa-export heads evaluate"
        ) from error


def _batch_sizes(options: TuneOptions, limits: Limits) -> list[int]:
    wanted, largest = options.batch_sizes, limits.max_batch_size
    if wanted and largest is not None and max(wanted) > largest:
        raise CapacityError(f"--batch-sizes has {max(wanted)}, but the bundle's largest batch is {largest}; lower it")
    return sorted({size for size in wanted or options.default_batch_sizes if largest is None or size <= largest})
