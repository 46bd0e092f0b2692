"""`medusa-export distill` as a user types it."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result

from medusa_export.bundle.export import export_bundle
from medusa_export.cli import main
from medusa_export.command_options.export_options import ExportOptions
from medusa_heads.distill import endpoint
from medusa_heads.distill.store import AnswerStore, Row, read_facts, read_rows
from tests.support.chat_server import chat_server, completion, failure
from tests.support.cli import fails

Make = Callable[..., Path]
SHORT = ("--max-new-tokens", 6, "--max-prompt-tokens", 100, "--threads", 1, "--dtype", "fp32")
BUNDLE_SHORT = SHORT[:-2]


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No proxies and no API key; PyTorch's number of threads is restored."""
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    rows = [{"prompt": f"the fox says {n}", "source": "fox"} for n in range(5)]
    rows += [{"turns": [f"a dog {n}", "and then"], "source": "dog"} for n in range(3)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


NUM_ANSWERS = 5 + 3 * 2


def run(*words: object) -> Result:
    return CliRunner().invoke(main, ["distill", *(str(word) for word in words)])


def rows_of(path: Path) -> dict[str, Row]:
    rows = list(read_rows(path))
    assert len({row.key for row in rows}) == len(rows)
    return {row.key: row for row in rows}


def test_prompts_become_data(make_model: Make, prompts: Path, tmp_path: Path) -> None:
    result = run(make_model(), "--prompts", prompts, "-o", tmp_path / "data", *SHORT)
    assert result.exit_code == 0, result.stderr
    rows = rows_of(tmp_path / "data")
    num_tokens = sum(len(row.response_token_ids) for row in rows.values())
    assert result.stdout == f"{tmp_path / 'data'}: {NUM_ANSWERS} answers, {num_tokens} tokens\n"
    assert sorted(rows) == sorted([f"prompts-{n}.0" for n in range(1, 9)] + [f"prompts-{n}.1" for n in range(6, 9)])
    assert rows["prompts-6.1"].messages[:2] == rows["prompts-6.0"].messages
    facts = read_facts(tmp_path / "data")
    assert (facts.settings.backend, facts.settings.dtype, facts.settings.model) == ("transformers", "fp32", make_model().name)
    assert facts.sources == {"dog": 3, "fox": 5}

    again = run(make_model(), "--prompts", prompts, "-o", tmp_path / "data", *SHORT)
    assert again.stdout == result.stdout
    assert rows_of(tmp_path / "data") == rows


def test_a_base_model_goes_on_with_texts(make_model: Make, tmp_path: Path) -> None:
    """Texts from a file and such that it begins by itself; heads can be trained on them, and a bundle answers alike."""
    base = tmp_path / "base"
    shutil.copytree(make_model(), base)
    for path in (base / "chat_template.jinja", base / "tokenizer_config.json"):
        if path.exists():
            path.unlink() if path.suffix == ".jinja" else _without_template(path)
    (tmp_path / "texts.txt").write_text("the quick brown\nmany words at once\n")
    (tmp_path / "starts.txt").write_text("a fox ,\n")
    own = ("--self-prompts", 3, "--prompt-starts", tmp_path / "starts.txt")
    result = run(base, "--prompts", tmp_path / "texts.txt", *own, "-o", tmp_path / "data", *SHORT)
    assert result.exit_code == 0, result.stderr
    rows = rows_of(tmp_path / "data")
    assert all(row.messages[0]["content"].startswith("a fox ,") for key, row in rows.items() if key.startswith("self-"))
    refused = run(base, "--self-prompts", 3, "--self-turns", 2, "-o", tmp_path / "turns", *SHORT)
    assert "has no chat template, so it cannot write several turns; leave --self-turns out" in refused.stderr
    assert {"texts-1.0", "texts-2.0"} < rows.keys()
    assert any(key.startswith("self-") for key in rows)
    assert all([message["role"] for message in row.messages] == ["user", "assistant"] for row in rows.values())
    words = ("--data", tmp_path / "data", "-o", tmp_path / "heads", "--num-heads", 2, "--epochs", 1, "--max-length", 128)
    trained = CliRunner().invoke(main, ["train", *(str(word) for word in (base, *words))])
    assert trained.exit_code == 0, trained.stderr
    export_bundle(ExportOptions(str(base), tmp_path / "heads", tmp_path / "bundle"))
    result = run(tmp_path / "bundle", "--prompts", tmp_path / "texts.txt", "-o", tmp_path / "again", *BUNDLE_SHORT)
    assert result.exit_code == 0, result.stderr
    for key, row in rows_of(tmp_path / "again").items():
        assert (row.prompt_token_ids, row.response_token_ids) == (rows[key].prompt_token_ids, rows[key].response_token_ids)


def _without_template(path: Path) -> None:
    settings = json.loads(path.read_text())
    settings.pop("chat_template", None)
    path.write_text(json.dumps(settings))


@pytest.mark.parametrize("own", [0, 4])
def test_an_interrupted_run_goes_on(own, make_model: Make, prompts: Path, tmp_path: Path, monkeypatch) -> None:
    words = (make_model(), "--prompts", prompts, "--self-prompts", own, "--batch-size", 3, *SHORT, "--temperature", 0.7)
    whole = run(*words, "-o", tmp_path / "whole")
    assert whole.exit_code == 0, whole.stderr
    append = AnswerStore.append

    def interrupted_after(count: int) -> Callable[[AnswerStore, Row], None]:
        def appended(store: AnswerStore, row: Row) -> None:
            if len(store.rows) == count:
                raise KeyboardInterrupt
            append(store, row)

        return appended

    for count in (0, 4, 9):
        monkeypatch.setattr(AnswerStore, "append", interrupted_after(count))
        stopped = run(*words, "-o", tmp_path / "pieces")
        assert (stopped.exit_code, stopped.stdout) == (1, "")
        told = f"  {count} answers are in {tmp_path / 'pieces'}; run the same command again to continue"
        assert (told in stopped.stderr) == (count > 0)
        assert stopped.stderr.endswith("Aborted!\n")
    monkeypatch.setattr(AnswerStore, "append", append)
    with (tmp_path / "pieces" / "answers.jsonl").open("a") as file:
        file.write('{"key": "prompts-1')  # the line that a killed run was writing
    assert run(*words, "-o", tmp_path / "pieces").exit_code == 0
    assert rows_of(tmp_path / "pieces") == rows_of(tmp_path / "whole")


def test_a_choice_of_prompts(make_model: Make, prompts: Path, tmp_path: Path) -> None:
    words = (make_model(), "--prompts", prompts, *SHORT)
    assert run(*words, "-o", tmp_path / "mix", "--mix", "fox=2", "--mix", "d*=1").exit_code == 0
    assert sorted(row.source for row in rows_of(tmp_path / "mix").values()) == ["dog", "dog", "fox", "fox"]
    assert run(*words, "-o", tmp_path / "limit", "--limit", 3).exit_code == 0
    assert len({key.partition(".")[0] for key in rows_of(tmp_path / "limit")}) == 3


def test_a_bundle_answers_as_its_model_does(make_model: Make, make_bundle: Make, prompts: Path, tmp_path: Path) -> None:
    assert run(make_model(), "--prompts", prompts, "-o", tmp_path / "model", *SHORT).exit_code == 0
    result = run(make_bundle(), "--prompts", prompts, "-o", tmp_path / "bundle", *BUNDLE_SHORT, "--batch-size", 4)
    assert result.exit_code == 0, result.stderr
    assert rows_of(tmp_path / "bundle") == rows_of(tmp_path / "model")
    assert read_facts(tmp_path / "bundle").settings.backend == "bundle"


def test_an_endpoint_answers(make_model: Make, prompts: Path, tmp_path: Path) -> None:
    with chat_server(lambda body: completion(f"you said {body['messages'][-1]['content']}")) as server:
        words = ("--base-url", server.url, "--served-model", "tiny", "--max-new-tokens", 40)
        result = run(make_model(), "--prompts", prompts, "-o", tmp_path / "data", *words)
    assert result.exit_code == 0, result.stderr
    rows = rows_of(tmp_path / "data")
    assert len(rows) == NUM_ANSWERS
    assert rows["prompts-6.1"].messages[-1]["content"] == "you said and then"
    assert rows["prompts-6.1"].messages[1]["content"] == "you said a dog 0"
    assert {body["model"] for body in server.asked} == {"tiny"}
    settings = read_facts(tmp_path / "data").settings
    assert (settings.backend, settings.dtype) == ("endpoint", "unknown")


def test_an_endpoint_that_fails_midway_loses_nothing(make_model: Make, prompts: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(endpoint, "MAX_RETRIES", 0)
    words = (make_model(), "--prompts", prompts, "-o", tmp_path / "data", "--batch-size", 2, *SHORT[:4])
    with chat_server(lambda _: completion("yes") if len(server.asked) <= 5 else failure(401, "expired")) as server:
        fails(run(*words, "--base-url", server.url), 1, "401, expired; set OPENAI_API_KEY to a valid key")
    kept = rows_of(tmp_path / "data")
    assert len(kept) == 5
    with chat_server(lambda _: completion("yes")) as server:
        result = run(*words, "--base-url", server.url)
    assert result.exit_code == 0, result.stderr
    assert len(server.asked) == NUM_ANSWERS - 5
    assert kept.items() < rows_of(tmp_path / "data").items()
    fails(run(*words[:3], "-o", tmp_path / "none", "--base-url", server.url), 1, f"{server.url} cannot be reached (")


def test_other_settings_are_refused(make_model: Make, prompts: Path, tmp_path: Path) -> None:
    words = (make_model(), "--prompts", prompts, "-o", tmp_path / "data", *SHORT)
    assert run(*words).exit_code == 0
    before = rows_of(tmp_path / "data")
    fails(
        run(*words, "--max-new-tokens", 7), 2, "started with other settings (max_new_tokens was 6, is 7); choose another output"
    )
    fails(run(*words, "--temperature", 0.5), 2, "(temperature was 0.0, is 0.5)")
    fails(run(*words, "--limit", 3), 2, "(prompts was ")
    assert rows_of(tmp_path / "data") == before


def test_prompts_that_are_all_too_long_are_an_error(make_model: Make, prompts: Path, tmp_path: Path) -> None:
    words = (make_model(), "--prompts", prompts, "-o", tmp_path / "data", *SHORT)
    fails(run(*words, "--max-prompt-tokens", 3), 1, "no prompt was answered: all are too long")
    result = run(*words, "--max-prompt-tokens", 25)  # settings that gave nothing bind nobody
    assert result.exit_code == 0, result.stderr
    assert "prompts: too long" in result.stderr
    assert 0 < len(rows_of(tmp_path / "data")) < NUM_ANSWERS


def test_a_missing_extra_is_named(make_model: Make, prompts: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.delitem(sys.modules, "medusa_heads.distill.endpoint")
    monkeypatch.setitem(sys.modules, "openai", None)  # importing it now fails as if it were not there
    result = run(make_model(), "--prompts", prompts, "-o", tmp_path / "data", "--base-url", "http://localhost/v1")
    fails(result, 1, "openai is not installed; install it with: pip install 'medusa-export[train]'")


FILES = {
    "bad.jsonl": '{"prompt": "good"}\n{"prompt": 3}\n',
    "empty.txt": "\n\n",
    "self.txt": "one\ntwo\n",
    "again/prompts.jsonl": '{"prompt": "good"}\n',
    "other/thesis.txt": "years of work",
}


@pytest.mark.parametrize(
    ("words", "exit_code", "message"),
    [
        ("{model} -o {new}", 2, "there are no prompts; give --prompts FILE, --self-prompts N, or both"),
        ("{model} -o {new} --prompts {files}/bad.jsonl", 2, "bad.jsonl, row 2: a user's turn is 3; it must be text"),
        ("{model} -o {new} --prompts {files}/empty.txt", 2, "empty.txt has no prompts"),
        ("{model} -o {new} --prompts {files}/none.txt", 2, "none.txt cannot be read: No such file"),
        (
            "{model} -o {new} --prompts {p} --mix poems=3",
            2,
            "no prompt has the source 'poems'; the sources are: dog, fox",
        ),
        ("{model} -o {new} --prompts {p} --mix fox", 2, "'fox' is not SOURCE=N, with N at least 1"),
        ("{model} -o {new} --prompts {p} --mix fox=0", 2, "'fox=0' is not SOURCE=N"),
        ("{model} -o {new} --prompts {p} --mix =3", 2, "'=3' is not SOURCE=N"),
        (
            "{model} -o {new} --prompts {files}/self.txt --self-turns 2",
            2,
            "are for prompts that the model writes; give --self-prompts",
        ),
        (
            "{model} -o {new} --self-prompts 3 --prompt-starts {files}/none.txt",
            2,
            "none.txt cannot be read: No such file or directory",
        ),
        ("{model} -o {new} --self-prompts 3 --mix fox=3", 2, "--mix selects from --prompts, but there are none"),
        ("{model} -o {new} --prompts {p} --prompts {files}/again/prompts.jsonl", 2, "have the name 'prompts'"),
        ("{model} -o {new} --prompts {files}/self.txt --self-prompts 3", 2, "two sources of prompts have the name 'self'"),
        ("{model} -o {files}/other --prompts {p}", 2, "has other files in it; choose"),
        (
            "{model} -o {p} --prompts {p}",
            2,
            "is not a directory; choose another output",
        ),
        ("{model} -o {new} --prompts {p}", 2, "is 1280, but the model takes at most 256 tokens; lower one"),
        ("{model} -o {new} --prompts {p} --temperature 9", 2, "Invalid value for '--temperature'"),
        ("{model} -o {new} --prompts {p} --temperature nan", 2, "--temperature is nan: input should be a finite number"),
        ("{model} -o {new} --prompts {p} --device tpu", 2, "--device tpu: this machine has no such device"),
        ("{model} -o {new} --prompts {p} --backend bundle", 2, "is not one"),
        ("{model} -o {new} --prompts {p} --backend endpoint", 2, "--base-url and --backend endpoint need each other"),
        ("{model} -o {new} --prompts {p} --backend transformers --base-url http://x/v1", 2, "--base-url and --backend"),
        (
            "{model} -o {new} --prompts {p} --served-model x",
            2,
            "--served-model is only for an endpoint; give its --base-url too",
        ),
        ("{model} -o {new} --prompts {p} --base-url localhost:8000", 2, "it must be like http://localhost:8000/v1"),
        (
            "{model} -o {new} --self-prompts 3 --base-url http://x/v1",
            2,
            "--self-prompts does not work with an endpoint",
        ),
        ("{model} -o {new} --prompts {p} --base-url http://x/v1 --dtype fp16", 2, "--dtype is only for --backend transformers"),
        ("{bundle} -o {new} --self-prompts 3", 2, "--self-prompts does not work with a bundle"),
        (
            "{model} -o {new} --prompts {p} --base-url http://x/v1 --device cpu",
            2,
            "--device is only for transformers or a bundle; an endpoint chooses its own device",
        ),
        ("{bundle} -o {new} --prompts {p} --device tpu", 2, "the device is 'tpu'; there are: auto, cpu, cuda"),
        (
            "{bundle} -o {new} --prompts {p} --cuda-graphs",
            2,
            "--cuda-graphs is only for CUDA and TensorRT, but the bundle runs with ort-cpu on cpu",
        ),
        (
            "{model} -o {new} --prompts {p} --no-cuda-graphs",
            2,
            "--no-cuda-graphs are only for --backend bundle; the backend is transformers",
        ),
        ("{bundle} -o {new} --prompts {p}", 2, "is 1280, but the model takes at most 256 tokens; lower one"),
        ("/nowhere -o {new} --prompts {p}", 1, "there is no tokenizer '/nowhere'"),
        (
            "{silent} -o {new} --prompts {p} --base-url http://x/v1",
            2,
            "this model has no chat template, and an endpoint is asked in",
        ),
    ],
)
def test_bad_input_gets_one_line(
    words, exit_code, message, make_model: Make, make_bundle: Make, prompts: Path, tmp_path: Path
) -> None:
    files = tmp_path / "files"
    for name, text in FILES.items():
        (files / name).parent.mkdir(parents=True, exist_ok=True)
        (files / name).write_text(text)
    places = {"model": make_model(), "files": files, "p": prompts, "new": tmp_path / "new"}
    if "{bundle}" in words:
        places["bundle"] = make_bundle()
    if "{silent}" in words:
        from tests.support.models import tokenizer

        wordless = tokenizer()
        wordless.chat_template = None
        wordless.save_pretrained(tmp_path / "silent")
        (tmp_path / "silent" / "config.json").write_bytes((make_model() / "config.json").read_bytes())
        places["silent"] = tmp_path / "silent"
    fails(run(*words.format(**places).split()), exit_code, message)
    assert not (tmp_path / "new").exists()
    assert (files / "other" / "thesis.txt").read_text() == "years of work"
