"""Every decoder type of Transformers: it is exported and decodes like PyTorch, or it is refused in one line before any work.

docs/architectures.md must say what is found here. Every type is exported and compared; int8 bundles and engines are made of one
type for each mechanism, since they take as long as the rest. scripts/architectures.py makes them of all.
"""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tests.support.architectures import check_type
from tests.support.architectures_page import agrees, rows_of
from tests.support.zoo import TYPES

PAGE = Path(__file__).parents[2] / "docs" / "architectures.md"
AT_LEAST = 85  # types that pass
HAS_TENSORRT = importlib.util.find_spec("tensorrt_rtx") is not None

STATES = r"layers of kind .*(linear_attention|hybrid|moe|mlp)"
REFUSED: dict[str, str] = {  # type -> what the line says; all others pass
    **dict.fromkeys(
        ("bailing_hybrid", "bamba", "falcon_h1", "granitemoehybrid", "inkling2_text", "inkling_text", "jamba", "kimi_linear"),
        STATES,
    ),
}
ONE_OF_A_MECHANISM = {
    "llama": "grouped heads, rotary positions",
    "gpt2": "learned positions, LayerNorm, biases",
    "gemma3_text": "two kinds of layers, two rotations, norms on queries and keys",
    "mixtral": "experts",
    "doge": "a mask that is made from the cache",
    "hrm_text": "layers that run several times",
}


@pytest.mark.parametrize("model_type", TYPES)
def test_a_type_decodes_like_pytorch_or_is_refused_before_work(model_type: str, tmp_path: Path) -> None:
    further = model_type in ONE_OF_A_MECHANISM
    row = check_type(model_type, tmp_path, quantize=further, engines=further and HAS_TENSORRT)
    if model_type in REFUSED:
        assert row.outcome == "refused", row.reason
        assert re.search(REFUSED[model_type], row.reason), row.reason
        assert "\n" not in row.reason
        assert row.work != "traced"
    else:
        assert row.outcome == "passes", row.reason
    assert agrees(rows_of(PAGE.read_text())[model_type], row.to_json()), "run scripts/architectures.py and commit its page"


def test_the_page_has_every_type_and_enough_pass() -> None:
    text = PAGE.read_text()
    assert rows_of(text).keys() == {*TYPES}
    assert rows_of(text[text.index("## Types that are refused") :]).keys() == REFUSED.keys()
    assert len(TYPES) - len(REFUSED) >= AT_LEAST


def test_every_type_is_one_of_transformers() -> None:
    assert len({*TYPES}) == 125
    assert {*TYPES} <= MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.keys()
