"""The settings of a training run. Each field is the command's flag, the recipe's key and the documentation."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

Method = Literal["medusa-1", "medusa-2"]


class TrainSettings(BaseModel):
    """Settings of `medusa-export train`, without its inputs and outputs."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    method: Method = Field(default="medusa-1", description="medusa-1: train the heads. medusa-2: train heads and backbone")
    num_heads: int = Field(default=4, ge=1, le=32, description="number of heads")
    num_layers: int = Field(default=2, ge=1, le=8, description="residual blocks per head")
    own_lm_head: bool = Field(default=False, description="give each head its own LM head, initialised from the model's")
    read_root: bool = Field(default=True, description="heads also read the last decided token; the paper's do not")
    start_from: str | None = Field(
        default=None, description="directory of heads to start from, instead of new ones; they keep their form"
    )
    heads_dtype: Literal["fp16", "bf16", "fp32"] = Field(
        default="fp16", description="precision of the weights in the heads' file"
    )

    epochs: float = Field(default=2.0, gt=0, description="passes over the data")
    max_steps: int | None = Field(default=None, ge=1, description="stop after this many steps, regardless of the epochs")
    batch_tokens: int = Field(default=512, ge=1, description="tokens per batch on each process")
    gradient_accumulation: int = Field(default=1, ge=1, description="batches per optimizer step")
    learning_rate: float = Field(default=1.2e-3, gt=0, description="highest learning rate of the heads")
    warmup: float = Field(
        default=0.02, ge=0, lt=1, description="part of the steps in which the learning rate rises to its highest value"
    )
    weight_decay: float = Field(default=0.0, ge=0, description="weight decay of the optimizer, AdamW")
    max_grad_norm: float = Field(default=1.0, gt=0, description="clip gradients to this norm")
    loss_decay: float = Field(default=0.8, gt=0, le=1, description="weight of the k-th head's loss: this to the power of k")
    soft_targets: float = Field(
        default=0.6,
        ge=0,
        le=1,
        description="part of each target that is the backbone's distribution, the rest being the token; for heads alone",
    )
    min_token_count: int = Field(
        default=1, ge=1, description="ignore tokens rarer than this in the data; the loss is then cheaper to compute"
    )
    mixed_precision: Literal["auto", "no", "bf16", "fp16"] = Field(
        default="auto", description="precision of matrix products. auto: bf16 if the hardware computes in it"
    )
    seed: int = Field(default=0, ge=0, lt=2**32, description="seed of the data's order and of random initial weights")

    held_out: float = Field(default=0.02, ge=0, lt=1, description="part of the conversations to keep for evaluation")
    max_length: int = Field(default=2048, ge=2, description="cut conversations to this many tokens")
    backbone_dtype: Literal["auto", "fp32", "fp16", "bf16"] = Field(
        default="auto", description="precision of the frozen backbone. auto: bf16 if the hardware computes in it"
    )
    load_in_4bit: bool = Field(default=False, description="load the frozen backbone in 4 bits (bitsandbytes; medusa-1 only)")
    checkpoint_every: int = Field(default=500, ge=1, description="steps between checkpoints")
    log_every: int = Field(default=10, ge=1, description="steps between lines of the log")

    heads_first: float = Field(
        default=1.0, ge=0, description="medusa-2: epochs in which only the heads are trained, at the start"
    )
    backbone: Literal["lora", "full"] = Field(
        default="lora", description="medusa-2: train a LoRA adapter of the backbone, or all its weights"
    )
    lora_rank: int = Field(default=32, ge=1, description="medusa-2: rank of the adapter")
    lora_alpha: float = Field(default=32.0, gt=0, description="medusa-2: the adapter is scaled by alpha / rank")
    lora_dropout: float = Field(default=0.0, ge=0, lt=1, description="medusa-2: dropout of the adapter's inputs")
    heads_rate_multiple: float = Field(
        default=4.0, gt=0, description="medusa-2: the heads' learning rate divided by the backbone's, while both are trained"
    )
    backbone_loss: Literal["kl", "ce"] = Field(
        default="kl", description="medusa-2: kl keeps the backbone close to the original model, ce fits it to the data"
    )
    heads_loss_weight: float = Field(
        default=0.2, ge=0, description="medusa-2: weight of the heads' loss; the backbone's has weight 1"
    )
    heads_loss_schedule: Literal["constant", "linear", "sine"] = Field(
        default="constant", description="medusa-2: how the weight of the heads' loss grows over the run"
    )
    save_backbone: Literal["merged", "adapter"] = Field(
        default="merged", description="medusa-2: write the model with the adapter merged into it, or only the adapter"
    )
