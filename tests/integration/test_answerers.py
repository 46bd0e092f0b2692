"""The backends that answer prompts for training data: slots on a Transformers model, a bundle, an endpoint."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest
import torch

from medusa_export.model.checkpoint import Backbone, load_backbone
from medusa_export.model.tokenizer import load_tokenizer
from medusa_heads.distill import slots
from medusa_heads.distill.answerer import Answer, Made, Refusal, Request
from medusa_heads.distill.bundle import BundleAnswerer, BundleCodec
from medusa_heads.distill.endpoint import EndpointAnswerer
from medusa_heads.distill.slots import SlotDecoder
from medusa_heads.errors import CheckpointError, EndpointError
from medusa_heads.tokens import CheckpointCodec
from medusa_runtime import CapacityError, MedusaLM, OptionError
from tests.support.chat_server import ChatServer, chat_server, completion, failure

Make = Callable[..., Path]
NEW_TOKENS = 16
LENGTHS = (1, 5, 23, 2, 40, 9, 9, 31, 3, 17)  # of prompts; more than there are slots


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Use one thread: tiny matrix products are slower on several."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def prompts() -> list[tuple[int, ...]]:
    generator = torch.Generator().manual_seed(0)
    return [tuple(torch.randint(2, 320, (length,), generator=generator).tolist()) for length in LENGTHS]


def requests(**settings) -> list[Request]:
    return [Request(str(n), (), prompt, **({"max_new_tokens": NEW_TOKENS} | settings)) for n, prompt in enumerate(prompts())]


def collect(answerer, wanted: Iterable[Request]) -> dict[str, Answer]:
    waiting = iter(wanted)
    told = list(answerer.answers(lambda: next(waiting, None)))
    answers = [answer for answer in told if not isinstance(answer, Made)]
    if len(answers) < len(told):  # some backends tell of their tokens as they come
        made = sum(step.num_tokens for step in told if isinstance(step, Made))
        assert made == sum(len(answer.token_ids) for answer in answers)
    by_key = {answer.request.key: answer for answer in answers}
    assert len(by_key) == len(answers)
    return by_key


def tokens(answers: dict[str, Answer]) -> list[list[int]]:
    return [answers[str(n)].token_ids for n in range(len(LENGTHS))]


def slot_decoder(model: Path, num_slots: int = 3, eos: Iterable[int] = ()) -> SlotDecoder:
    slots.register()
    backbone = load_backbone(str(model), attention=slots.ATTENTION_NAME)
    return SlotDecoder(backbone.model, backbone.layer_types, backbone.sliding_window, list(eos), num_slots)


def generated(backbone: Backbone, prompt: tuple[int, ...]) -> list[int]:
    """The tokens of Transformers' own greedy decoding."""
    row = torch.tensor([prompt])
    whole = backbone.model.generate(
        row, attention_mask=torch.ones_like(row), max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=None, pad_token_id=1
    )
    return whole[0, len(prompt) :].tolist()


@pytest.mark.parametrize(
    "model_type",
    [
        "llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "smollm3", "olmo2", "granite", "gpt2",
        "gpt_neox", "starcoder2", "stablelm", "cohere2",
    ],
)  # fmt: skip
def test_slots_answer_as_generate_does(model_type, make_model: Make) -> None:
    backbone = load_backbone(str(make_model(model_type)))
    answers = collect(slot_decoder(make_model(model_type)), requests())
    assert tokens(answers) == [generated(backbone, prompt) for prompt in prompts()]
    assert {answer.finish_reason for answer in answers.values()} == {"length"}


def test_an_answer_ends_with_its_end_of_sequence_token(make_model: Make) -> None:
    whole = tokens(collect(slot_decoder(make_model()), requests()))
    eos = {whole[0][4], whole[3][0]}
    cut = [ids[: next((place for place, token in enumerate(ids) if token in eos), NEW_TOKENS) + 1] for ids in whole]
    assert {1, NEW_TOKENS} < {len(ids) for ids in cut}  # some end at once, some never
    answers = collect(slot_decoder(make_model(), eos=eos), requests())
    assert tokens(answers) == cut
    for answer in answers.values():
        assert answer.finish_reason == ("stop" if answer.token_ids[-1] in eos else "length")


def test_requests_that_follow_from_answers_are_answered(make_model: Make) -> None:
    """A source without requests for a while, like a run in which all conversations wait for an answer."""
    waiting, decoder = requests()[:1], slot_decoder(make_model())
    num_answers = 0
    for answer in decoder.answers(lambda: waiting.pop() if waiting else None):
        if isinstance(answer, Made):
            continue
        num_answers += 1
        if num_answers < 4:
            waiting.append(Request(str(num_answers), (), (*answer.request.prompt_ids, *answer.token_ids), 5))
    assert num_answers == 4


def test_each_request_has_a_limit_of_its_own(make_model: Make) -> None:
    whole = tokens(collect(slot_decoder(make_model()), requests()))
    mixed = [Request(str(n), (), prompt, 1 + n) for n, prompt in enumerate(prompts())]
    assert tokens(collect(slot_decoder(make_model()), mixed)) == [ids[: 1 + n] for n, ids in enumerate(whole)]


def test_answers_at_a_temperature_do_not_depend_on_the_slots(make_model: Make) -> None:
    def sampled(num_slots: int, first_seed: int = 0) -> list[list[int]]:
        warm = [Request(r.key, (), r.prompt_ids, NEW_TOKENS, 0.9, first_seed + n) for n, r in enumerate(requests())]
        return tokens(collect(slot_decoder(make_model(), num_slots), warm))

    assert sampled(1) == sampled(3) == sampled(16)
    assert sampled(3) != sampled(3, first_seed=100)
    assert sampled(3) != tokens(collect(slot_decoder(make_model()), requests()))


def test_sampling_follows_the_models_probabilities(make_model: Make) -> None:
    """The first token over many seeds, against the softmax it is drawn from."""
    prompt, temperature, count = prompts()[2], 0.5, 1000
    backbone = load_backbone(str(make_model()))
    with torch.inference_mode():
        logits = backbone.model(torch.tensor([prompt])).logits[0, -1].double()
    wanted = [Request(str(seed), (), prompt, 1, temperature, seed) for seed in range(count)]
    drawn = torch.tensor([answer.token_ids[0] for answer in collect(slot_decoder(make_model(), 100), wanted).values()])
    found = torch.bincount(drawn, minlength=len(logits)) / count
    likely = logits.topk(6).indices

    def distance(temperature: float) -> float:  # over the likely tokens
        return float((found - torch.softmax(logits / temperature, -1))[likely].abs().sum())

    assert distance(temperature) < 0.1
    assert distance(1.0) > 0.2  # so it is told from another


def test_the_lowest_temperature_is_greedy(make_model: Make) -> None:
    cold = tokens(collect(slot_decoder(make_model()), requests()))
    assert tokens(collect(slot_decoder(make_model()), requests(temperature=1e-310))) == cold


def test_greedy_and_warm_requests_run_side_by_side(make_model: Make) -> None:
    cold = tokens(collect(slot_decoder(make_model()), requests()))
    mixed = [Request(str(n), (), prompt, NEW_TOKENS, 1.5 * (n % 2), n) for n, prompt in enumerate(prompts())]
    found = tokens(collect(slot_decoder(make_model()), mixed))
    assert found[::2] == cold[::2]
    assert found[1::2] != cold[1::2]


def test_an_attention_that_takes_more_than_slots_give_is_refused() -> None:
    operands = (
        torch.zeros(1, 1, 1, 2),
        torch.zeros(1, 1, 1, 2),
        torch.zeros(1, 1, 1, 2),
        torch.ones(1, 1, 1, 1, dtype=torch.bool),
    )
    with pytest.raises(CheckpointError, match="cannot be decoded in slots: its attention has the extra inputs s_aux"):
        slots.slot_attention(torch.nn.Module(), *operands, s_aux=torch.zeros(1))


def test_memory_that_does_not_do_is_told(make_model: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = slot_decoder(make_model())

    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate …")

    monkeypatch.setattr(decoder, "_step", fail)
    with pytest.raises(CapacityError, match="cpu has too little memory for 3 slots; lower --batch-size"):
        collect(decoder, requests())


@pytest.mark.parametrize("batch_size", [1, 4])
def test_a_bundle_answers_as_slots_do(batch_size, make_model: Make, make_bundle: Make) -> None:
    engine = MedusaLM.from_bundle(make_bundle(), max_batch_size=batch_size).engine
    eos = engine.backend.manifest.model.eos_token_ids
    assert eos
    by_bundle = collect(BundleAnswerer(engine), requests())
    by_slots = collect(slot_decoder(make_model(), eos=eos), requests())
    assert by_bundle == by_slots


def test_a_bundle_samples_the_same_whatever_it_decodes_beside(make_bundle: Make) -> None:
    alone = MedusaLM.from_bundle(make_bundle(), max_batch_size=1).engine
    together = MedusaLM.from_bundle(make_bundle(), max_batch_size=4).engine
    warm = collect(BundleAnswerer(together), requests(temperature=0.9))
    assert warm == collect(BundleAnswerer(alone), requests(temperature=0.9))
    assert warm != collect(BundleAnswerer(alone), requests())


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_logits_that_are_no_numbers_are_an_error_and_no_answer(temperature: float, make_model: Make) -> None:
    decoder = slot_decoder(make_model(), 2)
    with torch.no_grad():
        decoder.model.base_model.norm.weight[3] = float("nan")
    asked = iter([Request("a", (), (5, 9), 4, temperature), Request("b", (), (6, 7), 4, temperature)])
    with pytest.raises(CheckpointError, match="logits that are not finite numbers in float32; use --dtype bf16 or fp32"):
        list(decoder.answers(lambda: next(asked, None)))


def test_a_bundle_does_not_prompt_itself(make_bundle: Make) -> None:
    with pytest.raises(OptionError, match="--self-prompts does not work with a bundle"):
        BundleCodec(MedusaLM.from_bundle(make_bundle()).codec).opening()


def test_both_codecs_make_the_same_of_messages(make_model: Make, make_bundle: Make) -> None:
    of_bundle = BundleCodec(MedusaLM.from_bundle(make_bundle()).codec)
    of_checkpoint = CheckpointCodec(load_tokenizer(str(make_model())))
    messages = [{"role": "user", "content": "a fox , a dog !"}, {"role": "assistant", "content": "no ."}]
    ids = of_checkpoint.encode(messages)
    assert ids == of_bundle.encode(messages)
    assert of_checkpoint.decode(ids) == of_bundle.decode(ids) == "a fox , a dog !no ."
    assert of_checkpoint.decode(of_checkpoint.opening()) == ""
    assert ids[: len(of_checkpoint.opening())] == of_checkpoint.opening()
    asked = of_checkpoint.encode([*messages, {"role": "user", "content": "a fox , a dog"}])
    begun = of_checkpoint.opening(messages, "a fox , a")
    assert asked[: len(begun)] == begun
    assert of_checkpoint.decode(begun) == "a fox , a dog !no .a fox , a"


def test_without_a_template_a_prompt_is_a_text_and_its_answer_goes_on(make_model: Make) -> None:
    tokenizer = load_tokenizer(str(make_model()))
    tokenizer.chat_template = None
    codec = CheckpointCodec(tokenizer)
    assert not codec.is_chat
    question = [{"role": "user", "content": "a fox , a"}]
    assert codec.decode(codec.encode(question)) == "a fox , a"
    whole = codec.encode([{"role": "user", "content": "a fox , a dog"}])
    answered = codec.answer_ids([*question, {"role": "assistant", "content": " dog"}])
    assert (codec.encode(question) + answered[:-1], answered[-1]) == (whole, tokenizer.eos_token_id)
    assert codec.opening() == [tokenizer.bos_token_id]
    assert codec.opening((), "a fox , a") == codec.encode(question)
    assert codec.closing() == tokenizer.eos_token_id
    several = [*question, {"role": "assistant", "content": "dog"}, *question]
    for messages in (several, [{"role": "system", "content": "be kind"}]):
        with pytest.raises(OptionError, match="has no chat template, so a prompt is one text"):
            codec.encode(messages)


@pytest.mark.parametrize(
    ("template", "closing"),
    [
        ("{% for m in messages %}<|user|>{{ m['content'] }}<|end|>\n{% endfor %}", "<|end|>"),
        ("{% for m in messages %}{{ m['content'] }}{{ eos_token }}{% endfor %}", "</s>"),
        ("{% for m in messages %}{{ m['content'] }}\n{% endfor %}", "</s>"),  # none of the template's: the tokenizer's
        ("{% for m in messages %}{{ m['content'] }}{% endfor %}", "</s>"),
    ],
)
def test_the_template_tells_what_ends_an_answer(template, closing, make_model: Make) -> None:
    tokenizer = load_tokenizer(str(make_model()))
    tokenizer.chat_template = template
    assert CheckpointCodec(tokenizer).closing() == tokenizer.convert_tokens_to_ids(closing)


SAID = "{% for m in messages %}{% if m['role'] == 'user' %}"
USER_TURNS = {  # in the forms of Mistral, Vicuna, DeepSeek-R1, OLMo 2, ChatML and Zephyr
    SAID
    + "[INST] {{ m['content'] }} [/INST]{% else %} {{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}": " [/INST] so",
    SAID + "USER: {{ m['content'] }} {% else %}ASSISTANT: {{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}": " ASSISTANT: so",
    SAID + "<|user|>{{ m['content'] }}{% else %}<|end|>{{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|end|><think>\n{% endif %}": "<|end|> so",
    SAID + "<|user|>\n{{ m['content'] }}\n{% else %}<|bot|>\n{{ m['content'] }}{{ eos_token }}\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|bot|>\n{% endif %}": "\n<|bot|>\nso",
    "{% for m in messages %}<|user|>{{ m['content'] }}<|end|>\n{% endfor %}": "<|end|>",
    "{% for m in messages %}{{ m['content'] }}{{ eos_token }}\n{% endfor %}": "</s>",
}


@pytest.mark.parametrize("template", USER_TURNS)
def test_the_template_tells_where_the_users_words_end(template, make_model: Make) -> None:
    tokenizer = load_tokenizer(str(make_model()))
    tokenizer.chat_template = template
    codec = CheckpointCodec(tokenizer)
    words, after = codec.text_ids("a fox , a dog"), codec.text_ids(USER_TURNS[template])
    told = codec.decode(words).strip()
    assert codec.user_words([*words, *after], ended=True) == told
    assert codec.user_words([*words, *after], ended=False) == told  # nor need its answer have come to an end
    assert codec.user_words(words, ended=False) is None
    begun = codec.text_ids("a fox , a")  # what was given before; the model's words go on with a space
    rest = codec.user_words([*words[len(begun) :], *after], ended=True)
    assert rest is not None
    assert rest == codec.decode(words[len(begun) :]).rstrip()
    assert codec.user_words(words, ended=True) == told


def test_a_template_without_an_end_of_the_users_words_is_refused(make_model: Make) -> None:
    tokenizer = load_tokenizer(str(make_model()))
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    with pytest.raises(OptionError, match="has nothing between the user's words and the answer"):
        CheckpointCodec(tokenizer).user_words([3, 4], ended=True)


@pytest.mark.parametrize(
    "template",
    ["{{ raise_exception('no') }}", "{{ messages[0]['content'] + 3 }}", "{{ messages[0].content.nothing.at_all }}", "{% if %}"],
)
def test_a_template_may_fail_in_any_way(template, make_model: Make) -> None:
    tokenizer = load_tokenizer(str(make_model()))
    tokenizer.chat_template = template
    codec = CheckpointCodec(tokenizer)
    for ask in (codec.opening, codec.closing, lambda: codec.encode([{"role": "user", "content": "why?"}])):
        with pytest.raises(OptionError, match="the chat template refuses"):
            ask()


# Endpoints


@pytest.fixture(autouse=True)
def _no_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)


def words(text: str) -> list[int]:
    return [int(word) for word in text.split()]


def asks(count: int, **settings) -> list[Request]:
    messages = [({"role": "user", "content": str(n)},) for n in range(count)]
    return [Request(str(n), m, (1,), **({"max_new_tokens": 8} | settings)) for n, m in enumerate(messages)]


def endpoint(server: ChatServer, batch_size: int = 4, eos: int | None = 0, max_retries: int = 0) -> EndpointAnswerer:
    return EndpointAnswerer(server.url, "tiny", words, eos, batch_size, max_retries)


def echo(body) -> tuple[int, object]:
    return completion(f"7 {body['messages'][-1]['content']}")


def test_an_endpoint_is_asked_as_the_request_says() -> None:
    with chat_server(echo) as server:
        answers = collect(endpoint(server), asks(1, temperature=0.5, seed=4_000_000_000))
    assert server.asked == [
        {
            "model": "tiny",
            "messages": [{"role": "user", "content": "0"}],
            "max_tokens": 8,
            "temperature": 0.5,
            "seed": 4_000_000_000,
        }
    ]
    assert (answers["0"].token_ids, answers["0"].finish_reason) == ([7, 0, 0], "stop")


@pytest.mark.parametrize(
    ("reply", "eos", "token_ids", "finish_reason"),
    [
        (completion("1 2 3"), 9, [1, 2, 3, 9], "stop"),
        (completion("1 2 3"), None, [1, 2, 3], "stop"),
        (completion("1 2 3", "length"), 9, [1, 2, 3], "length"),
        (completion("1 2 3 4 5 6 7"), 9, [1, 2, 3, 4, 5, 6, 7, 9], "stop"),
        (completion("1 2 3 4 5 6 7 8"), 9, [1, 2, 3, 4, 5, 6, 7, 8], "length"),  # no room for the end
        (completion("1 2 3 4 5 6 7 8 10", "length"), 9, [1, 2, 3, 4, 5, 6, 7, 8], "length"),
        (completion(""), 9, [9], "stop"),
    ],
)
def test_text_becomes_token_ids(reply, eos, token_ids, finish_reason) -> None:
    with chat_server(lambda _: reply) as server:
        [answer] = collect(endpoint(server, eos=eos), asks(1)).values()
    assert (answer.token_ids, answer.finish_reason) == (token_ids, finish_reason)


def test_as_many_requests_are_under_way_as_are_wanted() -> None:
    together = threading.Barrier(4)

    def reply(body) -> tuple[int, object]:
        together.wait(timeout=30)  # goes on only when four are there
        return echo(body)

    with chat_server(reply) as server:
        answers = collect(endpoint(server, batch_size=4), asks(12))
    assert {key: answer.token_ids for key, answer in answers.items()} == {str(n): [7, n, 0] for n in range(12)}
    assert server.most == 4


def test_the_key_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    with chat_server(echo) as server:
        collect(endpoint(server), asks(1))
        monkeypatch.setenv("OPENAI_API_KEY", "secret\n")
        collect(endpoint(server), asks(1))
    assert server.keys == {"Bearer none", "Bearer secret"}
    monkeypatch.setenv("OPENAI_API_KEY", "geheim-ü")
    with pytest.raises(OptionError, match="OPENAI_API_KEY has characters that a key cannot have"):
        EndpointAnswerer("http://localhost/v1", "tiny", words, 0)


def test_an_endpoint_that_is_busy_is_asked_again() -> None:
    with chat_server(lambda body: failure(503, "loading") if len(server.asked) == 1 else echo(body)) as server:
        answers = collect(endpoint(server, max_retries=1), asks(1))
    assert len(server.asked) == 2
    assert answers["0"].token_ids == [7, 0, 0]


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        (
            failure(401, "Incorrect key"),
            " (model 'tiny'): 401, Incorrect key; set OPENAI_API_KEY to a valid key",
        ),
        (
            failure(404, "The model `tiny` does not exist."),
            "404, The model `tiny` does not exist.; check --base-url (it usually",
        ),
        (failure(500, "broken"), "500, broken; run the same command again later"),
        (failure(429, "slow down"), "429, slow down; run the same command again later"),
        (completion(None), "gives an answer without text; start the server without parsers of reasoning or tool calls"),
        (completion("42", reasoning_content="6 times 7"), "takes the reasoning out of the answers, but heads must learn"),
        (completion(None, reasoning="6 times 7"), "takes the reasoning out of the answers, but heads must learn"),
        ((404, "<html>" + "x" * 1000), "404, <html>xxxx"),
        ((500, ""), "500, Internal Server Error; run"),
        ((200, "<html>hello</html>"), "does not answer like OpenAI's API (<html>hello</html>); check --base-url"),
        ((200, {"hello": "there"}), "does not answer like OpenAI's API"),
        ((200, {"choices": []}), "does not answer like OpenAI's API"),
        ((200, []), "does not answer like OpenAI's API"),
    ],
)
def test_an_endpoint_that_fails_is_told_in_one_line(reply, message) -> None:
    with chat_server(lambda _: reply) as server, pytest.raises(EndpointError) as caught:
        collect(endpoint(server), asks(3))
    assert str(caught.value).startswith(server.url)
    assert message in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
    assert len(str(caught.value)) < 500


def test_an_endpoint_that_is_not_there_is_told_in_one_line() -> None:
    with socket.socket() as taken:  # bound, but nobody listens
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/v1"
        with pytest.raises(EndpointError, match=rf"^{url} cannot be reached \(.*\); start the server, or check --base-url$"):
            collect(EndpointAnswerer(url, "tiny", words, 0, max_retries=0), asks(3))


@pytest.mark.parametrize(
    "url", ["localhost:8000/v1", "ftp://host/v1", "http://", "http://host:port/v1", "http://[::1/v1", "http://a b"]
)
def test_an_address_that_is_none_is_refused_at_once(url) -> None:
    with pytest.raises(OptionError, match="it must be like http://localhost:8000/v1"):
        EndpointAnswerer(url, "tiny", words, 0)


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        (failure(400, "maximum context\nlength is 8"), "400, maximum context length is 8; lower --max-prompt-tokens or --max-"),
        ((422, {"detail": [{"msg": "bad"}]}), "422, [{'msg': 'bad'}]"),
    ],
)
def test_a_request_that_is_refused_does_not_end_the_others(reply, reason) -> None:
    with chat_server(lambda body: reply if body["messages"][0]["content"] == "1" else echo(body)) as server:
        waiting = iter(asks(3))
        given = list(endpoint(server, 1).answers(lambda: next(waiting, None)))
    assert [type(answer) for answer in given] == [Answer, Refusal, Answer]
    assert isinstance(given[1], Refusal)
    assert given[1].reason.startswith(f"{server.url} refuses it: {reason}")


def test_other_numbers_of_tokens_than_the_endpoint_counts_are_told() -> None:
    def run(answer_tokens: int, prompt_tokens: int) -> list[str]:
        usage = {"prompt_tokens": prompt_tokens, "completion_tokens": answer_tokens, "total_tokens": 0}
        told: list[str] = []
        with chat_server(lambda _: completion("1 2 3", usage=usage)) as server:
            answerer = EndpointAnswerer(server.url, "tiny", words, 0, 2, 0, tell=told.append)
            waiting = iter(asks(12))
            assert len(list(answerer.answers(lambda: next(waiting, None)))) == 12
        return told

    assert run(4, 1) == run(6, 1) == []
    [told] = run(4, 9)
    assert told.startswith(
        "the endpoint counts 9 tokens in a prompt that has 1 here, and differs in all of the first 8: its chat"
    )
    with pytest.raises(EndpointError, match="has another tokenizer: it counts 999 tokens in an answer that has 4 here; give"):
        run(999, 1)


def test_answers_before_a_failure_are_given_out() -> None:
    with chat_server(lambda body: failure(401, "no") if body["messages"][0]["content"] == "5" else echo(body)) as server:
        waiting, given = iter(asks(8)), []
        with pytest.raises(EndpointError, match="refuses 5 "):
            given.extend(answer.request.key for answer in endpoint(server, 1).answers(lambda: next(waiting, None)))
    assert given == ["0", "1", "2", "3", "4"]


def test_closing_gives_up_what_is_under_way() -> None:
    release = threading.Event()

    def reply(body) -> tuple[int, object]:
        if body["messages"][0]["content"] != "0":
            release.wait(timeout=30)
        return echo(body)

    with chat_server(reply) as server:
        waiting = iter(asks(9))
        answers = endpoint(server, 3).answers(lambda: next(waiting, None))
        assert next(answers).request.key == "0"
        answers.close()  # returns though two requests have no answer yet
        release.set()
    assert len(server.asked) <= 3


@pytest.mark.parametrize("size", [1, 100, 128, 300, 1024])
def test_the_largest_logit_is_found_where_argmax_finds_it(size: int) -> None:
    """In bf16 many are equal: the first counts."""
    logits = torch.randn(64, size, generator=torch.Generator().manual_seed(size)).round(decimals=1).bfloat16()
    largest, places = slots.largest_of(logits)
    assert torch.equal(largest, logits.amax(1))
    assert torch.equal(places, torch.tensor([int((row == row.max()).nonzero()[0, 0]) for row in logits]))
    logits[5, size // 2] = torch.nan
    assert not torch.isfinite(slots.largest_of(logits)[0][5])
