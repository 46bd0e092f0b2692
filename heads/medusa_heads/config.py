"""The configuration of a set of Medusa heads."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from medusa_runtime.bundle.versions import FileVersions

Kind = Literal["medusa", "hydra"]
VERSIONS = FileVersions("format_version", newest=1)


class HeadsConfig(BaseModel):
    """Shape of the heads, and the model that they were made for. It is stored as `config.json` next to the weights.

    The fields from `kind` on describe heads of other projects. They are stored only if they differ from their defaults.
    """

    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    format_version: int = VERSIONS.newest
    base_model: str = Field(description="the checkpoint that the heads were made for, as the user named it")
    num_heads: int = Field(
        gt=0, le=64, description="K: head k (from 0) guesses the token k + 2 positions after the row that it reads"
    )
    num_layers: int = Field(default=1, ge=0, le=64, description="residual blocks per head; 0 only with own LM heads")
    hidden_size: int = Field(gt=0, lt=1 << 31, description="C: width of the backbone's last hidden state")
    vocab_size: int | None = Field(gt=0, lt=1 << 31, description="V; null if the file does not tell: the backbone's")
    shared_lm_head: bool = Field(
        default=True, description="all heads use the backbone's LM head; otherwise they have their own"
    )
    reads_root: bool = Field(default=False, description="the first block of each head also reads the decided token (the root)")
    kind: Kind = Field(
        default="medusa", description="hydra: head k also reads the root and the best guesses of heads before it"
    )
    block_bias: bool = Field(default=True, description="residual blocks have a bias")
    one_block: bool = Field(
        default=False, description="a head's blocks are one block, applied again and again; Hydra: those after its first"
    )
    one_lm_head: bool = Field(default=False, description="the heads' own LM head is one for all of them")
    lm_head_bias: bool = Field(default=False, description="the heads' own LM heads have a bias")
    draft_rows: bool = Field(default=False, description="own LM heads have rows only for the draft vocabulary, in its order")
    logit_scale: float = Field(default=1.0, gt=0, allow_inf_nan=False, description="the heads' logits are multiplied by it")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.shared_lm_head and (self.one_lm_head or self.lm_head_bias or self.draft_rows):
            raise ValueError("one_lm_head, lm_head_bias and draft_rows are for heads with their own LM head")
        if not self.shared_lm_head and self.vocab_size is None:
            raise ValueError("vocab_size is null, which only heads that use the backbone's LM head can have")
        if self.num_layers == 0 and (self.shared_lm_head or self.reads_root or self.kind == "hydra"):
            raise ValueError("num_layers is 0, which only Medusa heads with their own LM heads can have")
        if self.reads_root and (self.one_block or self.kind == "hydra"):
            raise ValueError("reads_root does not go with one_block or kind hydra")
        if self.kind == "hydra" and (self.draft_rows or not self.block_bias):
            raise ValueError("Hydra heads have biases and no draft vocabulary")
        return self

    def foreign(self) -> dict[str, Any]:
        """The fields that only heads of other projects need, where they differ from their defaults."""
        fields = list(type(self).model_fields.items())
        start = [name for name, _ in fields].index("kind")
        return {name: getattr(self, name) for name, field in fields[start:] if getattr(self, name) != field.default}

    def stored(self) -> dict[str, Any]:
        """The fields to store: of those that only heads of other projects need, the ones that `foreign` names."""
        fields = list(type(self).model_fields)
        return self.model_dump(include={*fields[: fields.index("kind")], *self.foreign()})
