"""Random verification steps, and how many of their last tokens a stop text takes back."""

from __future__ import annotations

from hypothesis import strategies as st

from medusa_runtime.decoding.stats import StepCounts


@st.composite
def steps(draw: st.DrawFn) -> StepCounts:
    """One step: some drafts at each depth, of which a path is accepted, and perhaps the bonus token."""
    drafted = draw(st.lists(st.integers(1, 9), max_size=12))
    looked_up = [draw(st.integers(0, count)) for count in drafted] if draw(st.booleans()) else []
    looked_up = looked_up if any(looked_up) else []
    num_accepted = draw(st.integers(0, len(drafted)))
    # a depth at which all drafts, or none, were looked up says whether the accepted one was
    accepted = [
        bool(looked_up) and (looked_up[depth] == drafted[depth] or (looked_up[depth] > 0 and draw(st.booleans())))
        for depth in range(num_accepted)
    ]
    has_bonus = draw(st.booleans()) or not num_accepted  # the answer's end may cut it off
    is_forced = not looked_up and bool(drafted) and draw(st.booleans())
    return StepCounts(drafted, looked_up, accepted, num_accepted + has_bonus, is_forced)


@st.composite
def steps_and_cuts(draw: st.DrawFn) -> list[tuple[StepCounts, int]]:
    """Steps, each with the number of its tokens that a stop text takes back: fewer than it gave."""
    return [(step, draw(st.integers(0, step.num_given - 1))) for step in draw(st.lists(steps(), max_size=12))]
