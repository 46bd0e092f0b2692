"""The headings under which the help of a command shows its options."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

OTHER, ALL = "Options", "Options of all commands"
USUAL = {  # headings of every command, in the order of the help; those of a command come before them
    OTHER: (),
    "Output": ("output", "force", "json", "csv", "plot", "name", "dry_run", "full", "resolved"),
    "Where it runs": ("backend", "device", "threads", "spin", "gpus", "cuda_graphs", "allow_engine_code", "trust_remote_code"),
}
_API = {
    "Address": ("host", "port", "uds", "root_path", "served_model_name", "page"),
    "Who may use it": ("api_key_file", "trusted_host", "cors_origin"),
    "Limits": (
        "max_batch_size", "max_queue", "max_prompt_tokens", "max_body_bytes", "max_connections", "header_seconds",
        "idle_seconds", "grace",
    ),
    "Answers": ("tool_format", "reasoning_format", "special_tokens_in_text", "allow_failed"),
    "Logs and traces": ("access_log", "log_texts", "otel"),
}  # fmt: skip
_OWN: dict[str, dict[str, tuple[str, ...]]] = {
    "distill": {
        "Prompts": ("prompts", "self_prompts", "prompt_starts", "self_turns", "mix", "limit", "max_prompt_tokens"),
        "Answers": ("max_tokens", "max_new_tokens", "temperature", "prompt_temperature", "seed", "batch_size"),
        "What answers": ("backend", "base_url", "served_model", "dtype"),
    },
    "train": {
        "Data": ("data", "exclude", "held_out", "max_length", "hidden"),
        "Heads": (
            "method", "num_heads", "num_layers", "own_lm_head", "read_root", "start_from", "heads_dtype", "min_token_count",
        ),
        "Course of training": (
            "epochs", "max_steps", "batch_tokens", "gradient_accumulation", "learning_rate", "warmup", "weight_decay",
            "max_grad_norm", "loss_decay", "soft_targets", "mixed_precision", "seed", "checkpoint_every", "log_every", "work",
        ),
        "Training the model too (medusa-2)": (
            "heads_first", "backbone", "backbone_dtype", "load_in_4bit", "lora_rank", "lora_alpha", "lora_dropout",
            "heads_rate_multiple", "backbone_loss", "heads_loss_weight", "heads_loss_schedule", "save_backbone",
        ),
    },
    "heads evaluate": {
        "Data": ("model", "data", "held_out", "limit", "max_length", "hidden"),
        "Trees": ("tree", "nodes"),
    },
    "onnx": {
        "Heads and trees": ("heads", "head_top_k", "full_head_vocabulary", "tree", "tree_nodes"),
        "Graphs": ("precision", "opset", "max_seq_len"),
        "Quantisation": ("quantize", "activation_bits", "rotate", "max_kl"),
    },
    "quantize": {
        "Rounding": ("scheme", "activation_bits", "rotate", "calibration_prompts"),
        "Quality": ("quality_prompts", "quality_text", "max_kl", "reference"),
    },
    "trt build": {
        "Engines": (
            "flavor", "compute_capabilities", "weights", "strip_weights", "hardware_compatibility", "version_compatible",
        ),
        "Largest shapes": ("max_seq_len", "max_batch_size", "max_tree_nodes", "max_prefill_tokens"),
        "TensorRT": ("timing_cache", "workspace", "opt_level", "verbose"),
    },
    "tune": {
        "Acceptance": ("heads", "evaluation", "prompts", "max_new_tokens"),
        "What is tried": ("batch_sizes", "max_nodes", "lengths"),
        "How long it measures": ("quick", "max_noise", "max_seconds"),
    },
    "generate": {
        "Prompt": (
            "prompt", "raw", "chat_template", "add_generation_prompt", "continue_final_message", "plain_content",
            "max_prompt_tokens",
        ),
        "Length": (
            "max_new_tokens", "min_new_tokens", "stop", "stop_token_ids", "ignore_eos", "deadline_seconds", "max_queue_seconds",
        ),
        "Sampling": (
            "temperature", "top_k", "top_p", "min_p", "seed", "n", "repetition_penalty", "presence_penalty",
            "frequency_penalty", "logit_bias", "suppress_tokens", "begin_suppress_tokens",
        ),
        "Form of the answer": (
            "json_schema", "grammar", "regex", "choice", "skip_special_tokens", "logprobs", "prompt_logprobs",
        ),
        "Drafts": (
            "no_medusa", "tree", "tree_nodes", "prompt_lookup", "acceptance", "posterior_threshold", "posterior_alpha",
        ),
    },
    "serve": _API,
    "ray": {"Replicas": ("replicas", "num_replicas", "min_replicas", "max_replicas", "target_ongoing_requests")} | _API,
    "bench": {
        "What is measured": ("modes", "steps", "prefill", "context"),
        "Prompts": ("prompts", "limit", "max_new_tokens", "rounds"),
        "Other engines": ("peers", "peers_python", "peer_models", "checkpoint", "heads", "gguf", "openvino"),
    },
    "recipes run": {"Steps": ("only", "from", "to", "set")},
}  # fmt: skip


def in_groups(command: str, keys: Sequence[str], shared: Sequence[str]) -> dict[str, list[str]]:
    """The keys of a command's options by heading, in the order of the help. Headings without options are left out.

    Args:
        command: the command's name, such as `heads init`.
        keys: its options.
        shared: those that all commands have.
    """
    own = _OWN.get(command, {})
    left = dict.fromkeys(keys)

    def take(names: Sequence[str]) -> Iterator[str]:
        for name in names:
            if name in left:
                del left[name]
                yield name

    found = {heading: list(take(names)) for heading, names in own.items()}
    rest = {heading: list(take(names)) for heading, names in USUAL.items()}
    last = list(take(shared))
    rest[OTHER] = list(left)
    return {heading: names for heading, names in {**found, **rest, ALL: last}.items() if names}
