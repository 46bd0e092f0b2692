"""The default prompts of a validation: prose, lists, code, numbers, and a longer one."""

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
