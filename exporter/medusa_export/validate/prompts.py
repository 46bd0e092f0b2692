"""Prompts that every validation uses unless it is given others: short and long, prose, lists, code, numbers, other scripts."""

PROMPTS = (
    "What is the capital of Portugal, and what is it known for?",
    "Write a Python function that returns the n-th Fibonacci number.",
    "A train leaves at 14:10 and arrives at 17:45. How long does the journey take? Explain each step.",
    "List five things to pack for a weekend in the mountains.",
    "Translate to French: The library opens at nine, and closes when the last reader has gone home.",
    "Summarize in one sentence: Water evaporates from the sea, rises, cools, forms clouds, and falls again as rain or snow. "
    "Rivers carry it back, and on the way it wears down mountains, feeds forests and fields, and fills the wells of cities. "
    "Without this cycle the land would be a desert, and life as we know it would not exist.",
)
