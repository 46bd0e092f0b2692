"""Prompts: valid rows, errors for bad rows, and the selection."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from medusa_heads.distill.prompts import Conversation, read_prompts, read_starts, select, self_prompted
from medusa_runtime import OptionError


def written(directory: Path, *rows: object, name: str = "prompts.jsonl") -> Path:
    path = directory / name
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def user(*texts: str) -> tuple[tuple[dict[str, str], ...], ...]:
    return tuple(({"role": "user", "content": text},) for text in texts)


def said(*pairs: tuple[str, str]) -> dict[str, list[dict[str, str]]]:
    return {"messages": [{"role": role, "content": content} for role, content in pairs]}


@pytest.mark.parametrize(
    ("row", "turns"),
    [
        ({"prompt": "why?"}, user("why?")),
        ({"turns": ["why?", "and then?"]}, user("why?", "and then?")),
        (said(("user", "why?")), user("why?")),
        (said(("user", "why?"), ("assistant", "so."), ("user", "and then?"), ("assistant", "no.")), user("why?", "and then?")),
        (said(("assistant", "hello"), ("user", "why?")), user("why?")),
        (said(("user", "a"), ("user", "b")), (({"role": "user", "content": "a"}, {"role": "user", "content": "b"}),)),
        (
            said(("system", "be brief"), ("assistant", "hello"), ("user", "why?"), ("assistant", "so."), ("system", "longer")),
            (({"role": "system", "content": "be brief"}, {"role": "user", "content": "why?"}),),
        ),
    ],
)
def test_each_form_of_a_row_gives_what_is_said_before_each_answer(row, turns, tmp_path: Path) -> None:
    [conversation] = read_prompts(written(tmp_path, row | {"source": "here", "id": 7}))
    assert conversation == Conversation("prompts-1", turns, "here")


def test_a_text_file_holds_a_prompt_a_line(tmp_path: Path) -> None:
    path = tmp_path / "some.txt"
    path.write_bytes("\ufeffwhy?\r\n\r\n  and then?  \n".encode())
    assert read_prompts(path) == [Conversation("some-1", user("why?")), Conversation("some-3", user("and then?"))]


def test_json_may_hold_other_line_separators(tmp_path: Path) -> None:
    path = written(tmp_path, '{"prompt": "one\u2028two"}', name="UPPER.JSONL")
    assert read_prompts(path) == [Conversation("UPPER-1", user("one\u2028two"))]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{", "row 2 is not JSON (Expecting property name"),
        ('{"prompt": ' + "9" * 5000 + "}", "row 2 is not JSON (Exceeds the limit"),
        ('["why?"]', 'row 2 is not an object; a row is {"prompt"'),
        ({"text": "why?"}, 'row 2 has no prompt; a row is {"prompt"'),
        ({"turns": []}, "row 2 has no prompt"),
        ({"turns": "why?"}, "row 2 has no prompt"),
        ({"prompt": " "}, "row 2: a user's turn is ' '; it must be text"),
        ({"prompt": ["x" * 1000]}, f"row 2: a user's turn is ['{'x' * 78}; it must be text"),
        ({"turns": ["why?", None]}, "row 2: a user's turn is None; it must be text"),
        ('{"prompt": "half \\ud83d"}', "row 2: a user's turn is 'half \\ud83d'; it must be text"),
        ({"messages": "why?"}, "row 2: messages must be a list of objects with role and content"),
        ({"messages": ["why?"]}, "row 2: messages must be a list of objects"),
        (said(("human", "why?")), "row 2: the role is 'human'; it must be one of assistant, system, tool, user"),
        ({"messages": [{"role": ["user"], "content": "why?"}]}, "row 2: the role is ['user']; it must be one of"),
        ({"messages": [{"role": "user"}]}, "row 2: a user's turn is None; it must be text"),
        (said(("system", "be brief"), ("assistant", "yes")), "row 2: there is no message of a user"),
        ({"prompt": "why?", "source": 3}, "row 2: source is 3; it must be text"),
    ],
)
def test_a_bad_row_is_told_by_its_number(row, message, tmp_path: Path) -> None:
    with pytest.raises(OptionError) as caught:
        read_prompts(written(tmp_path, {"prompt": "good"}, row))
    assert f"{tmp_path / 'prompts.jsonl'}, {message}" in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_a_file_that_gives_no_prompts_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"nowhere\.txt cannot be read: No such file"):
        read_prompts(tmp_path / "nowhere.txt")
    with pytest.raises(OptionError, match="cannot be read: Is a directory"):
        read_prompts(tmp_path)
    (tmp_path / "latin.txt").write_bytes("caf\xe9".encode("latin-1"))
    with pytest.raises(OptionError, match=r"latin\.txt is not UTF-8 text"):
        read_prompts(tmp_path / "latin.txt")
    with pytest.raises(OptionError, match="has no prompts"):
        read_prompts(written(tmp_path, "", "  "))


MANY = [Conversation(f"{source}-{n}", user(str(n)), source) for source in ("maths", "code-py", "code-c", "") for n in range(20)]


def test_the_choice_is_random_and_the_same_for_the_same_seed() -> None:
    chosen = select(MANY, limit=30, seed=1)
    assert chosen == select(MANY, limit=30, seed=1)
    assert len({conversation.key for conversation in chosen}) == 30
    assert chosen != select(MANY, limit=30, seed=2)
    assert sorted(select(MANY), key=MANY.index) == MANY
    assert select(MANY) != MANY


def test_a_mix_takes_so_many_of_each_source_and_none_of_others() -> None:
    def sources(**options) -> Counter[str]:
        return Counter(conversation.source for conversation in select(MANY, **options))

    assert sources(mix={"maths": 3, "code-*": 5}) == {"maths": 3, "code-py": 5, "code-c": 5}
    assert sources(mix={"code-c": 2, "*": 4}) == {"code-c": 2, "code-py": 4, "maths": 4, "": 4}  # the first that fits counts
    assert sources(mix={"*": 4, "code-c": 2}) == {"code-c": 4, "code-py": 4, "maths": 4, "": 4}
    assert sources(mix={"maths": 1000}) == {"maths": 20}
    assert sum(sources(mix={"maths": 9, "code-c": 9}, limit=5).values()) == 5


def test_a_mix_of_an_unknown_source_is_refused() -> None:
    with pytest.raises(OptionError, match=r"no prompt has the source 'poems'; the sources are: code-c, code-py, maths$"):
        select(MANY, mix={"maths": 3, "poems": 5})
    with pytest.raises(OptionError, match=r"no prompt has the source 'poems'; the sources are: none$"):
        select([Conversation("a-1", user("why?"))], mix={"poems": 5})


def test_first_words_are_lines_that_are_no_comments(tmp_path: Path) -> None:
    (place := tmp_path / "starts.txt").write_text(
        "# writing\n\nWrite a poem about \r\n  Summarize:\n", newline="", encoding="utf-8"
    )
    assert read_starts(place) == ["Write a poem about", "Summarize:"]
    place.write_text("# nothing\n")
    with pytest.raises(OptionError, match=r"starts.txt has no first words of prompts; each is a line of text"):
        read_starts(place)


def test_all_first_words_are_used_equally_often_in_an_order_of_the_seed() -> None:
    starts = ["a", "b", "c"]
    own = self_prompted(7, starts=starts, seed=3)
    assert sorted(Counter(conversation.start for conversation in own).values()) == [2, 2, 3]
    assert self_prompted(7, starts=starts, seed=3) == own
    assert any(self_prompted(7, starts=starts, seed=seed) != own for seed in range(5))


def test_the_starts_of_the_recipe_can_be_read() -> None:
    starts = read_starts(Path(__file__).parents[2] / "recipes" / "prompt_starts.txt")
    assert len(starts) == len(set(starts)) > 150


def test_own_prompts_have_no_turns_and_keys_that_stay() -> None:
    assert self_prompted(2) == [Conversation("self-0", (), "self"), Conversation("self-1", (), "self")]
    assert self_prompted(5)[:2] == self_prompted(2)
