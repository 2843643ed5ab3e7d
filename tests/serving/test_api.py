"""OpenAI's API: the texts are those of `LanguageModel.complete`, the shapes what openai's client reads."""

import asyncio
import shutil
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest

import gptpl.serving
from tests.serving.conftest import PROMPT, Client, repeating

MODELS = ["tale", "tuned", "spam"]


@pytest.fixture(scope="module")
def official(client: Client) -> Iterator[openai.OpenAI]:
    url = f"http://127.0.0.1:{client.port}/v1"
    with openai.OpenAI(base_url=url, api_key="none", max_retries=0) as official:
        yield official


# --- completions ----------------------------------------------------------------------------------------


def test_a_completion_is_the_text_that_the_model_writes(client, base):
    [expected] = base.complete([PROMPT], max_new_tokens=20, temperature=0)
    answer = client.complete(max_tokens=20)
    [choice] = answer["choices"]
    assert choice == {
        "index": 0,
        "text": expected.text,
        "logprobs": None,
        "finish_reason": "length" if expected.finish == "length" else "stop",
    }
    assert (answer["object"], answer["model"]) == ("text_completion", "tale")
    assert answer["usage"]["prompt_tokens"] == len(PROMPT)
    assert answer["usage"]["completion_tokens"] == len(expected.tokens)
    assert answer["usage"]["total_tokens"] == len(PROMPT) + len(expected.tokens)


def test_a_seed_gives_the_samples_that_it_gives_in_python(client, base):
    rules = {"temperature": 1.2, "top_p": 0.9, "top_k": 50, "frequency_penalty": 0.3, "presence_penalty": 0.2}
    expected = base.complete([PROMPT], max_new_tokens=12, num_samples=3, seed=5, **rules)
    answer = client.complete(n=3, seed=5, max_tokens=12, **rules)
    assert [each["text"] for each in answer["choices"]] == [each.text for each in expected]
    assert len({each.text for each in expected}) > 1


@pytest.mark.parametrize("seed", [2**32, 2**63 - 1, -1, -(2**63)])
def test_any_seed_of_64_bits_makes_a_text_reproducible(client, seed):
    texts = [
        client.complete(seed=each, max_tokens=12, temperature=1.2)["choices"][0]["text"]
        for each in (seed, seed, seed // 2 + 7)
    ]
    assert texts[0] == texts[1] != texts[2]


def test_temperature_is_one_where_nothing_is_said(client, base):
    status, answer = client.post("/v1/completions", {"prompt": PROMPT, "seed": 3, "max_tokens": 16})
    assert status == 200
    [expected] = base.complete([PROMPT], max_new_tokens=16, seed=3, temperature=1.0, top_k=None)
    assert answer["choices"][0]["text"] == expected.text


def test_many_at_a_time_get_what_each_gets_alone(client, base):
    prompts = [f"{PROMPT} {number} " * (1 + number % 3) for number in range(24)]
    with ThreadPoolExecutor(12) as pool:
        answers = list(
            pool.map(
                lambda i: client.complete(prompts[i], max_tokens=3 + i % 9, seed=i, temperature=i % 2),
                range(24),
            )
        )
    for number, answer in enumerate(answers):
        [expected] = base.complete(
            [prompts[number]], max_new_tokens=3 + number % 9, seed=number, temperature=number % 2, top_k=None
        )
        assert answer["choices"][0]["text"] == expected.text


def test_a_stream_is_the_same_text_in_pieces(client):
    body = {"prompt": [PROMPT, "Ja"], "n": 2, "max_tokens": 9, "temperature": 0.8, "seed": 4}
    whole = client.complete(**body)
    events, ended = client.stream("/v1/completions", body | {"stream_options": {"include_usage": True}})
    assert ended
    *events, last = events
    assert (last["choices"], last["usage"]) == ([], whole["usage"])
    texts, reasons = dict.fromkeys(range(4), ""), {}
    for event in events:
        [choice] = event["choices"]
        texts[choice["index"]] += choice["text"]
        if choice["finish_reason"]:
            reasons[choice["index"]] = choice["finish_reason"]
    assert texts == {each["index"]: each["text"] for each in whole["choices"]}
    assert reasons == {each["index"]: each["finish_reason"] for each in whole["choices"]}
    assert len(events) > 8


def test_several_prompts_as_texts_and_as_tokens(client, base):
    texts = client.complete([PROMPT, "Ja"], max_tokens=5)["choices"]
    tokens = client.complete([list(PROMPT.encode()), list(b"Ja")], max_tokens=5)["choices"]
    one = client.complete(list(b"Ja"), max_tokens=5)["choices"]
    assert texts == tokens
    assert [texts[1]["text"]] == [one[0]["text"]]
    assert [each["text"] for each in texts] == [
        each.text for each in base.complete([PROMPT, "Ja"], max_new_tokens=5, temperature=0)
    ]


def test_an_empty_prompt_begins_a_text(client, base):
    expected = base.generate("", max_new_tokens=5, temperature=0)
    assert client.complete("", max_tokens=5)["choices"][0]["text"] == expected
    assert client.complete(None, max_tokens=5)["choices"][0]["text"] == expected
    [echoed] = client.complete("", max_tokens=5, echo=True, logprobs=0)["choices"]
    assert echoed["text"] == f"<|endoftext|>{expected}"
    assert "".join(echoed["logprobs"]["tokens"]) == echoed["text"]


def test_logprobs_and_echo_are_what_the_model_finds_in_the_text(client, base):
    [choice] = client.complete(max_tokens=6, logprobs=3, echo=True)["choices"]
    assert choice["text"].startswith(PROMPT)
    found = choice["logprobs"]
    assert "".join(found["tokens"]) == choice["text"]
    offset = 0
    for token, start in zip(found["tokens"], found["text_offset"], strict=True):
        assert start == offset
        offset += len(token)
    # `inspect` reads the text in one forward pass, after an end of text.
    prompt = client.complete(max_tokens=0, logprobs=2, echo=True)["choices"][0]
    assert (prompt["text"], prompt["finish_reason"]) == (PROMPT, "length")
    assert prompt["logprobs"]["token_logprobs"][0] is None
    assert prompt["logprobs"]["token_logprobs"] == pytest.approx(
        found["token_logprobs"][: len(PROMPT)], abs=1e-4
    )
    completion = base.complete([PROMPT], max_new_tokens=6, temperature=0, alternatives=3)[0]
    assert completion.details is not None
    assert found["token_logprobs"][len(PROMPT) :] == pytest.approx(
        [each.log_probability for each in completion.details], abs=1e-4
    )
    named = zip(found["tokens"][1:], found["top_logprobs"][1:], found["token_logprobs"][1:], strict=True)
    for token, best, own in named:
        assert best[token] == own
        assert max(best.values()) >= own - 1e-6
        assert 2 <= len(best) <= 4


def test_without_alternatives_logprobs_are_those_of_the_tokens(client):
    [choice] = client.complete(max_tokens=3, logprobs=0)["choices"]
    assert choice["logprobs"]["top_logprobs"] is None
    assert len(choice["logprobs"]["token_logprobs"]) == 3


def test_a_stop_string_ends_the_text_before_it(client):
    whole = client.complete(max_tokens=30)["choices"][0]["text"]
    stop = whole[4:6]
    cut = whole[: whole.index(stop)]
    for given in (stop, [stop, "never there"]):
        [choice] = client.complete(max_tokens=30, stop=given, logprobs=0)["choices"]
        assert (choice["text"], choice["finish_reason"]) == (cut, "stop")
        assert "".join(choice["logprobs"]["tokens"]).startswith(cut)


def test_a_bias_decides(client):
    [choice] = client.complete(max_tokens=4, logit_bias={str(ord("q")): 100})["choices"]
    assert choice["text"] == "qqqq"


def test_what_asks_for_nothing_is_accepted(client):
    body = {"model": "tuned", "messages": [{"role": "user", "content": "x"}], "max_tokens": 2}
    nothing: dict[str, Any] = {
        "tools": [],
        "functions": None,
        "tool_choice": "none",
        "parallel_tool_calls": False,
    }
    more = {"reasoning_effort": "low", "modalities": ["text"], "top_logprobs": 0, "logprobs": False}
    assert client.post("/v1/chat/completions", body | nothing | more)[0] == 200
    for asked in ({"tools": [{"type": "function"}]}, {"tool_choice": "auto"}, {"modalities": ["audio"]}):
        assert client.refused("/v1/chat/completions", body | asked)[0] == 400


def test_what_changes_no_text_is_accepted(client):
    same = client.complete(max_tokens=3)["choices"]
    given = {
        "user": "me",
        "metadata": {"a": "b"},
        "store": False,
        "best_of": 1,
        "suffix": None,
        "top_k": -1,
        "n": None,
    }
    assert client.complete(max_tokens=3, model="tale", **given)["choices"] == same


@pytest.mark.parametrize(
    "body, param, words",
    [
        ({"max_tokens": -1}, "max_tokens", "greater than or equal to 0, got -1"),
        ({"max_tokens": 2.5}, "max_tokens", "valid integer, got 2.5"),
        ({"max_tokens": True}, "max_tokens", "valid integer"),
        ({"max_tokens": 999}, None, "maximum context length is 160 tokens, the request needs"),
        ({"prompt": "x" * 200}, None, "maximum context length is 160 tokens, the request needs 216: 200 of"),
        ({"prompt": []}, "prompt", "one text or 1 to 128"),
        ({"prompt": [1, "a"]}, "prompt", "prompt"),
        ({"prompt": [99999]}, None, "99999"),
        ({"prompt": [-1]}, None, "-1"),
        ({"prompt": [[]] * 2, "max_tokens": 999}, None, "maximum context"),
        ({"prompt": ["x"] * 65}, "prompt", "up to 64 prompts, got 65"),
        ({"temperature": "hot"}, "temperature", "valid number, got 'hot'"),
        ({"temperature": -0.1}, "temperature", "greater than or equal to 0"),
        ({"top_p": 0}, "top_p", "greater than 0"),
        ({"prompt": [300, *[65] * 12], "echo": True, "logprobs": 1}, None, "300"),
        ({"stop": "x" * 501}, "stop", "at most 500"),
        ({"n": 0}, "n", "greater than or equal to 1"),
        ({"n": 9}, "n", "n must be from 1 to 4 (the server's max_rows), got 9"),
        ({"n": 2**40}, "n", "n must be from 1 to 4"),
        ({"logprobs": 99}, "logprobs", "less than or equal to 20"),
        ({"stop": ""}, None, "stop must be a list of texts of at least one character"),
        ({"stop": ["a"] * 17}, "stop", "at most 16"),
        ({"stop": 3}, "stop", "stop"),
        ({"logit_bias": {"a": 1}}, "logit_bias", "token ids as keys"),
        ({"logit_bias": {"9999": 1}}, None, "logit_bias must hold token ids from 0"),
        ({"logit_bias": {"1": 101}}, "logit_bias", "less than or equal to 100"),
        ({"best_of": 2}, "best_of", "best_of must equal n, got 2"),
        ({"suffix": "x"}, "suffix", "suffix"),
        ({"tempperature": 1}, "tempperature", "unknown parameter 'tempperature'"),
        ({"seed": 2**63}, "seed", "less than"),
    ],
)
def test_a_wrong_parameter_is_named(client, body, param, words):
    status, error = client.refused("/v1/completions", {"prompt": PROMPT, **body})
    assert status == 400
    assert (error["type"], error["param"]) == ("invalid_request_error", param)
    assert words in error["message"]


def test_a_text_too_long_has_openai_s_code(client):
    _, error = client.refused("/v1/completions", {"prompt": PROMPT, "max_tokens": 500})
    assert (error["code"], error["room"]) == ("context_length_exceeded", 160 - len(PROMPT))
    assert client.complete(max_tokens=error["room"])
    assert client.refused("/v1/completions", {"prompt": "x" * 200})[1]["room"] == 0


def test_an_unknown_model_is_not_found(client):
    status, error = client.refused("/v1/completions", {"prompt": PROMPT, "model": "tall"})
    assert (status, error["code"], error["param"]) == (404, "model_not_found", "model")
    assert "tale, tuned, spam" in error["message"]


@pytest.mark.parametrize("path", ["/v1/nothing", "/nothing"])
def test_an_unknown_path_is_not_found(client, path):
    assert client.refused(path, {})[0] == 404


def test_a_wrong_method_is_refused(client):
    status, answer = client.get("/v1/completions")
    assert status == 405
    assert "Method Not Allowed" in answer["error"]["message"]


# --- conversations --------------------------------------------------------------------------------------


def test_a_chat_is_answered_as_gptpl_respond_answers(client, instruct):
    expected = instruct.respond("Name a colour.", max_new_tokens=20)
    messages = [{"role": "user", "content": "Name a colour."}]
    body = {"model": "tuned", "messages": messages, "max_tokens": 20, "temperature": 0}
    status, answer = client.post("/v1/chat/completions", body)
    assert status == 200
    [choice] = answer["choices"]
    assert choice["message"] == {"role": "assistant", "content": expected, "refusal": None}
    assert answer["object"] == "chat.completion"
    parts = [{"type": "text", "text": "Name a "}, {"type": "text", "text": "colour."}]
    body["messages"] = [{"role": "user", "content": parts}]
    assert client.post("/v1/chat/completions", body)[1]["choices"] == [choice]
    events, ended = client.stream("/v1/chat/completions", body)
    assert ended
    assert events[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert events[0]["object"] == "chat.completion.chunk"
    assert "".join(each["choices"][0]["delta"].get("content", "") for each in events).strip() == expected


def test_earlier_turns_and_the_system_stand_before_the_question(client, instruct):
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "One?"},
        {"role": "assistant", "content": "Two. "},
        {"role": "user", "content": "Three?"},
    ]
    body = {"model": "tuned", "messages": messages, "max_tokens": 9, "temperature": 0}
    status, answer = client.post("/v1/chat/completions", body)
    assert status == 200
    ask = instruct.template.prompt
    prompt = f"Be brief.\n\n{ask('One?')}Two.\n\n{ask('Three?')}"
    text = client.complete(prompt, model="tuned", max_tokens=9)["choices"][0]["text"]
    assert answer["choices"][0]["message"]["content"] == text.strip()
    assert answer["usage"]["prompt_tokens"] == len(prompt)


def test_a_chat_without_a_limit_may_fill_the_context(client):
    body = {"model": "tuned", "messages": [{"role": "user", "content": "Go on"}], "temperature": 0}
    status, answer = client.post("/v1/chat/completions", body)
    assert status == 200
    if answer["choices"][0]["finish_reason"] == "length":
        assert answer["usage"]["total_tokens"] == 160
    body["messages"] = [{"role": "user", "content": "Go on " * 40}]
    assert client.refused("/v1/chat/completions", body)[1]["code"] == "context_length_exceeded"


def test_logprobs_of_a_chat(client):
    body = {
        "model": "tuned",
        "messages": [{"role": "user", "content": "Hm"}],
        "max_tokens": 4,
        "temperature": 0,
    }
    _, answer = client.post("/v1/chat/completions", body | {"logprobs": True, "top_logprobs": 2})
    content = answer["choices"][0]["logprobs"]["content"]
    assert "".join(each["token"] for each in content).strip() == answer["choices"][0]["message"]["content"]
    for each in content:
        assert each["top_logprobs"][0]["logprob"] == pytest.approx(each["logprob"])
        assert bytes(each["bytes"]).decode() == each["token"]
    status, error = client.refused("/v1/chat/completions", body | {"top_logprobs": 2})
    assert (status, error["param"]) == (400, "top_logprobs")


@pytest.mark.parametrize(
    "messages",
    [
        [],
        [{"role": "assistant", "content": "x"}],
        [{"role": "user", "content": "x"}, {"role": "user", "content": "y"}],
        [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}],
        [{"role": "system", "content": "x"}],
        [{"role": "robot", "content": "x"}],
        [{"role": "user"}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x"}}]}],
        "hello",
    ],
)
def test_a_conversation_of_another_form_is_refused(client, messages):
    status, error = client.refused("/v1/chat/completions", {"model": "tuned", "messages": messages})
    assert (status, error["param"]) == (400, "messages")


def test_a_base_model_says_that_it_was_not_tuned_to_answer(client):
    body = {"model": "tale", "messages": [{"role": "user", "content": "x"}]}
    status, error = client.refused("/v1/chat/completions", body)
    assert status == 400
    assert "was not tuned to answer" in error["message"]
    assert "chat_template=" in error["message"]


def test_a_base_model_answers_in_a_template_of_the_user_s(start, base):
    template = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "<{{ m.role }}>{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}<bot>{% endif %}"
    )
    _, client = start(base, chat_template=template)
    body: dict[str, Any] = {
        "messages": [{"role": "user", "content": "Hm"}],
        "max_tokens": 5,
        "temperature": 0,
    }
    _, answer = client.post("/v1/chat/completions", body)
    text = base.generate("<user>Hm\n<bot>", max_new_tokens=5, temperature=0)
    assert answer["choices"][0]["message"]["content"] == text.strip()
    body["messages"].insert(0, {"role": "system", "content": "x"})
    status, error = client.refused("/v1/chat/completions", body)
    assert (status, error["message"]) == (400, "no system")


# --- other models and clients ---------------------------------------------------------------------------


def test_a_classifier_gives_labels(client, spam):
    texts = ["Win a prize now", "See you at six", "x" * 100]
    status, answer = client.post("/classify", {"model": "spam", "texts": texts})
    assert status == 200
    expected = spam.classify(texts)
    for found, prediction in zip(answer["data"], expected, strict=True):
        assert found["label"] == prediction.label
        assert list(found["scores"].values()) == pytest.approx(prediction.probabilities, abs=1e-6)
    assert [each["truncated"] for each in answer["data"]] == [False, False, True]
    assert client.refused("/classify", {"model": "spam", "texts": []})[0] == 400
    assert client.refused("/classify", {"model": "spam", "texts": [""]})[0] == 400
    assert "no classifier" in client.refused("/classify", {"model": "tale", "texts": ["x"]})[1]["message"]
    assert (
        "use /classify" in client.refused("/v1/completions", {"model": "spam", "prompt": "x"})[1]["message"]
    )


def test_the_models_are_listed(client):
    _, answer = client.get("/v1/models")
    assert [each["id"] for each in answer["data"]] == MODELS
    assert client.get("/v1/models/tuned")[1]["id"] == "tuned"
    assert client.get("/v1/models/none")[0] == 404
    _, info = client.get("/info")
    assert [(each["kind"], each["chat"], each["labels"]) for each in info["models"]] == [
        ("base", False, None), ("instruct", True, None), ("classifier", False, ["ham", "spam"])
    ]  # fmt: skip
    assert info["presets"]["chat"] == {"temperature": 0.7, "top_k": 40}


def test_openai_s_own_client_works_unchanged(client, official, base, instruct):
    assert [each.id for each in official.models.list()] == MODELS
    done = official.completions.create(model="tale", prompt=PROMPT, max_tokens=8, temperature=0, logprobs=2)
    assert done.choices[0].text == base.generate(PROMPT, max_new_tokens=8, temperature=0)
    assert done.choices[0].logprobs is not None
    assert done.usage is not None
    pieces = official.completions.create(
        model="tale", prompt=PROMPT, max_tokens=8, temperature=0, stream=True
    )
    assert "".join(piece.choices[0].text for piece in pieces) == done.choices[0].text
    messages: Any = [{"role": "user", "content": "Name a colour."}]
    chat = official.chat.completions.create(
        model="tuned", messages=messages, max_completion_tokens=9, temperature=0
    )
    assert chat.choices[0].message.content == instruct.respond("Name a colour.", max_new_tokens=9)
    stream = official.chat.completions.create(
        model="tuned", messages=messages, max_tokens=9, temperature=0, stream=True,
        stream_options={"include_usage": True},
    )  # fmt: skip
    chunks = list(stream)
    text = "".join(each.choices[0].delta.content or "" for each in chunks if each.choices)
    assert text.strip() == chat.choices[0].message.content
    assert chunks[-1].usage is not None
    with pytest.raises(openai.NotFoundError, match="there is no model"):
        official.completions.create(model="none", prompt="x")
    with pytest.raises(openai.BadRequestError, match="maximum context length"):
        official.completions.create(model="tale", prompt="x", max_tokens=1000)


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_curl_works(client, base):
    body = '{"model": "tale", "prompt": "Ja", "max_tokens": 4, "temperature": 0}'
    url = f"http://127.0.0.1:{client.port}/v1/completions"
    arguments = ["curl", "-sS", url, "-H", "Content-Type: application/json", "-d", body]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stderr
    assert '"object": "text_completion"' in done.stdout


def test_an_asynchronous_client_in_a_few_lines(base):
    async def ask() -> Any:
        async with gptpl.serving.client(base) as session:
            answer = await session.post("/v1/completions", json={"prompt": "Ja", "temperature": 0})
            return await answer.json()

    assert asyncio.run(ask())["choices"][0]["text"] == base.generate("Ja", max_new_tokens=16, temperature=0)


def test_a_notebook_shows_where_the_server_is(start, base):
    server, _ = start(base, names=["<tale>"])
    assert server._repr_html_() == (
        f'<a href="http://127.0.0.1:{server.port}" target="_blank">&lt;tale&gt;: http://127.0.0.1:{server.port}</a>'
    )


def test_characters_of_several_tokens_come_whole(start, base):
    model = repeating(base, "é€𝄞".encode())  # each of the nine bytes is a token
    _, client = start(model)
    events, _ = client.stream(
        "/v1/completions", {"prompt": "é€𝄞", "max_tokens": 18, "temperature": 0, "logprobs": 1}
    )
    texts = [event["choices"][0]["text"] for event in events]
    assert "".join(texts) == "é€𝄞é€𝄞"
    assert set(texts) == {"é", "€", "𝄞"}
    tokens = [token for event in events for token in event["choices"][0]["logprobs"]["tokens"]]
    assert "".join(tokens) == "é€𝄞é€𝄞"
    assert len(tokens) == 18
