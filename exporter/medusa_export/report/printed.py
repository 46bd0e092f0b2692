"""The facts of a bundle as lines and tables."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from medusa_export.report.bundle_report import BundleReport, DeviceReport
from medusa_runtime.bundle.manifest import EngineFacts, HeadFacts, Limits, QuantizationFacts, ValidationFacts

NAME_WIDTH = 12


def show(report: BundleReport, console: Console) -> None:
    """Print a bundle's facts, its files, and what is wrong with them."""
    for name, text in lines(report):
        console.print(f"{name:{NAME_WIDTH}} {text}", markup=False, soft_wrap=True)
    files = Table("file", "MB", "content", "")
    for name, found in report.files.items():
        files.add_row(escape(name), f"{found.size / 1e6:.2f}", found.role, "" if found.problem is None else "[red]DIFFERS")
    console.print(files)
    for problem in report.problems:
        console.print(f"problem: {problem}", markup=False, soft_wrap=True)


def lines(report: BundleReport) -> Iterator[tuple[str, str]]:
    """What there is to say about a bundle: a name and one line each."""
    model, tree = report.model, report.tree
    beside = sum(found.sha256 is not None for found in report.files.values())
    size = f"{report.size / 1e6:.1f} MB"
    quantised = "" if report.quantization is None else f", quantised to {report.quantization.scheme}"
    yield (
        "bundle",
        f"{report.bundle}: {report.kind}, {report.precision}{quantised}, {size} in {beside} files",
    )
    yield "digest", report.digest
    size = f"{model.num_layers} layers of {model.hidden_size}, vocabulary of {model.vocab_size}"
    heads = f"{model.num_attention_heads} attention heads, {model.num_kv_heads} of keys and values"
    yield "model", f"{model.name} ({model.architecture}): {size}, {heads}"
    yield "heads", _heads(report.heads) + (", corrected by counts of n-grams" if report.has_ngrams else "")
    yield "tree", f"{tree.nodes} nodes, {tree.depth} deep"
    yield "limits", _limits(report.limits)
    yield "text", "tokenizer and chat templates" if report.has_tokenizer else "no tokenizer: token ids in and out"
    if report.generation is not None:
        defaults = report.generation.model_dump(exclude_none=True)
        for name in ("defaults", "sampling", "ignored"):
            if asked := defaults.get(name):
                yield name, ", ".join(f"{key} {value}" for key, value in asked.items())
    if report.quantization is not None:
        yield "quantisation", _quantization(report.quantization)
    yield "validation", _validation(report.validation)
    for device, found in report.tuning.items():
        for line in _tuned(found):
            yield "tuning", f"{device}: {line}"
    if not report.tuning:
        yield "tuning", "none; measure this machine with: medusa-export tune"
    if report.engine is not None:
        yield "engine", _engine(report.engine)
    made = report.provenance
    ours = made.versions.get("medusa-export", "of unknown version")
    yield "made", f"{made.created} by medusa-export {ours}: {' '.join(made.command)}"


def _heads(heads: HeadFacts) -> str:
    guessed = "all tokens" if heads.draft_vocab_size is None else f"{heads.draft_vocab_size} tokens"
    own = "the model's LM head" if heads.shared_lm_head else "LM heads of their own"
    root = ", read the last decided token" if heads.reads_root else ""
    return f"{heads.num_heads} of {heads.num_layers} blocks with {own}, {heads.top_k} candidates each among {guessed}{root}"


def _limits(limits: Limits) -> str:
    parts = [f"{limits.max_seq_len} tokens of prompt and answer"]
    parts += [f"{limits.max_batch_size} sequences a step"] if limits.max_batch_size else ["batches as memory allows"]
    parts += [f"{limits.max_tree_nodes} nodes a tree"] if limits.max_tree_nodes else []
    parts += [f"{limits.max_prefill_tokens} prompt tokens a step"] if limits.max_prefill_tokens else []
    return ", ".join(parts)


def _quantization(facts: QuantizationFacts) -> str:
    quality = facts.quality
    said = [f"{facts.scheme} weights, {facts.activation_bits}-bit activations"]
    if facts.rotation is not None:
        said.append("rotated")
    if facts.kept_grids:
        said.append(f"{facts.kept_grids} weights keep the 4-bit values that they had")
    if "mean_kl" in quality:
        said.append(f"KL divergence from the original {quality['mean_kl']:.4f} nats on average")
    if "perplexity" in quality and "perplexity_before" in quality:
        said.append(f"perplexity {quality['perplexity_before']:.3f} → {quality['perplexity']:.3f}")
    if "same_greedy" in quality:
        said.append(f"the same greedy token at {quality['same_greedy']:.1%} of positions")
    if quality.get("tokens_per_step"):
        before = quality.get("tokens_per_step_before")
        said.append(f"{'' if before is None else f'{before:.3f} → '}{quality['tokens_per_step']:.3f} tokens a step")
    if facts.max_kl is not None:
        said.append(f"limit {facts.max_kl:g} nats")
    return ", ".join(said)


def _validation(facts: ValidationFacts) -> str:
    summary = facts.summary
    said = [facts.status.upper() if facts.status == "failed" else facts.status]
    if summary.get("max_abs") is not None:
        said.append(f"logits differ from PyTorch's by at most {float(summary['max_abs']):.2g}")
    if summary.get("greedy_tokens"):
        said.append(f"{summary['greedy_tokens']} tokens of greedy decoding compared")
    if summary.get("failed_checks"):
        said.append(f"failed: {', '.join(summary['failed_checks'])}")
    if facts.status == "not run":
        said.append("compare it with: medusa-export validate")
    return ", ".join(said)


def _tuned(device: DeviceReport) -> Iterator[str]:
    for batch in device.batches:
        measured = "" if batch.measured_speedup is None else f", measured {batch.measured_speedup:.2f}"
        tree = "no Medusa" if batch.best == "plain" or batch.nodes == 1 else f"{batch.best} tree of {batch.nodes} nodes"
        yield (
            f"batch {batch.batch_size}: {tree}, {batch.tokens_per_step:.2f} tokens a step, "
            f"{batch.tokens_per_second:.1f} tokens/s, {batch.speedup:.2f} times plain decoding predicted{measured}"
        )
    busy = "; the machine was BUSY" if device.was_quiet is False else ""
    yield f"prompt lookup {'on' if device.prompt_lookup else 'off'}{busy}"


def _engine(facts: EngineFacts) -> str:
    capabilities = ", ".join(facts.compute_capabilities)
    return f"{facts.flavor} {facts.tensorrt_version} for compute capability {capabilities}; more in: medusa-export trt inspect"
