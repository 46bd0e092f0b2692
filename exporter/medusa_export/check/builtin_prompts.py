"""The default prompts of a validation: prose, lists, code, numbers, and a longer one."""

from __future__ import annotations

import random

from medusa_runtime.text.codec import Prompt

NUM_TOKENS = 32  # of a prompt of token ids

PROMPTS = (
    "What is the capital of Portugal, and what is it known for?",
    "Write a Python function that returns the n-th Fibonacci number.",
    "A train leaves at 14:10 and arrives at 17:45. How long does the journey take? Explain each step.",
    "List five things to pack for a weekend in the mountains.",
    "Translate to French: The library opens at nine, and closes when the last reader has gone home.",
    """The history of the bicycle began in the early nineteenth century, when a German baron built a wooden machine with two
wheels in line that its rider pushed along with his feet. Pedals came later, then chains, and at last tyres filled with air,
which turned a hard and dangerous sport into a way of travelling for everyone. What should be told next?""",
)


def token_prompts(vocab_size: int) -> dict[str, list[int]]:
    """Prompts for a bundle without a tokenizer: as many as `PROMPTS`, each of the same random token ids at each call."""
    chosen = random.Random(0)  # noqa: S311 - not used for security
    return {
        f"token ids {number}": [chosen.randrange(vocab_size) for _ in range(NUM_TOKENS)]
        for number in range(1, len(PROMPTS) + 1)
    }


def label(prompt: Prompt) -> str:
    """A prompt's text, to name it in a report."""
    return prompt if isinstance(prompt, str) else "\n".join(str(message["content"]) for message in prompt)
