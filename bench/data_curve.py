"""Accuracy and tokens per step against the tokens that heads were trained on.

    python bench/data_curve.py MODEL --data DATA … --hidden DIR --judge ANSWERS [--part 0.25 …] [-o bench/results/x.json]

DATA, --exclude and the settings are those of a finished `medusa-export train`, whose hidden states are in DIR and not computed
again. ANSWERS is what `medusa-export distill` made of prompts to judge on, at which every part's heads are compared, under
trees searched on the held-out answers.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from accelerate import Accelerator

sys.path.insert(0, str(Path(__file__).parent))
from environment import environment, publish

from medusa_export.checkpoint import load_backbone, load_tokenizer
from medusa_heads.config import HeadsConfig
from medusa_heads.evaluate import accuracies, best_tree, replay, target_ranks
from medusa_heads.modules import MedusaHeads
from medusa_heads.tokens import CheckpointCodec
from medusa_heads.train.batches import row_batches
from medusa_heads.train.examples import Example, read_examples, split
from medusa_heads.train.hidden import HiddenStates, backbone_digest, cached_hidden_states
from medusa_heads.train.objective import HeadsObjective, LmHead
from medusa_heads.train.overlap import Overlap
from medusa_heads.train.schedule import learning_rate_factor
from medusa_heads.train.settings import TrainSettings

NODES = (16, 64)


def rows_of(states: HiddenStates, places: np.ndarray) -> np.ndarray:
    ends = [*states.starts[1:], len(states.next_ids)]
    return np.concatenate([np.arange(states.starts[place], ends[place]) for place in places])


def kept(states: HiddenStates, rows: np.ndarray, settings: TrainSettings) -> torch.Tensor:
    ids, counts = np.unique(states.next_ids[rows], return_counts=True)
    return torch.from_numpy(ids[counts >= settings.min_token_count])


def fit(model: Any, states: HiddenStates, rows: np.ndarray, settings: TrainSettings) -> MedusaHeads:
    config = model.config
    heads = MedusaHeads(
        HeadsConfig(
            base_model="x",
            num_heads=settings.num_heads,
            num_layers=settings.num_layers,
            hidden_size=config.hidden_size,
            vocab_size=config.vocab_size,
        )
    )
    lm_head = LmHead(model.get_output_embeddings().weight.to(torch.bfloat16), None, kept(states, rows, settings))
    objective = HeadsObjective(heads, lm_head, settings.loss_decay)
    optimizer = torch.optim.AdamW(heads.parameters(), settings.learning_rate, weight_decay=settings.weight_decay)
    per_epoch = len(row_batches(len(rows), settings.batch_tokens, settings.seed, 0))
    num_steps = int(settings.epochs * per_epoch)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: learning_rate_factor(s, num_steps, settings.warmup))
    for step in range(num_steps):
        if step % per_epoch == 0:
            batches = row_batches(len(rows), settings.batch_tokens, settings.seed, step // per_epoch)
        batch = np.sort(rows[batches[step % per_epoch]])
        hidden = torch.from_numpy(np.asarray(states.rows[batch])).to(torch.bfloat16)
        with torch.autocast("cpu", torch.bfloat16):
            losses = objective(hidden, torch.from_numpy(states.targets(batch, settings.num_heads)))
        losses.total.backward()
        torch.nn.utils.clip_grad_norm_(heads.parameters(), settings.max_grad_norm)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        if step % 200 == 0:
            click.echo(f"{step} of {num_steps}: {float(losses.total):.3f}", err=True)
    return heads.eval()


@click.command()
@click.argument("model")
@click.option("--data", "data", multiple=True, required=True, type=click.Path(path_type=Path))
@click.option("--exclude", multiple=True, type=click.Path(path_type=Path))
@click.option("--hidden", required=True, type=click.Path(path_type=Path))
@click.option("--judge", required=True, type=click.Path(path_type=Path))
@click.option("--part", "parts", multiple=True, type=float, default=(0.25, 0.5), show_default=True)
@click.option("--layers", "num_layers", default=3, show_default=True)
@click.option("--epochs", default=3.0, show_default=True)
@click.option("-o", "--output", type=click.Path(path_type=Path))
def main(
    model: str,
    data: tuple[Path, ...],
    exclude: tuple[Path, ...],
    hidden: Path,
    judge: Path,
    parts: tuple[float, ...],
    num_layers: int,
    epochs: float,
    output: Path | None,
) -> None:
    """Train on parts of the data, and judge each part's heads."""
    Accelerator(cpu=True)  # training needs its state
    settings = TrainSettings(
        num_layers=num_layers, epochs=epochs, batch_tokens=512, learning_rate=1.2e-3, min_token_count=5, method="medusa-1"
    )
    codec = CheckpointCodec(load_tokenizer(model))
    examples = read_examples(data, codec, max_length=settings.max_length)
    overlap = Overlap(exclude)
    examples = [e for e in examples if not overlap.found_in(codec.decode((*e.prompt_ids, *e.response_ids)))]
    training, held_out = split(examples, settings.held_out)
    backbone = load_backbone(model, "bf16", attention="sdpa").model
    identity = backbone_digest(backbone)
    states = cached_hidden_states(backbone, training, hidden / "train", identity=identity)
    held_states = cached_hidden_states(backbone, held_out, hidden / "held-out", identity=identity)
    judged: list[Example] = read_examples([judge], codec, max_length=settings.max_length)
    judge_states = cached_hidden_states(backbone, judged, hidden / "judge", identity=identity)
    order = np.random.default_rng(0).permutation(len(training))
    results = []
    for part in parts:
        rows = rows_of(states, np.sort(order[: int(part * len(order))]))
        started = time.perf_counter()
        heads = fit(backbone, states, rows, settings).to(torch.bfloat16)
        held_ranks, ranks = (
            target_ranks(heads, backbone.get_output_embeddings(), some) for some in (held_states, judge_states)
        )
        trees = {count: best_tree(held_ranks, count) for count in NODES}
        results.append(
            {
                "training_tokens": len(rows),
                "seconds": round(time.perf_counter() - started, 1),
                "top1": accuracies(ranks)[:, 0].round(4).tolist(),
                "top10": accuracies(ranks).sum(1).round(4).tolist(),
                "tokens_per_step": {str(n): round(replay(ranks, judge_states.starts, tree), 4) for n, tree in trees.items()},
            }
        )
        click.echo(str(results[-1]), err=True)
    publish(environment() | {"settings": settings.model_dump(), "judged_on": judge.name, "parts": results}, output)


if __name__ == "__main__":
    main()
