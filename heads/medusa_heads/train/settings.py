"""What a training run can be told. A field is the command's flag, the recipe's key and the documentation."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

Method = Literal["medusa-1", "medusa-2"]


class TrainSettings(BaseModel):
    """Settings of `medusa-export train`, but for what it reads and where it writes."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    method: Method = Field(default="medusa-1", description="medusa-1: heads alone. medusa-2: heads and backbone")
    num_heads: int = Field(default=4, ge=1, le=32, description="heads to make")
    num_layers: int = Field(default=1, ge=1, le=8, description="residual blocks a head")
    own_lm_head: bool = Field(default=False, description="an LM head of its own for each head, started from the model's")
    read_root: bool = Field(default=True, description="heads read the token decided last, which the paper's do not")
    start_from: str | None = Field(default=None, description="heads to start from, instead of new ones")
    heads_dtype: Literal["fp16", "bf16", "fp32"] = Field(default="fp16", description="of the weights in the heads' file")

    epochs: float = Field(default=3.0, gt=0, description="passes over the data")
    max_steps: int | None = Field(default=None, ge=1, description="stop after so many steps, whatever the epochs")
    batch_tokens: int = Field(default=1024, ge=1, description="tokens that a step takes on each process")
    gradient_accumulation: int = Field(default=1, ge=1, description="batches added up for one step of the optimizer")
    learning_rate: float = Field(default=1.5e-3, gt=0, description="of the heads, at its height")
    warmup: float = Field(default=0.02, ge=0, lt=1, description="part of the steps in which the rate rises to its height")
    weight_decay: float = Field(default=0.0, ge=0, description="of the optimizer, AdamW")
    max_grad_norm: float = Field(default=1.0, gt=0, description="longer gradients are cut")
    loss_decay: float = Field(default=0.8, gt=0, le=1, description="the k-th head counts this to the power of k")
    soft_targets: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="part of a head's target that is the backbone's distribution there, the rest being its token; heads alone",
    )
    min_token_count: int = Field(
        default=1, ge=1, description="tokens rarer than this in the data are left out of the loss, which makes it cheaper"
    )
    mixed_precision: Literal["auto", "no", "bf16", "fp16"] = Field(
        default="auto", description="of products. auto: bf16 where the hardware multiplies it"
    )
    seed: int = Field(default=0, ge=0, lt=2**32, description="of the data's order and of what starts random")

    held_out: float = Field(default=0.02, ge=0, lt=1, description="part of the conversations kept for evaluation")
    max_length: int = Field(default=2048, ge=2, description="longer conversations are cut")
    backbone_dtype: Literal["auto", "fp32", "fp16", "bf16"] = Field(
        default="auto", description="in which the frozen backbone runs. auto: bf16 where the hardware multiplies it"
    )
    load_in_4bit: bool = Field(default=False, description="load the frozen backbone in 4 bits (bitsandbytes; medusa-1 only)")
    checkpoint_every: int = Field(default=500, ge=1, description="steps between checkpoints")
    log_every: int = Field(default=10, ge=1, description="steps between lines of the log")

    heads_first: float = Field(default=1.0, ge=0, description="medusa-2: epochs for the heads alone before both learn")
    backbone: Literal["lora", "full"] = Field(default="lora", description="medusa-2: what of the backbone learns")
    lora_rank: int = Field(default=32, ge=1, description="medusa-2: rank of the adapter")
    lora_alpha: float = Field(default=32.0, gt=0, description="medusa-2: the adapter counts alpha / rank")
    lora_dropout: float = Field(default=0.0, ge=0, lt=1, description="medusa-2: of the adapter's inputs")
    heads_rate_multiple: float = Field(
        default=4.0, gt=0, description="medusa-2: the heads' learning rate over the backbone's, while both learn"
    )
    backbone_loss: Literal["kl", "ce"] = Field(
        default="kl", description="medusa-2: kl keeps the backbone near the original model, ce fits it to the data"
    )
    heads_loss_weight: float = Field(default=0.2, ge=0, description="medusa-2: weight of the heads' loss beside the backbone's")
    heads_loss_schedule: Literal["constant", "linear", "sine"] = Field(
        default="constant", description="medusa-2: how that weight comes up over the run"
    )
    save_backbone: Literal["merged", "adapter"] = Field(
        default="merged", description="medusa-2: write the model with the adapter merged into it, or the adapter alone"
    )
