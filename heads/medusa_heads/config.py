"""The configuration of a set of Medusa heads."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class HeadsConfig(BaseModel):
    """Shape of the heads, and the model that they were made for. It is stored as `config.json` next to the weights."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    format_version: int = 1
    base_model: str = Field(description="the checkpoint that the heads were made for, as the user named it")
    num_heads: int = Field(
        gt=0, le=64, description="K: head k (from 0) guesses the token k + 2 positions after the row that it reads"
    )
    num_layers: int = Field(default=1, gt=0, le=64, description="residual blocks per head")
    hidden_size: int = Field(gt=0, lt=1 << 31, description="C: width of the backbone's last hidden state")
    vocab_size: int = Field(gt=0, lt=1 << 31, description="V")
    shared_lm_head: bool = Field(default=True, description="all heads use the backbone's LM head; otherwise each has its own")
    reads_root: bool = Field(default=False, description="the first block of each head also reads the decided token (the root)")
