"""Answers on disk: written rows are kept, incomplete ones are removed, and runs are never mixed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from medusa_heads.distill.store import AnswerStore, DataFacts, Row, Settings, read_facts, read_rows
from medusa_runtime import OptionError
from medusa_runtime.bundle.manifest import Provenance

SETTINGS = Settings(
    model="tiny", tokenizer="a" * 64, backend="transformers", dtype="fp32", prompts="b" * 64, prompt_temperature=0.8,
    max_new_tokens=8, temperature=0.0, seed=0, max_prompt_tokens=32,
)  # fmt: skip


def facts(**settings: object) -> DataFacts:
    provenance = Provenance(command=["medusa-export"], versions={}, created="")
    return DataFacts(settings=SETTINGS.model_copy(update=settings), provenance=provenance)


def row(number: int, said: str = "so \u2028 it is\r\n") -> Row:
    messages = [{"role": "user", "content": "why?"}, {"role": "assistant", "content": said}]
    return Row(
        key=f"p-{number}.0", messages=messages, prompt_token_ids=[1, number], response_token_ids=[2, 3, 4], finish_reason="stop"
    )


def test_a_later_run_finds_what_an_earlier_one_wrote(tmp_path: Path) -> None:
    with AnswerStore(tmp_path / "new" / "data", facts()) as store:
        store.append(row(1))
        store.append(row(2))
    with AnswerStore(tmp_path / "new" / "data", facts()) as store:
        assert store.rows == {"p-1.0": row(1), "p-2.0": row(2)}
        assert store.num_tokens == 6
        store.append(row(3))
    assert list(read_rows(tmp_path / "new" / "data")) == [row(1), row(2), row(3)]
    assert read_facts(tmp_path / "new" / "data") == facts()


def test_each_answer_is_on_disk_at_once(tmp_path: Path) -> None:
    with AnswerStore(tmp_path, facts()) as store:
        for number in range(3):
            store.append(row(number))
            assert len(list(read_rows(tmp_path))) == number + 1


def test_a_last_line_cut_anywhere_is_removed(tmp_path: Path) -> None:
    with AnswerStore(tmp_path, facts()) as store:
        store.append(row(1, "é"))
        store.append(row(2, "日本"))
    answers = tmp_path / "answers.jsonl"
    whole = answers.read_bytes()
    first = whole.index(b"\n") + 1
    for length in range(len(whole)):
        answers.write_bytes(whole[:length])
        with AnswerStore(tmp_path, facts()) as store:
            assert list(store.rows) == (["p-1.0"] if length >= first else [])
            store.append(row(3))
        assert [kept.key for kept in read_rows(tmp_path)] == [*(["p-1.0"] if length >= first else []), "p-3.0"]


def test_a_damaged_row_is_told_by_its_number(tmp_path: Path) -> None:
    with AnswerStore(tmp_path, facts()) as store:
        store.append(row(1))
    for damaged, message in (
        (b"{}", "row 2: key: Field required"),
        (b"\xff", "row 2: row: Invalid JSON"),
        (json.dumps(row(2).model_dump() | {"extra": 1}).encode(), "row 2: extra: Extra inputs"),
    ):
        (tmp_path / "answers.jsonl").write_text(row(1).model_dump_json() + "\n")
        with (tmp_path / "answers.jsonl").open("ab") as file:
            file.write(damaged + b"\n")
        with pytest.raises(OptionError, match=message):
            AnswerStore(tmp_path, facts())


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"seed": 7}, "started with other settings (seed was 0, is 7); choose another output"),
        ({"max_new_tokens": 9, "temperature": 0.5}, "(max_new_tokens was 8, is 9; temperature was 0.0, is 0.5)"),
        ({"prompts": "b" * 11 + "c" * 53}, "(prompts was bbbbbbbbbbbb…, is bbbbbbbbbbbc…)"),
        ({"model": "other", "dtype": "bf16"}, "(model was tiny, is other; dtype was fp32, is bf16)"),
    ],
)
def test_other_settings_are_refused_with_both_values(changed, message, tmp_path: Path) -> None:
    with AnswerStore(tmp_path, facts()) as store:
        store.append(row(1))
    with pytest.raises(OptionError) as caught:
        AnswerStore(tmp_path, facts(**changed))
    assert message in str(caught.value)
    with AnswerStore(tmp_path, facts()) as store:  # and nothing was changed by it
        assert list(store.rows) == ["p-1.0"]


def test_settings_that_gave_no_answer_may_be_changed(tmp_path: Path) -> None:
    with AnswerStore(tmp_path, facts()):
        pass
    with AnswerStore(tmp_path, facts(seed=7)) as store:
        store.append(row(1))
    assert read_facts(tmp_path).settings.seed == 7


def test_one_run_writes_at_a_time(tmp_path: Path) -> None:
    with AnswerStore(tmp_path, facts()), pytest.raises(OptionError, match="is in use by another run"):
        AnswerStore(tmp_path, facts())
    with AnswerStore(tmp_path, facts()):
        pass


def test_a_directory_with_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(OptionError, match="has other files in it; choose another output"):
        AnswerStore(tmp_path, facts())
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
    with pytest.raises(OptionError, match=r"thesis\.txt is not a directory"):
        AnswerStore(tmp_path / "thesis.txt", facts())
    with pytest.raises(OptionError, match=r"thesis\.txt is not a directory"):
        AnswerStore(tmp_path / "thesis.txt" / "data", facts())


def test_what_a_killed_run_left_of_its_facts_is_no_hindrance(tmp_path: Path) -> None:
    (tmp_path / ".data.json.partial-123").write_text("{")
    with AnswerStore(tmp_path, facts()) as store:
        store.append(row(1))


def test_what_is_no_data_is_told(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"is not data of `medusa-export distill`: data\.json is missing or damaged"):
        read_facts(tmp_path)
    (tmp_path / "data.json").write_text("{}")
    with pytest.raises(OptionError, match=r"data\.json is missing or damaged"):
        AnswerStore(tmp_path, facts())
