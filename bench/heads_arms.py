"""Trains heads in several ways on the same tokens, and judges each on answers that training never saw.

    python bench/heads_arms.py MODEL --heads DIR --data starts=DIR --data files=FILE.jsonl --judge greedy=DIR --work DIR

Each arm is one more pass of the same heads over `--tokens` answer tokens, except those that say "new". `--data` and `--judge`
are outputs of `medusa-export distill` or files of answers. Sampled answers are judged like greedy ones: the runtime draws a
token from the model's distribution and then follows the branch that holds it, so the answer alone decides what is accepted.

The table has, for each set of answers, how often each head's best token is right, and tokens per step by replay: with a fixed
tree, which was searched on held-out training answers, and with trees that are made at each step with n-grams. Arms that the
output already has are not run again.
"""

from __future__ import annotations

import copy
import itertools
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812 - the usual name

sys.path.insert(0, str(Path(__file__).parent))
from environment import environment, publish

from medusa_export.head_training.torch_devices import fast_precision
from medusa_export.model.checkpoint import load_backbone
from medusa_export.model.tokenizer import load_tokenizer
from medusa_heads.config import HeadsConfig
from medusa_heads.evaluate import accuracies, best_tree
from medusa_heads.formats import load_heads
from medusa_heads.modules import MedusaHeads, root_states
from medusa_heads.replay import NOT_VALID, TOP_K, replay
from medusa_heads.tokens import CheckpointCodec
from medusa_heads.train.batches import row_batches
from medusa_heads.train.examples import Example, read_examples, split
from medusa_heads.train.hidden import HiddenStates, backbone_digest, cached_hidden_states, pad_right
from medusa_heads.train.objective import IGNORED, LmHead, lm_head_of, weighted
from medusa_heads.train.schedule import learning_rate_factor
from medusa_runtime.drafting.ngrams import NGRAMS_NAME, NGrams, Root

NODES = (16, 64)
SOFT_BLOCK, BATCH, WARMUP, CLIP = 32, 512, 0.02, 1.0  # as `medusa-export train` has them
HELD_OUT = 0.02
CANDIDATES = 32
PRECISION = fast_precision(torch.device("cpu"))  # bf16 where the processor computes in it
DTYPE = getattr(torch, {"bf16": "bfloat16", "fp32": "float32"}[PRECISION])
ROWS = 512  # rows whose logits are in memory at a time when heads are judged


@dataclass(frozen=True)
class Arm:
    """One way to train. The defaults are those of `medusa-export train`."""

    about: str
    data: str = ""  # the name of the data; empty: the first one that was given
    starts_new: bool = False  # new heads, instead of those that were given
    trains: bool = True
    learning_rate: float = 6e-4
    added_rate: float = 5e-3  # of what the arm adds to the heads, which begins at zero
    loss_decay: float = 0.8
    soft_targets: float = 0.6
    dropout: float = 0.0  # of the hidden state that heads read
    noise: float = 0.0  # uniform noise that is added to it, as a part of its root mean square
    weight_decay: float = 0.0
    common: int = 0  # tokens of the lowest ids that are drafted whether or not the data hold them
    true_roots: bool = False  # roots outside the draft vocabulary are read, too
    pair_rank: int = 0  # heads 2 to K add a table of this rank of the token before theirs
    own_rank: int = 0  # each head changes the LM head by a product of this rank
    layers: tuple[int, ...] = ()  # hidden states of these layers are read beside the last
    earlier: tuple[int, ...] = ()  # the last layer's hidden states this many tokens before are read, too

    @property
    def num_beside(self) -> int:
        """Number of hidden states that heads read beside the one of the paper."""
        return len(self.layers) + len(self.earlier)


ARMS = {
    "shipped": Arm("the heads that were given", trains=False),
    "more": Arm("one more pass"),
    "dropout": Arm("dropout of 0.1 on the hidden states", dropout=0.1),
    "noise": Arm("noise of 0.2 on the hidden states", noise=0.2),
    "weight decay": Arm("weight decay of 0.1", weight_decay=0.1),
    "decay 1": Arm("all heads have the same weight in the loss", loss_decay=1.0),
    "decay 0.5": Arm("head k has the weight 0.5 to the power of k", loss_decay=0.5),
    "tokens alone": Arm("targets without the model's distribution", soft_targets=0.0),
    "common": Arm("no training; 16,384 common tokens are drafted in any case", trains=False, common=16384),
    "true roots": Arm("one more pass; every root is read", true_roots=True),
    "pairs": Arm("a table of rank 64 of the token before, for heads 2 to 4", pair_rank=64),
    "own LM heads": Arm("each head changes the LM head by a product of rank 64", own_rank=64),
    "new": Arm("new heads", starts_new=True, learning_rate=1.2e-3),
    "new, layers": Arm("new heads that read three layers", starts_new=True, learning_rate=1.2e-3, layers=(10, 20)),
    "new, earlier": Arm(
        "new heads that read the states of three tokens", starts_new=True, learning_rate=1.2e-3, earlier=(1, 2)
    ),
    "earlier": Arm("heads that read the states of three tokens", earlier=(1, 2)),
}


class Learner(nn.Module):
    """Heads with what an arm adds to them."""

    def __init__(self, arm: Arm, heads: MedusaHeads, lm_head: LmHead, extra_width: int) -> None:
        super().__init__()
        self.arm, self.heads, self.lm_head = arm, heads, lm_head
        width, rows = heads.config.hidden_size, len(lm_head.weight)
        count = heads.config.num_heads
        self.before = nn.ModuleList(nn.Linear(extra_width, width, bias=False) for _ in range(count if extra_width else 0))
        self.tables = nn.ModuleList(_table(len(lm_head.index), rows, arm.pair_rank) for _ in range(count * bool(arm.pair_rank)))
        self.own = nn.ModuleList(_product(width, rows, arm.own_rank) for _ in range(count * bool(arm.own_rank)))
        for layer in self.before:
            nn.init.zeros_(layer.weight)

    def roots(self, root_ids: torch.Tensor, every: torch.Tensor) -> torch.Tensor | None:
        """What the heads read of the roots. every: all rows of the LM head."""
        if not self.heads.config.reads_root:
            return None
        if self.arm.true_roots:
            return root_states(every, root_ids)
        return root_states(self.lm_head.weight, self.lm_head.places(root_ids))

    def logits(
        self, k: int, hidden: torch.Tensor, extra: torch.Tensor | None, roots: torch.Tensor | None, before_ids: torch.Tensor
    ) -> torch.Tensor:
        """Logits of head k. before_ids: the token before the one that it guesses. [n, C] -> [n, V']"""
        if extra is not None:
            hidden = hidden + self.before[k](extra)
        features = self.heads.heads[k](hidden, roots)
        logits = F.linear(features, self.lm_head.weight, self.lm_head.bias)
        if self.arm.own_rank:
            logits = logits + self.own[k](features)
        if self.arm.pair_rank and k:
            logits = logits + self.tables[k](before_ids.clamp(min=0))
        return logits


def _table(num_tokens: int, rows: int, rank: int) -> nn.Module:
    table = nn.Sequential(nn.Embedding(num_tokens, rank), nn.Linear(rank, rows, bias=False))
    nn.init.normal_(table[0].weight, std=rank**-0.5)
    nn.init.zeros_(table[1].weight)
    return table


def _product(width: int, rows: int, rank: int) -> nn.Module:
    product = nn.Sequential(nn.Linear(width, rank, bias=False), nn.Linear(rank, rows, bias=False))
    nn.init.zeros_(product[1].weight)
    return product


@dataclass(frozen=True)
class Answers:
    """Answers with the hidden states that heads read."""

    states: HiddenStates
    extra: Any = None  # [P, L*C] states of other layers
    earlier: tuple[int, ...] = ()

    def rows(self, index: np.ndarray, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The last layer's states at some rows, and what is read beside them: [n, C] and [n, E]."""
        last = torch.from_numpy(np.asarray(self.states.rows[index])).to(dtype)
        beside = [] if self.extra is None else [torch.from_numpy(np.asarray(self.extra[index])).to(dtype)]
        beside += [self._before(index, distance).to(dtype) for distance in self.earlier]
        return last, torch.cat(beside, -1) if beside else None

    def _before(self, index: np.ndarray, distance: int) -> torch.Tensor:
        """The last layer's states some tokens before, with a root mean square of 1; zeros before the answer. [n, C]"""
        starts = self.states.starts[np.searchsorted(self.states.starts, index, side="right") - 1]
        found = torch.from_numpy(np.asarray(self.states.rows[np.maximum(index - distance, 0)])).float()
        found = found * found.square().mean(-1, keepdim=True).rsqrt()
        found[torch.from_numpy(index - distance < starts)] = 0
        return found


class Bench:
    """The model, and the answers of all arms."""

    def __init__(self, model: str, work: Path, tokens: int) -> None:
        backbone = load_backbone(model, PRECISION, attention="sdpa")
        self.model, self.name, self.work, self.tokens = backbone.model, backbone.facts.name, work, tokens
        self.codec = CheckpointCodec(load_tokenizer(model))
        self.identity = backbone_digest(self.model)
        self.every = self.model.get_output_embeddings().weight.detach().to(DTYPE)
        self.found: dict[tuple[str, tuple[int, ...]], Answers] = {}
        self.examples: dict[str, list[Example]] = {}

    def read(self, name: str, path: Path) -> None:
        """Read a judge's answers."""
        self.examples[name] = read_examples([path], self.codec, max_length=2048)

    def read_training(self, name: str, path: Path) -> None:
        """Read training data: the first `tokens` tokens, and the held-out answers."""
        training, held = split(read_examples([path], self.codec, max_length=2048), HELD_OUT)
        ends = itertools.accumulate(len(example.response_ids) for example in training)
        self.examples[name] = [example for example, end in zip(training, ends, strict=True) if end <= self.tokens]
        self.examples[f"{name}, held out"] = held

    def answers(self, name: str, arm: Arm) -> Answers:
        """Answers with the hidden states that an arm reads, which are computed once."""
        layers = arm.layers
        if (name, layers) not in self.found:
            examples, place = self.examples[name], self.work / "-".join([name.replace(", ", "-"), *map(str, layers)])
            done = time.perf_counter()
            states = cached_hidden_states(self.model, examples, place, identity=self.identity)
            extra = _layer_states(self.model, examples, layers, place / "extra.npy") if layers else None
            click.echo(f"{name} {layers}: {len(states.next_ids)} tokens, {time.perf_counter() - done:.0f} s", err=True)
            self.found[name, layers] = Answers(states, extra)
        return replace(self.found[name, layers], earlier=arm.earlier)


@torch.no_grad()
def _layer_states(model: Any, examples: Sequence[Example], layers: tuple[int, ...], place: Path) -> np.ndarray:
    """Hidden states after some layers, each scaled to a root mean square of 1, side by side. [P, L*C]"""
    shape = (sum(len(example.response_ids) for example in examples), len(layers) * model.config.hidden_size)
    if not place.exists():
        rows = np.lib.format.open_memmap(place, "w+", np.float16, shape)
        starts = np.cumsum([0, *(len(example.response_ids) for example in examples)])
        for index, example in enumerate(examples):
            tokens = pad_right([[*example.prompt_ids, *example.response_ids[:-1]]])
            found = model.base_model(input_ids=tokens, use_cache=False, output_hidden_states=True).hidden_states
            part = [found[layer][0, len(example.prompt_ids) - 1 :].float() for layer in layers]
            scaled = [state * state.square().mean(-1, keepdim=True).rsqrt() for state in part]
            rows[starts[index] : starts[index + 1]] = torch.cat(scaled, -1).half().numpy()
    return np.lib.format.open_memmap(place, "r")


def learner_for(arm: Arm, bench: Bench, given: MedusaHeads) -> Learner:
    """The heads that an arm begins with."""
    count = len(bench.every)
    ids = set(range(count) if given.draft_ids is None else given.draft_ids) | set(range(arm.common))
    lm_head = lm_head_of(bench.model, DTYPE, torch.tensor(sorted(ids)))
    config: HeadsConfig = given.config
    heads = MedusaHeads(config) if arm.starts_new else copy.deepcopy(given)
    return Learner(arm, heads.float(), lm_head, arm.num_beside * config.hidden_size)


def fit(arm: Arm, learner: Learner, answers: Answers, seed: int = 0) -> float:
    """Train one pass. Returns the mean loss of the first head over the last tenth."""
    states, num_heads = answers.states, learner.heads.config.num_heads
    known = {id(parameter) for parameter in learner.heads.parameters()}
    added = [parameter for parameter in learner.parameters() if id(parameter) not in known]
    groups: list[dict[str, Any]] = [{"params": list(learner.heads.parameters())}]
    if added:
        groups.append({"params": added, "lr": arm.added_rate})
    optimizer = torch.optim.AdamW(groups, lr=arm.learning_rate, weight_decay=arm.weight_decay)
    batches = row_batches(len(states.next_ids), BATCH, seed, 0, SOFT_BLOCK)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_factor(step, len(batches), WARMUP))
    generator, last = torch.Generator().manual_seed(seed), []
    for number, batch in enumerate(batches):
        with torch.autocast("cpu", torch.bfloat16, enabled=PRECISION == "bf16"):
            losses = batch_losses(arm, learner, answers, np.sort(batch), generator)
            total = weighted(losses, arm.loss_decay)
        optimizer.zero_grad()
        total.backward()
        nn.utils.clip_grad_norm_(learner.parameters(), CLIP)
        optimizer.step()
        schedule.step()
        if number >= 0.9 * len(batches):
            last.append(float(losses[0]))
    assert num_heads == len(losses)
    return float(np.mean(last))


def batch_losses(arm: Arm, learner: Learner, answers: Answers, index: np.ndarray, generator: torch.Generator) -> torch.Tensor:
    """The mean loss of each head over a batch. [K]"""
    states, lm_head, count = answers.states, learner.lm_head, learner.heads.config.num_heads
    hidden, extra = answers.rows(index, DTYPE)
    if arm.dropout:
        kept = torch.rand(hidden.shape, generator=generator) >= arm.dropout
        hidden = hidden * kept / (1 - arm.dropout)
    if arm.noise:
        size = hidden.float().square().mean(-1, keepdim=True).sqrt() * arm.noise
        hidden = hidden + (2 * torch.rand(hidden.shape, generator=generator) - 1) * size
    root_ids, targets = torch.from_numpy(states.next_ids[index]), torch.from_numpy(states.targets(index, count))
    ahead, places = np.unique(np.minimum(index[:, None] + 1 + np.arange(count), len(states.next_ids) - 1), return_inverse=True)
    with torch.no_grad():
        backbone = lm_head.distribution(answers.rows(ahead, DTYPE)[0])
    tokens, losses = lm_head.places(targets), []
    path = torch.cat([root_ids[:, None], targets], 1)  # [N, K + 1]
    roots = learner.roots(root_ids, _every(learner))
    for k in range(count):
        known = (tokens[:, k] != IGNORED).nonzero().flatten()
        wanted = backbone[torch.from_numpy(places)[known, k]] * arm.soft_targets
        wanted[torch.arange(len(known)), tokens[known, k]] += 1 - arm.soft_targets
        beside = None if roots is None else roots[known]
        logits = learner.logits(k, hidden[known], None if extra is None else extra[known], beside, path[known, k])
        losses.append(F.cross_entropy(logits, wanted, reduction="sum") / max(1, len(known)))
    return torch.stack(losses)


def _every(learner: Learner) -> torch.Tensor:
    every: torch.Tensor = learner.every
    return every


@dataclass(frozen=True)
class Guessed:
    """The heads' candidates at every row of some answers."""

    ids: np.ndarray  # [P, K, M]
    log_probs: np.ndarray  # [P, K, M]
    ranks: np.ndarray  # [P, K] of the right tokens; TOP_K for all further ranks


@torch.no_grad()
def guess(learner: Learner, answers: Answers) -> Guessed:
    """What the heads guess. Heads with a table of the token before read the right one, as below a right draft."""
    states, count = answers.states, learner.heads.config.num_heads
    token_ids = learner.lm_head.token_ids
    assert token_ids is not None
    parts = []
    for start in range(0, len(states.next_ids), ROWS):
        index = np.arange(start, min(start + ROWS, len(states.next_ids)))
        hidden, extra = answers.rows(index, DTYPE)
        root_ids, targets = torch.from_numpy(states.next_ids[index]), torch.from_numpy(states.targets(index, count))
        path, roots = torch.cat([root_ids[:, None], targets], 1), learner.roots(root_ids, _every(learner))
        with torch.autocast("cpu", torch.bfloat16, enabled=PRECISION == "bf16"):
            logits = [learner.logits(k, hidden, extra, roots, path[:, k]) for k in range(count)]
        log_probs, places = torch.stack(logits, 1).float().log_softmax(-1).topk(CANDIDATES)  # [n, K, M]
        ids = token_ids[places]
        is_right = ids == targets[..., None]
        ranks = torch.where(is_right.any(-1), is_right.int().argmax(-1), TOP_K).clamp(max=TOP_K)
        parts.append((ids.numpy(), log_probs.numpy(), ranks.masked_fill(targets < 0, NOT_VALID).numpy()))
    return Guessed(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def grown_tokens_per_step(guessed: Guessed, states: HiddenStates, ngrams: NGrams, num_nodes: int) -> float:
    """Tokens per step with trees that are made at each step, by replay."""
    num_tokens = num_steps = 0
    for start, length in zip(states.starts.tolist(), states.lengths.tolist(), strict=True):
        row, end = start, start + length
        while row < end - 1:
            last_ids = (int(states.next_ids[max(row - 1, start)]), int(states.next_ids[row]))
            depth = min(guessed.ids.shape[1], end - 1 - row)
            drafts = ngrams.grow([Root(last_ids, guessed.ids[row], guessed.log_probs[row], num_nodes, depth)])[0]
            row += 1 + _num_accepted(drafts, states.next_ids[row + 1 : end], num_nodes)
            num_steps += 1
        num_tokens += length - 1
    return num_tokens / num_steps


def _num_accepted(drafts: Any, right: np.ndarray, num_nodes: int) -> int:
    scores = drafts.log_probs.copy()
    for node in range(1, len(scores)):  # parents come before their children
        scores[node] += scores[drafts.parents[node]]
    kept = set(np.argsort(-scores, kind="stable")[:num_nodes].tolist())
    children = {(int(drafts.parents[node]), int(drafts.tokens[node])): node for node in range(1, len(scores)) if node in kept}
    node = accepted = 0
    for token in right.tolist():
        if (below := children.get((node, token))) is None:
            break
        node, accepted = below, accepted + 1
    return accepted


def judge(learner: Learner, bench: Bench, arm: Arm, held_out: str, judges: Sequence[str], ngrams: NGrams) -> dict[str, Any]:
    """Judge an arm on every set of answers."""
    learner.eval()
    searched = guess(learner, bench.answers(held_out, arm)).ranks
    trees = {nodes: best_tree(searched, nodes) for nodes in NODES}
    result: dict[str, Any] = {}
    for name in judges:
        answers = bench.answers(name, arm)
        guessed = guess(learner, answers)
        result[name] = {
            "top1": accuracies(guessed.ranks)[:, 0].round(4).tolist(),
            "fixed": {str(n): round(replay(guessed.ranks, answers.states.starts, trees[n]), 4) for n in NODES},
        }
        if not arm.pair_rank:  # a table and n-grams would count the token before twice
            grown = {str(n): round(grown_tokens_per_step(guessed, answers.states, ngrams, n), 4) for n in NODES}
            result[name]["made at each step"] = grown
    return result


def run(
    bench: Bench, arms: dict[str, Arm], given: MedusaHeads, ngrams: NGrams, judges: Sequence[str]
) -> Iterator[dict[str, Any]]:
    """Train and judge arms, one after the other."""
    for name, arm in arms.items():
        learner = learner_for(arm, bench, given)
        learner.register_buffer("every", bench.every, persistent=False)
        loss, seconds = None, time.perf_counter()
        if arm.trains:
            loss = round(fit(arm, learner, bench.answers(arm.data, arm)), 4)
        seconds = time.perf_counter() - seconds
        found = judge(learner, bench, arm, f"{arm.data}, held out", judges, ngrams)
        yield {"arm": name, "about": arm.about, "data": arm.data, "loss_of_head_1": loss, "seconds": round(seconds)} | found


def _named(pairs: tuple[str, ...]) -> dict[str, Path]:
    found = dict(pair.split("=", 1) for pair in pairs)
    return {name: Path(place) for name, place in found.items()}


@click.command()
@click.argument("model")
@click.option("--heads", type=click.Path(path_type=Path, exists=True), required=True)
@click.option("--data", multiple=True, required=True, metavar="NAME=PATH")
@click.option("--judge", "judges", multiple=True, required=True, metavar="NAME=PATH")
@click.option("--work", type=click.Path(path_type=Path), required=True, help="Directory for hidden states.")
@click.option("--tokens", default=150_000, show_default=True, help="Answer tokens of each set of data.")
@click.option("--arm", "names", multiple=True, help="Only these arms; a name of data after a colon trains on it.")
@click.option("-o", "--output", type=click.Path(path_type=Path))
def main(
    model: str,
    heads: Path,
    data: tuple[str, ...],
    judges: tuple[str, ...],
    work: Path,
    tokens: int,
    names: tuple[str, ...],
    output: Path | None,
) -> None:
    """Train heads for MODEL in several ways and compare them."""
    work.mkdir(parents=True, exist_ok=True)
    sets, judged = _named(data), _named(judges)
    bench = Bench(model, work, tokens)
    for name, place in sets.items():
        bench.read_training(name, place)
    for name, place in judged.items():
        bench.read(name, place)
    first = next(iter(sets))
    asked = [entry.partition(":") for entry in names] or [(name, "", "") for name in ARMS]
    arms = {f"{name}{colon}{of}": replace(ARMS[name], data=of or first) for name, colon, of in asked}
    given = load_heads(heads, click.echo)
    rows: list[dict[str, Any]] = json.loads(output.read_text(encoding="utf-8"))["arms"] if output and output.exists() else []
    arms = {name: arm for name, arm in arms.items() if name not in {row["arm"] for row in rows}}
    facts = environment() | {
        "tokens": {name: sum(len(e.response_ids) for e in found) for name, found in bench.examples.items()}
    }
    for row in run(bench, arms, given, NGrams.load(heads / NGRAMS_NAME), list(judged)):
        rows.append(row)
        publish(facts | {"nodes": NODES, "arms": rows}, output)


if __name__ == "__main__":
    main()
