"""A checkpoint's generation_config.json: which of its settings the runtime follows, and which it does not.

Transformers' `generate` applies these settings to every answer, also to greedy ones. The runtime follows those that its own
options can express: they go into the bundle as defaults, which a request can override. The others are kept with their values,
so that the export and the validation can report them.
"""

from __future__ import annotations

import copy
import json
from typing import Any

from transformers import GenerationConfig

from medusa_export.model.checkpoint import Backbone
from medusa_runtime.bundle.manifest import DecodingDefaults, GenerationFacts, SamplingDefaults
from medusa_runtime.errors import OptionError
from medusa_runtime.options import DecodingOptions

# For each setting, the values that have no effect. The first two groups have the names and the meaning of our options.
FOLLOWED: dict[str, tuple[Any, ...]] = {
    "repetition_penalty": (1.0,),
    "min_new_tokens": (0,),
    "suppress_tokens": ([],),
    "begin_suppress_tokens": ([],),
}
SAMPLING: dict[str, tuple[Any, ...]] = {"temperature": (1.0,), "top_k": (0,), "top_p": (1.0,), "min_p": (0.0,)}
# The runtime cannot follow these. GREEDY changes greedy decoding; OTHERS change sampling, or the place where an answer ends.
GREEDY: dict[str, tuple[Any, ...]] = {
    "encoder_repetition_penalty": (1.0,),
    "no_repeat_ngram_size": (0,),
    "encoder_no_repeat_ngram_size": (0,),
    "bad_words_ids": ([],),
    "sequence_bias": ({}, []),
    "min_length": (0,),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "exponential_decay_length_penalty": (),
    "guidance_scale": (1.0,),
    "watermarking_config": (),
    "num_beams": (1,),
    "penalty_alpha": (0.0,),
    "dola_layers": (),
    "constraints": ([],),
    "force_words_ids": ([],),
    "token_healing": (False,),
}
OTHERS: dict[str, tuple[Any, ...]] = {
    "typical_p": (1.0,),
    "epsilon_cutoff": (0.0,),
    "eta_cutoff": (0.0,),
    "top_h": (),
    "max_length": (),
    "max_new_tokens": (),
    "max_time": (),
    "stop_strings": ([],),
}
ALL = FOLLOWED | SAMPLING | GREEDY | OTHERS
TOKENS = {"suppress_tokens", "begin_suppress_tokens"}
MAX_SHOWN = 40  # characters of a value in a message


def generation_facts(backbone: Backbone) -> GenerationFacts | None:
    """A checkpoint's generation settings, sorted by what the runtime does with them. None if none has an effect."""
    config: GenerationConfig | None = backbone.model.generation_config
    if config is None:
        return None
    settings = {name: value for name, value in json.loads(config.to_json_string()).items() if value is not None}
    asked = {name for name, neutral in ALL.items() if name in settings and settings[name] not in neutral}
    usable = {name for name in asked & {*FOLLOWED, *SAMPLING} if _is_option(name, settings[name])}
    defaults = {name: settings[name] for name in usable & {*FOLLOWED}}
    for name in TOKENS & defaults.keys():
        known = backbone.facts.vocab_size  # larger ids suppress nothing
        defaults[name] = [token for token in defaults[name] if 0 <= token < known]
    if "min_new_tokens" in defaults:
        asked.discard("min_length")  # `generate` then ignores it
    sampling = {name: settings[name] for name in usable & {*SAMPLING}}
    ignored = {name: settings[name] for name in sorted(asked - usable)}
    defaults = {name: value for name, value in defaults.items() if value != []}
    if not (defaults or sampling or ignored):
        return None
    return GenerationFacts(defaults=DecodingDefaults(**defaults), sampling=SamplingDefaults(**sampling), ignored=ignored)


def switched_off(facts: GenerationFacts | None) -> list[str]:
    """The settings that the runtime does not follow and that change greedy decoding."""
    return [] if facts is None else sorted(set(facts.ignored) & {*FOLLOWED, *GREEDY})


def greedy_config(backbone: Backbone, facts: GenerationFacts | None) -> GenerationConfig:
    """A checkpoint's generation settings for greedy decoding, without those that the runtime does not follow."""
    config: GenerationConfig = copy.deepcopy(backbone.model.generation_config) or GenerationConfig()
    for name in switched_off(facts):
        setattr(config, name, None)
    if config.repetition_penalty is not None:
        config.repetition_penalty = float(config.repetition_penalty)  # transformers refuses integers
    config.do_sample = False
    return config


def describe(facts: GenerationFacts) -> str:
    """One line that says which generation settings are defaults, and which are not followed."""
    parts = {
        "default of every request": facts.defaults.model_dump(exclude_none=True),
        "default of requests that sample": facts.sampling.model_dump(exclude_none=True, exclude={"temperature"}),
        "only recorded": facts.sampling.model_dump(exclude_none=True, include={"temperature"}),
        "not followed": facts.ignored,
    }
    return "generation_config.json: " + "; ".join(f"{what}: {shown(values)}" for what, values in parts.items() if values)


def shown(settings: dict[str, Any]) -> str:
    """Settings with their values. Long values are cut."""
    texts = {name: str(value) for name, value in settings.items()}
    return ", ".join(
        f"{name} {text if len(text) <= MAX_SHOWN else text[:MAX_SHOWN] + ' …'}" for name, text in sorted(texts.items())
    )


def _is_option(name: str, value: Any) -> bool:
    """Whether a value is one that our option of the same name can have."""
    try:
        options = DecodingOptions.of(**{name: value})
    except OptionError:
        return False
    return name != "temperature" or options.is_sampled
