"""What a validation found, for people and for programs."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict
from rich.console import Console
from rich.table import Table

from medusa_runtime.manifest import REPORT_NAME, Precision, Provenance, ValidationFacts


class _Model(BaseModel):
    model_config = ConfigDict(ser_json_inf_nan="strings")  # an infinite difference is told as one


class Tolerance(_Model):
    """How far a bundle may be from the reference, which runs in fp32 on the weights as the bundle stores them."""

    max_abs: float  # of a logit
    max_kl: float  # nats, from the reference's next-token distribution to the bundle's
    tie_margin: float  # between two logits: a token may differ where the reference prefers its own by less


TOLERANCES: dict[Precision, Tolerance] = {
    "fp32": Tolerance(max_abs=5e-3, max_kl=1e-6, tie_margin=1e-3),
    "fp16": Tolerance(max_abs=0.5, max_kl=2e-3, tie_margin=0.1),
    "bf16": Tolerance(max_abs=5e-3, max_kl=1e-6, tie_margin=1e-3),  # run in fp32, see `validate.runner`
}


class LogitsDifference(_Model):
    """The largest differences between two sets of logits rows."""

    what: str
    num_rows: int
    max_abs: float
    min_cosine: float
    max_kl: float

    def within(self, tolerance: Tolerance) -> bool:
        """Whether the rows agree. NaN does not."""
        return self.max_abs <= tolerance.max_abs and self.max_kl <= tolerance.max_kl


class Divergence(_Model):
    """A place where two decodings choose different tokens."""

    position: int  # in the answer
    token_id: int
    reference_token_id: int
    logit: float  # the reference's, of token_id
    reference_logit: float  # the reference's, of reference_token_id
    margin: float


class GreedyComparison(_Model):
    """Greedy decoding of one prompt, three ways."""

    prompt: str
    num_tokens: int
    plain_vs_reference: list[Divergence]  # every token of plain decoding against the reference's choice after the same prefix
    medusa_vs_plain: Divergence | None  # the first, where there is one
    tokens_per_step: float

    def within(self, tolerance: Tolerance) -> bool:
        """Whether all differences are near ties."""
        found = [*self.plain_vs_reference, *([self.medusa_vs_plain] if self.medusa_vs_plain else [])]
        return all(divergence.margin <= tolerance.tie_margin for divergence in found)


class ValidationReport(_Model):
    """All that `medusa-export validate` compares. Kept as `validation.json` in the bundle."""

    status: Literal["passed", "failed"] = "failed"
    reference: str
    backend: str
    notes: list[str] = []
    precision: Precision
    tolerance: Tolerance
    file_mismatches: list[str] = []
    errors: list[str] = []
    prompt_logits: list[LogitsDifference] = []
    tree_logits: list[LogitsDifference] = []
    head_log_probs: LogitsDifference | None = None
    greedy: list[GreedyComparison] = []
    provenance: Provenance

    def verdicts(self) -> dict[str, tuple[bool, str]]:
        """Each check with whether it passed and what it found."""
        return {
            "files match the manifest": (not self.file_mismatches, "; ".join(self.file_mismatches) or "all do"),
            "the bundle runs": (not self.errors, "; ".join(self.errors) or "it does"),
            "logits of prompts, whole and in chunks": self._logits(self.prompt_logits),
            "logits of tree paths": self._logits(self.tree_logits),
            "head candidates": self._logits([self.head_log_probs] if self.head_log_probs else [], optional=True),
            "greedy: Medusa = plain = PyTorch": self._greedy(),
        }

    def conclude(self) -> None:
        """Set the status from the verdicts."""
        self.status = "passed" if all(passed for passed, _ in self.verdicts().values()) else "failed"

    def facts(self) -> ValidationFacts:
        """The short form for the manifest."""
        rows = [*self.prompt_logits, *self.tree_logits]
        summary = {
            "max_abs": max((row.max_abs for row in rows), default=None),
            "max_kl": max((row.max_kl for row in rows), default=None),
            "greedy_tokens": sum(row.num_tokens for row in self.greedy),
            "failed_checks": [name for name, (passed, _) in self.verdicts().items() if not passed],
        }
        return ValidationFacts(status=self.status, report=REPORT_NAME, summary=summary)

    def show(self, console: Console) -> None:
        """Print the verdicts as a table, and below it where each prompt's answers part first."""
        table = Table(
            "check",
            "found",
            "",
            title=f"{self.precision} bundle against {self.reference} in PyTorch",
            title_justify="left",
        )
        for name, (passed, found) in self.verdicts().items():
            table.add_row(name, found, "[green]passed" if passed else "[red]FAILED")
        console.print(table)
        for row in self.greedy:
            if differences := self._divergences(row):
                kind, first = differences[0]
                console.print(
                    f"  {row.prompt[:40]!r}: {kind} differs at token {first.position}: "
                    f"{first.token_id} (logit {first.logit:.5f}) for {first.reference_token_id} "
                    f"(logit {first.reference_logit:.5f}), margin {first.margin:.2g}; {len(differences)} differences in all",
                    markup=False,
                    soft_wrap=True,
                )
        for text in self.notes:
            console.print(f"  note: {text}", markup=False, soft_wrap=True)

    @staticmethod
    def _divergences(row: GreedyComparison) -> list[tuple[str, Divergence]]:
        found = [("plain from PyTorch", divergence) for divergence in row.plain_vs_reference]
        return found + ([("Medusa from plain", row.medusa_vs_plain)] if row.medusa_vs_plain else [])

    def _logits(self, rows: list[LogitsDifference], *, optional: bool = False) -> tuple[bool, str]:
        if not rows:
            return optional, "skipped: no heads were given" if optional else "not compared"
        found = (
            f"{sum(row.num_rows for row in rows)} rows: max |Δ| {max(row.max_abs for row in rows):.1e}, "
            f"cosine ≥ {min(row.min_cosine for row in rows):.7f}, KL ≤ {max(row.max_kl for row in rows):.1e}"
        )
        return all(row.within(self.tolerance) for row in rows), found

    def _greedy(self) -> tuple[bool, str]:
        if not self.greedy:
            return False, "not compared"
        tokens = sum(row.num_tokens for row in self.greedy)
        differing = sum(bool(self._divergences(row)) for row in self.greedy)
        found = f"{tokens} tokens of {len(self.greedy)} prompts equal"
        if differing:
            found = f"{tokens} tokens of {len(self.greedy)} prompts; {differing} prompts differ, see below"
        return all(row.within(self.tolerance) for row in self.greedy), found
