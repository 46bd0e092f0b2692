"""The result of a validation, as a table for people and as JSON for programs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict
from rich.console import Console
from rich.table import Table

from medusa_runtime.bundle.manifest import PORTABLE, REPORT_NAME, Precision, Provenance, Scheme, ValidationFacts

Verdict = tuple[bool | None, str]  # whether a check passed, or None if it was skipped; and its result or the reason in words
WORDS = {True: "[green]passed", False: "[red]FAILED", None: "[yellow]skipped"}


class _Model(BaseModel):
    model_config = ConfigDict(ser_json_inf_nan="strings")  # an infinite difference is written as "Infinity"


class Tolerance(_Model):
    """How much a bundle may differ from the reference: PyTorch in fp32, with weights rounded as in a float bundle."""

    max_abs: float  # of a logit
    max_kl: float  # nats, from the reference's next-token distribution to the bundle's
    tie_margin: float  # logits: another token is accepted if the reference's margin for its own is smaller


TOLERANCES: dict[Precision, Tolerance] = {
    "fp32": Tolerance(max_abs=5e-3, max_kl=1e-6, tie_margin=1e-3),
    "fp16": Tolerance(max_abs=0.5, max_kl=2e-3, tie_margin=0.1),
    "bf16": Tolerance(max_abs=5e-3, max_kl=1e-6, tie_margin=1e-3),  # run in fp32 on a CPU, see `validate.runner`
}
# A GPU computes in bfloat16, which has eight bits of precision. PyTorch in bfloat16 differs by 1.3, 0.011 and 0.13 on the real
# model.
BF16_ON_GPU = Tolerance(max_abs=4.0, max_kl=5e-2, tie_margin=0.5)

# A quantised bundle is compared with itself: reading a text at once against decoding it. They differ only by the rounding of
# float products of different sizes, which occasionally moves an activation to the next integer.
QUANTIZED = Tolerance(max_abs=0.5, max_kl=5e-3, tie_margin=0.1)
# If activations are rounded to one term of 8 bits, such an integer moves all that follow it: a tree's rows are then as far from
# those of a text as both are from float32 (docs/decisions/0033-rotations.md). The real model differs by up to 2.9 and 0.08, and
# tokens part at margins of 0.11. A wrong graph differs by far more.
QUANTIZED_TO_8_BITS = Tolerance(max_abs=4.0, max_kl=0.1, tie_margin=0.5)
ALLOWED_KL = 1.0  # mean nats from PyTorch to a quantised bundle that was made without a limit: more is a defect


def tolerance(precision: Precision, *, activation_bits: int | None, on_gpu: bool) -> Tolerance:
    """How much a bundle may differ from the reference on this kind of device.

    Args:
        precision: the bundle's.
        activation_bits: of a quantised bundle's activations on the CPU; None if it is not quantised.
        on_gpu: whether it runs on a GPU, where activations are not rounded.
    """
    if activation_bits is not None:
        return QUANTIZED_TO_8_BITS if activation_bits == 8 and not on_gpu else QUANTIZED
    return BF16_ON_GPU if precision == "bf16" and on_gpu else TOLERANCES[precision]


class LogitsDifference(_Model):
    """The largest differences between two sets of logits rows."""

    what: str
    target: str = PORTABLE  # which of the bundle's graphs: the portable ones, or those for a backend
    num_rows: int
    max_abs: float
    min_cosine: float
    max_kl: float
    mean_kl: float = 0.0

    def within(self, tolerance: Tolerance) -> bool:
        """Whether the rows agree. NaN never agrees."""
        return self.max_abs <= tolerance.max_abs and self.max_kl <= tolerance.max_kl


class Divergence(_Model):
    """A position at which two decodings choose different tokens."""

    position: int  # in the answer
    token_id: int
    reference_token_id: int
    logit: float  # the reference's logit of token_id
    reference_logit: float  # the reference's logit of reference_token_id
    margin: float


class GreedyComparison(_Model):
    """Greedy decoding of one prompt: with Medusa, without it, and by the reference."""

    prompt: str
    num_tokens: int
    # each token of plain decoding that is not the reference's choice after the same prefix
    plain_vs_reference: list[Divergence]
    medusa_vs_plain: Divergence | None  # the first difference, if there is one
    tokens_per_step: float

    def within(self, tolerance: Tolerance) -> bool:
        """Whether all differences are between nearly equal logits."""
        found = [*self.plain_vs_reference, *([self.medusa_vs_plain] if self.medusa_vs_plain else [])]
        return all(divergence.margin <= tolerance.tie_margin for divergence in found)


class ValidationReport(_Model):
    """Everything that `medusa-export validate` compares. It is written to `validation.json` in the bundle."""

    status: Literal["passed", "failed"] = "failed"
    reference: str
    backend: str
    processor: str | None = None  # the GPU's name, if a GPU ran the bundle
    targets: list[str] = [PORTABLE]  # the kinds of graphs that are compared; the backend decodes with the first
    notes: list[str] = []
    precision: Precision
    quantization: Scheme | None = None
    tolerance: Tolerance
    allowed_kl: float | None = None  # mean nats from PyTorch to a quantised bundle
    generation: dict[str, Any] = {}  # the bundle's defaults from generation_config.json; the greedy comparison uses them
    generation_mismatch: str | None = None  # how these defaults differ from the checkpoint's
    switched_off: dict[str, Any] = {}  # settings of generation_config.json that were left out of the comparison
    file_mismatches: list[str] = []
    errors: list[str] = []
    prompt_logits: list[LogitsDifference] = []
    tree_logits: list[LogitsDifference] = []
    head_log_probs: list[LogitsDifference] = []
    greedy: list[GreedyComparison] = []
    from_reference: list[LogitsDifference] = []  # logits of a quantised bundle compared with PyTorch's
    provenance: Provenance

    def verdicts(self) -> dict[str, Verdict]:
        """Each check, whether it passed, and its result in words."""
        return {
            "files match the manifest": (not self.file_mismatches, "; ".join(self.file_mismatches) or "all files match"),
            "the bundle runs": (not self.errors, "; ".join(self.errors) or "no errors"),
            **self._by_target("logits of prompts, whole and in chunks", self.prompt_logits, self._logits),
            **self._by_target("logits of tree paths", self.tree_logits, self._logits),
            **self._by_target("head candidates", self.head_log_probs, self._heads),
            "defaults are those of generation_config.json": (
                self.generation_mismatch is None,
                self.generation_mismatch or "they are",
            ),
            f"greedy: Medusa = plain = {'its own logits' if self.quantization else 'PyTorch'}": self._greedy(),
        } | (
            self._by_target(f"mean KL from PyTorch at most {self.allowed_kl}", self.from_reference, self._kl)
            if self.quantization
            else {}
        )

    def conclude(self) -> None:
        """Set the status from the verdicts."""
        self.status = "failed" if self._with_verdict(False) else "passed"

    def _with_verdict(self, verdict: bool | None) -> list[str]:
        """The names of the checks that passed, failed or were skipped."""
        return [name for name, (passed, _) in self.verdicts().items() if passed is verdict]

    def facts(self) -> ValidationFacts:
        """The short form for the manifest."""
        rows = [*self.prompt_logits, *self.tree_logits]
        summary = {
            "max_abs": max((row.max_abs for row in rows), default=None),
            "max_kl": max((row.max_kl for row in rows), default=None),
            "greedy_tokens": sum(row.num_tokens for row in self.greedy),
            "failed_checks": self._with_verdict(False),
            "skipped_checks": self._with_verdict(None),
        }
        return ValidationFacts(status=self.status, report=REPORT_NAME, summary=summary)

    def show(self, console: Console) -> None:
        """Print the verdicts as a table, and below it the first difference of each prompt's answers."""
        table = Table(
            "check",
            "result",
            "",
            title=f"{self.quantization or self.precision} bundle against {self.reference} in PyTorch",
            title_justify="left",
        )
        for name, (passed, found) in self.verdicts().items():
            table.add_row(name, found, WORDS[passed])
        console.print(table)
        for row in self.greedy:
            if differences := self._divergences(row):
                kind, first = differences[0]
                console.print(
                    f"  {row.prompt[:40]!r}: {kind} differs at token {first.position}: "
                    f"{first.token_id} (logit {first.logit:.5f}) instead of {first.reference_token_id} "
                    f"(logit {first.reference_logit:.5f}), margin {first.margin:.2g}; {len(differences)} differences in total",
                    markup=False,
                    soft_wrap=True,
                )
        for text in self.notes:
            console.print(f"  note: {text}", markup=False, soft_wrap=True)

    def _by_target(
        self, check: str, rows: list[LogitsDifference], judge: Callable[[list[LogitsDifference]], Verdict]
    ) -> dict[str, Verdict]:
        """One check for each kind of graph, with its name if there are several kinds."""
        several = len(self.targets) > 1
        return {
            f"{check} ({target})" if several else check: judge([row for row in rows if row.target == target])
            for target in self.targets
        }

    def _kl(self, rows: list[LogitsDifference]) -> Verdict:
        if not rows or self.allowed_kl is None:
            return False, "not compared"
        num_rows = sum(row.num_rows for row in rows)
        mean = sum(row.mean_kl * row.num_rows for row in rows) / num_rows
        return mean <= self.allowed_kl, f"{mean:.4f} nats over {num_rows} rows"

    @staticmethod
    def _divergences(row: GreedyComparison) -> list[tuple[str, Divergence]]:
        found = [("plain from PyTorch", divergence) for divergence in row.plain_vs_reference]
        return found + ([("Medusa from plain", row.medusa_vs_plain)] if row.medusa_vs_plain else [])

    def _heads(self, rows: list[LogitsDifference]) -> Verdict:
        skipped = "no heads were given; use --heads"
        if self.quantization:
            skipped = "the heads are quantised, too, so they differ from PyTorch's; the greedy check runs them"
        elif self.head_log_probs:
            skipped = "it has the heads graph of ort-cpu, which is compared above"
        return self._logits(rows) if rows else (None, skipped)

    def _logits(self, rows: list[LogitsDifference]) -> Verdict:
        if not rows:
            return False, "not compared"
        found = (
            f"{sum(row.num_rows for row in rows)} rows: max |Δ| {max(row.max_abs for row in rows):.1e}, "
            f"cosine ≥ {min(row.min_cosine for row in rows):.7f}, KL ≤ {max(row.max_kl for row in rows):.1e}"
        )
        return all(row.within(self.tolerance) for row in rows), found

    def _greedy(self) -> Verdict:
        if not self.greedy:
            return False, "not compared"
        tokens = sum(row.num_tokens for row in self.greedy)
        differing = sum(bool(self._divergences(row)) for row in self.greedy)
        found = f"{tokens} tokens of {len(self.greedy)} prompts equal"
        if differing:
            found = f"{tokens} tokens of {len(self.greedy)} prompts; {differing} prompts differ, see below"
        if self.switched_off:
            found += f"; without {', '.join(self.switched_off)}, which the runtime does not follow"
        return all(row.within(self.tolerance) for row in self.greedy), found
