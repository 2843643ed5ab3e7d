"""The pages of `gptpl serve` in a real browser, as people use them."""

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from aiohttp import web

from tests.serving.browser import CHROMIUM, CONTROL, Browser, Loop, Page
from tests.serving.stub_server import BASE, CLASSIFIER, INSTRUCT, STORY, Stub, monitor_data, refusal

MINUS = "\N{MINUS SIGN}"

pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium or Chrome"),
    pytest.mark.slow,
]


@pytest.fixture(scope="module")
def loop() -> Iterator[Loop]:
    with Loop() as loop:
        yield loop


@pytest.fixture(scope="module")
def browser(loop: Loop, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(loop, tmp_path_factory.mktemp("chromium")) as browser:
        yield browser


@pytest.fixture(scope="module")
def served(loop: Loop) -> Iterator[tuple[Stub, str]]:
    """The stub, and its address."""
    stub = Stub()
    runner = web.AppRunner(stub.app(), access_log=None, shutdown_timeout=0.1)

    async def start() -> str:
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        host, port = runner.addresses[0][:2]
        return f"http://{host}:{port}"

    yield stub, loop.run(start())
    loop.run(runner.cleanup())


@pytest.fixture
def stub(served: tuple[Stub, str]) -> Stub:
    served[0].reset()
    return served[0]


@pytest.fixture
def address(served: tuple[Stub, str]) -> str:
    return served[1]


Open = Callable[..., Page]


@pytest.fixture
def open_page(browser: Browser, address: str) -> Iterator[Open]:
    """Opens `path` and waits for it; after the test, no tab may have logged an error or asked elsewhere."""
    pages: list[Page] = []

    def open_one(path: str = "/", **window: Any) -> Page:
        pages.append(browser.page(address + path, **window))
        if path == "/":
            pages[-1].wait(
                "document.querySelector('#start').hidden || document.querySelector('main .problem') !== null"
            )
        return pages[-1]

    yield open_one
    for page in pages:
        page.close()
        refused = "the server responded with a status of"  # what a test asked for
        assert [each for each in page.console if refused not in each and "net::ERR_" not in each] == []
        assert [
            each for each in page.requests if not each.startswith((address + "/", "data:", "about:", "blob:"))
        ] == []


def ask(page: Page, text: str) -> None:
    page.click("#chat-input")
    page.type(text)
    page.click("#chat button.go")


def wait_for_end(page: Page) -> None:
    page.wait("document.querySelector('main .problem, .said') && !document.body.classList.contains('busy')")


def answers(page: Page) -> list[str]:
    return page.texts(".assistant > .text")


def choose(page: Page, model: dict[str, Any]) -> None:
    page.run(f"""(() => {{
        const picker = document.querySelector('#model');
        picker.value = {json.dumps(model["id"])};
        picker.dispatchEvent(new Event('change'));
    }})()""")


def fits(page: Page) -> bool:
    return bool(page.run("document.documentElement.scrollWidth <= innerWidth"))


def in_view(page: Page, selector: str) -> bool:
    box = page.run(f"document.querySelector({json.dumps(selector)}).getBoundingClientRect().toJSON()")
    return bool(0 <= box["top"] < box["bottom"] <= page.run("innerHeight"))


# --- chat


def test_chat_streams_an_answer_and_keeps_the_conversation(stub: Stub, open_page: Open):
    page = open_page()
    ask(page, "Tell me about the sea.")
    page.wait("document.querySelector('.assistant .text').textContent.length > 10")
    assert len(answers(page)[0]) < len(STORY)  # it is seen while it is being written
    wait_for_end(page)
    ask(page, "And then?")
    page.wait("document.querySelectorAll('.assistant').length == 2")
    path, body = stub.asked[-1]
    assert path == "/v1/chat/completions"
    assert [each["role"] for each in body["messages"]] == ["user", "assistant", "user"]
    assert body["messages"][1]["content"] == STORY
    assert answers(page)[0] == STORY.strip()
    assert (body["temperature"], body["top_k"], body["stream"]) == (0.7, 40, True)
    assert "AI writes here" in page.text("#notice")


def test_escape_stops_and_regenerate_asks_again(stub: Stub, open_page: Open):
    stub.delay = 0.1
    page = open_page()
    page.click("#chat-input")
    page.type("Hello")
    page.press("Enter", CONTROL)
    page.wait("document.querySelector('.assistant .text').textContent.length > 5")
    page.press("Escape")
    wait_for_end(page)
    (stopped,) = answers(page)
    assert STORY.strip().startswith(stopped)
    assert 5 < len(stopped) < len(STORY.strip())
    stub.delay = 0
    page.click(".assistant button", text="Regenerate")
    wait_for_end(page)
    assert answers(page) == [STORY.strip()]
    assert [body["messages"] for _, body in stub.asked] == [[{"role": "user", "content": "Hello"}]] * 2


def test_the_last_message_can_be_changed(stub: Stub, open_page: Open):
    stub.delay = 0
    page = open_page()
    ask(page, "Helo")
    wait_for_end(page)
    page.click(".user button", text="Edit")
    page.type("Hello, you")
    page.press("Enter", CONTROL)
    page.wait("document.querySelector('.user .text').textContent.includes('Hello, you')")
    wait_for_end(page)
    assert len(stub.asked) == 2
    assert "Hello, you" in stub.asked[1][1]["messages"][0]["content"]
    assert len(answers(page)) == 1


def test_texts_are_shown_and_never_act(stub: Stub, open_page: Open):
    nasty = "<script>document.title = 'hit'</script> & <img src=x onerror=\"document.title='hit'\"> </div>"
    stub.text, stub.delay = " " + nasty, 0
    stub.info["models"] = [{**INSTRUCT, "id": nasty, "warning": nasty}, BASE]
    stub.filter = {"action": "mark", "counts": {nasty: 1}}
    page = open_page()
    ask(page, nasty)
    wait_for_end(page)
    assert page.run("document.querySelector('.user .text').textContent") == nasty
    assert answers(page) == [nasty]
    assert page.run("document.querySelectorAll('main img, main script, header img').length") == 0
    assert "hit" not in page.run("document.title").removeprefix(nasty)


def test_filter_says_what_it_did(stub: Stub, open_page: Open):
    stub.delay = 0
    stub.info["filter"] = {"rules": ["e-mail address", "word"], "prompts": True, "withholds": False}
    stub.filter = {"action": "mark", "counts": {"e-mail address": 2}}
    stub.prompt_filter = [
        {"index": 0, "action": "mark", "counts": {"word": 1}, "text": "Tell me about [word]."}
    ]
    page = open_page()
    ask(page, "Tell me about rude.")
    wait_for_end(page)
    notes = page.text(".assistant .notes")
    assert "replaced places in this text: e-mail address (2)" in notes
    assert "changed the prompt before the model read it: word (1)" in notes
    assert "Tell me about [word]." in page.texts(".assistant details")[0]
    assert "A filter is on (e-mail address, word)" in page.text("#notice")


def test_too_long_a_conversation_can_go_on_without_its_oldest_turns(stub: Stub, open_page: Open):
    stub.delay = 0
    page = open_page()
    for text in ("One", "Two"):
        ask(page, text)
        wait_for_end(page)
    too_long = "This model reads 1024 tokens, the conversation has 1300."
    stub.refusals = [refusal(web.HTTPBadRequest, too_long, "context_length_exceeded") for _ in range(2)]
    ask(page, "Three")
    page.wait("document.querySelector('main .problem')")
    assert too_long in page.text("main .problem")
    page.click("main .problem button", text="Forget the oldest turns and try again")
    page.wait("document.querySelectorAll('.forgotten').length == 2")
    wait_for_end(page)
    assert [each["content"] for each in stub.asked[-1][1]["messages"]] == ["Two", STORY, "Three"]
    assert len(answers(page)) == 3


def test_a_server_without_room_says_when_to_try_again(stub: Stub, open_page: Open):
    stub.delay = 0
    stub.refusals = [
        refusal(web.HTTPTooManyRequests, "Too many requests wait.", headers=[("Retry-After", "1")])
    ]
    page = open_page()
    ask(page, "Hello")
    page.wait("document.querySelector('main .problem')")
    assert "Too many requests wait." in page.text("main .problem")
    assert "Try again in" in page.text("main .problem button")
    assert page.run("document.querySelector('main .problem button').disabled")
    page.wait("!document.querySelector('main .problem button').disabled")
    page.click("main .problem button", text="Try again")
    page.wait("document.querySelector('main .problem') === null")
    wait_for_end(page)
    assert answers(page) == [STORY.strip()]


def test_a_broken_connection_keeps_what_has_come(stub: Stub, open_page: Open):
    stub.breaks_after = 4
    page = open_page()
    ask(page, "Hello")
    page.wait("document.querySelector('main .problem')")
    assert "The connection broke" in page.text("main .problem")
    assert STORY.strip().startswith(answers(page)[0])
    assert answers(page)[0] != ""
    assert page.text(".user .text") == "Hello"
    stub.breaks_after, stub.delay = None, 0
    page.click("main .problem button", text="Try again")
    page.wait("document.querySelector('main .problem') === null")
    wait_for_end(page)
    assert answers(page) == [STORY.strip()]


def test_feedback_is_sent_only_where_the_server_keeps_it(stub: Stub, open_page: Open):
    stub.delay = 0
    page = open_page()
    ask(page, "Hello")
    wait_for_end(page)
    assert page.run("document.querySelector('.rating')") is None
    stub.info["feedback"] = True
    page = open_page()
    ask(page, "Hello")
    wait_for_end(page)
    page.click(".rating button", text="Report")
    page.click("#report-comment")
    page.type("rude")
    page.click("#report-dialog button", text="Report")
    page.wait("document.querySelector('.rating').innerText.includes('Saved')")
    path, body = stub.asked[-1]
    assert path == "/feedback"
    assert body == {
        "model": INSTRUCT["id"],
        "rating": "report",
        "prompt": "Hello",
        "text": STORY,
        "comment": "rude",
    }


def test_settings_are_sent_and_kept_but_texts_are_not(stub: Stub, open_page: Open):
    stub.delay = 0
    page = open_page()
    page.click("#presets button", text="creative")
    page.click("#seed")
    page.type("7")
    page.run("document.querySelector('#top_p').select()")
    page.type("0.9")
    ask(page, "A secret")
    wait_for_end(page)
    body = stub.asked[-1][1]
    sent = {name: body.get(name) for name in ("temperature", "top_p", "top_k", "min_p", "seed")}
    assert sent == {"temperature": 1.0, "top_p": 0.9, "top_k": 60, "min_p": 0.02, "seed": 7}
    page.click(".assistant button", text="Regenerate")
    page.wait("document.querySelector('#seed').value == '8'")
    kept = page.run("JSON.stringify({...localStorage, ...sessionStorage})")
    assert "secret" not in kept
    assert "sea" not in kept
    assert "0.9" in kept
    page.click("#reset")
    assert page.run(
        "[...document.querySelectorAll('.setting input[type=number]')].map(each => each.value)"
    ) == [
        "0.7",
        "1",
        "40",
        "1",
        "256",
        "",
    ]


def test_a_key_is_asked_for_once(stub: Stub, open_page: Open):
    stub.key, stub.delay = "open sesame", 0
    page = open_page("/?")
    page.wait("document.querySelector('#key-dialog').open")
    page.click("#key")
    page.type("open sesame")
    page.press("Enter")
    page.wait("document.querySelector('#start').hidden")
    ask(page, "Hello")
    wait_for_end(page)
    assert answers(page) == [STORY.strip()]
    assert "sesame" not in page.run("JSON.stringify(localStorage)")


def test_a_server_that_is_not_ready_can_be_asked_again(stub: Stub, open_page: Open):
    stub.starting = True
    page = open_page()
    assert "The server is loading its model." in page.text("#start .problem")
    stub.starting = False
    page.click("#start button", text="Try again")
    page.wait("document.querySelector('#chat-input').offsetParent !== null")


def test_a_new_conversation_does_not_lose_the_last_one(stub: Stub, open_page: Open):
    stub.delay = 0
    page = open_page()
    ask(page, "Hello")
    wait_for_end(page)
    page.click("#chat-new")
    assert answers(page) == []
    page.click("#chat-back")
    assert answers(page) == [STORY.strip()]
    ask(page, "And then?")
    page.wait("document.querySelectorAll('.assistant').length == 2")
    assert len(stub.asked[-1][1]["messages"]) == 3


def test_screen_readers_hear_whole_sentences(stub: Stub, open_page: Open):
    stub.delay = 0
    page = open_page()
    ask(page, "Hello")
    wait_for_end(page)
    heard = page.texts("#live p")
    assert (heard[0], heard[-1]) == ("Writing.", "The answer is complete.")
    assert " ".join(heard[1:-1]).split() == STORY.split()
    assert all(each[-1] in ".;" for each in heard)
    unnamed = """[...document.querySelectorAll('button, input, select, textarea')].filter(each =>
        !each.textContent.trim() && !each.labels?.length && !each.ariaLabel).map(each => each.outerHTML)"""
    assert page.run(unnamed) == []


def test_texts_are_copied_and_exported(stub: Stub, open_page: Open):
    stub.info["models"], stub.delay = [INSTRUCT, BASE], 0
    page = open_page()
    page.let("clipboardReadWrite", "clipboardSanitizedWrite")
    page.run("""(() => {  // keep what would be written to disk
        const make = URL.createObjectURL;
        URL.createObjectURL = blob => { window.exported = blob; return make(blob); };
    })()""")
    ask(page, "Hello")
    wait_for_end(page)
    page.click("#chat-save-text")
    assert page.run("exported.text()") == f"You: Hello\n\nAI: {STORY.strip()}\n"
    page.click("#chat-save-json")
    exported = json.loads(page.run("exported.text()"))
    assert [each["content"] for each in exported["messages"]] == ["Hello", STORY]
    page.click(".user button", text="Copy")
    assert page.run("navigator.clipboard.readText()") == "Hello"
    choose(page, BASE)
    write_on(page, "Now & <then>")
    page.click("#editor-copy")
    assert page.run("navigator.clipboard.readText()") == "Now & <then>" + STORY
    page.click("#editor-save-json")
    exported = json.loads(page.run("exported.text()"))
    assert exported["text"] == "".join(each["text"] for each in exported["pieces"]) == "Now & <then>" + STORY
    assert exported["model"] == BASE["id"]


# --- editor


def write_on(page: Page, text: str) -> None:
    page.click("#text")
    page.type(text)
    page.press("Enter", CONTROL)
    page.wait("document.querySelector('#tokens > .p0')")
    wait_for_end(page)


def test_editor_colours_tokens_and_takes_an_alternative(stub: Stub, open_page: Open):
    stub.info["models"] = [BASE]
    stub.delay = 0
    page = open_page()
    write_on(page, "In winter")
    path, body = stub.asked[0]
    assert path == "/v1/completions"
    assert (body["prompt"], body["logprobs"], body["echo"]) == ("In winter", 5, False)
    assert page.texts("#tokens")[0] == "In winter" + STORY
    classes = page.run("[...document.querySelectorAll('#tokens > span')].map(each => each.className)")
    assert classes[:8] == ["you", "p0", "p1", "p2", "p3", "p4", "p5", "p0"]

    page.click("#tokens > .p2")  # the third token, " was"
    card = page.text("#card")
    assert "␣was" in card
    assert "12 %" in card
    assert page.run("document.querySelector('#card .row[disabled]').textContent").startswith("\ufffd")
    page.click("#card .row:first-of-type")  # " wind", 44 %
    page.wait("document.querySelector('#tokens > .pick')")
    wait_for_end(page)
    assert stub.asked[1][1]["prompt"] == "In winter the sea wind"
    assert page.texts("#tokens")[0] == "In winter the sea wind" + STORY
    page.click("#undo")
    assert page.texts("#tokens")[0] == "In winter" + STORY


def test_editor_by_keyboard(stub: Stub, open_page: Open):
    stub.info["models"] = [BASE]
    stub.text, stub.delay = " the sea was calm", 0
    page = open_page()
    write_on(page, "Now")
    page.press("ArrowLeft")
    page.wait("document.activeElement.textContent == ' calm' && !document.querySelector('#card').hidden")
    page.press("ArrowLeft")
    page.press("ArrowLeft")
    assert page.run("document.activeElement.textContent") == " sea"
    page.press("ArrowDown")
    assert page.run("document.querySelector('#card').contains(document.activeElement)")
    page.press("Escape")
    assert page.run("document.activeElement.textContent") == " sea"
    assert page.run("document.querySelector('#card').hidden")
    page.press("Enter")
    page.press("Enter")  # the likeliest, which is " wind"
    page.wait("document.querySelector('#tokens > .pick')")
    wait_for_end(page)
    assert stub.asked[-1][1]["prompt"] == "Now the wind"
    page.press("!")  # typing edits the text
    page.wait("!document.querySelector('#text').hidden")
    assert page.run("document.querySelector('#text').value") == "Now the wind the sea was calm!"
    page.press("Enter", CONTROL)
    wait_for_end(page)
    assert stub.asked[-1][1]["prompt"] == "Now the wind the sea was calm!"
    assert page.texts("#tokens > .you") == ["Now", "!"]  # the tokens kept their colours


def test_reroll_asks_with_the_text_before_the_token(stub: Stub, open_page: Open):
    stub.info["models"] = [BASE]
    stub.text, stub.delay = " the sea was calm", 0
    page = open_page()
    write_on(page, "Now")
    page.click("#tokens > .p2")
    page.click("#card button", text="Re-roll from here")
    page.wait("document.querySelector('#tokens').textContent == 'Now the sea the sea was calm'")
    assert stub.asked[-1][1]["prompt"] == "Now the sea"


def test_editor_loses_no_text_when_the_server_refuses(stub: Stub, open_page: Open):
    stub.info["models"] = [BASE]
    stub.delay = 0
    page = open_page()
    write_on(page, "Now")
    stub.refusals = [refusal(web.HTTPBadRequest, "top_k must be positive")]
    page.click("#tokens > .p2")
    page.click("#card button", text="Re-roll from here")
    page.wait("document.querySelector('main .problem')")
    assert "top_k must be positive" in page.text("main .problem")
    assert page.texts("#tokens")[0] == "Now" + STORY


def test_editor_without_colours_under_a_filter(stub: Stub, open_page: Open):
    stub.info["models"] = [BASE]
    stub.info["filter"] = {"rules": ["word"], "prompts": False, "withholds": False}
    stub.delay = 0
    page = open_page()
    write_on(page, "Now")
    assert "logprobs" not in stub.asked[0][1]
    assert "Colours and alternatives are off" in page.text("#editor-notes")
    assert page.texts("#tokens")[0] == "Now" + STORY


# --- classifier, and several models


def test_classifier_judges_each_line(stub: Stub, open_page: Open):
    stub.info["models"] = [CLASSIFIER]
    page = open_page()
    page.click("#texts")
    page.type("You have won a prize & <b>more</b>\n\nSee you at noon")
    page.press("Enter", CONTROL)
    page.wait("document.querySelectorAll('.judged').length == 2")
    assert stub.asked[0][1]["texts"] == ["You have won a prize & <b>more</b>", "See you at noon"]
    assert page.run("[...document.querySelectorAll('.judged .best')].map(each => each.textContent)") == [
        "spam",
        "ham",
    ]
    assert "97 %" in page.text(".judged")
    assert "AI judges here" in page.text("#notice")


def test_picker_changes_the_view_and_keeps_the_texts(stub: Stub, open_page: Open):
    stub.info["models"] = [INSTRUCT, BASE, CLASSIFIER]
    stub.delay = 0
    page = open_page()
    ask(page, "Hello")
    wait_for_end(page)
    page.click("#chat-input")
    page.type("a draft")
    choose(page, BASE)
    page.click("#text")
    page.type("typed")
    choose(page, CLASSIFIER)
    assert page.run("document.querySelector('#texts').offsetParent !== null")
    choose(page, BASE)
    assert page.run("document.querySelector('#text').value") == "typed"
    choose(page, INSTRUCT)
    assert page.run("document.querySelector('#chat-input').value") == "a draft"
    assert answers(page) == [STORY.strip()]
    page.click("#card-open")
    page.wait("document.querySelector('#card-text').textContent.includes('Trained on <b>tales</b> & more.')")


# --- windows


@pytest.mark.parametrize("path", ["/", "/monitor"])
def test_the_pages_are_whole_and_obey_the_policy(open_page: Open, path: str):
    page = open_page(path)
    attributes = """[...document.querySelectorAll('*')].flatMap(each =>
        [...each.attributes].map(each => [each.name, each.value]))"""
    for name, value in page.run(attributes):
        assert not name.startswith("on")
        assert name != "src"
        assert name != "href" or value.startswith(("/", "data:"))
    assert page.run("[...document.querySelectorAll('script, style')].every(each => each.nonce)")
    source = page.run("document.documentElement.outerHTML")
    for word in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval("):
        assert word not in source


@pytest.mark.parametrize("dark", [False, True])
def test_every_view_fits_a_phone(stub: Stub, open_page: Open, dark: bool):
    stub.delay = 0
    stub.text = STORY + " " + 60 * "unbroken"
    stub.info["feedback"] = True
    stub.info["filter"] = {"rules": ["e-mail address"], "prompts": True, "withholds": True, "changes": False}
    for model in (INSTRUCT, BASE, CLASSIFIER):
        stub.info["models"] = [{**model, "id": "a-rather-long-name-of-an-experiment/2026-11-27_09-30-00-000"}]
        page = open_page(width=360, height=640, dark=dark)
        assert fits(page)
        assert page.run("!document.querySelector('#settings details').open")
        view = {"instruct": "#chat-input", "base": "#text", "classifier": "#texts"}[str(model["kind"])]
        page.click(view)
        page.type("Hello " + 80 * "x")
        page.press("Enter", CONTROL)
        page.wait("document.querySelector('.rating')")
        assert fits(page)
        assert in_view(page, "#notice")
        assert in_view(page, "#write-on" if model is BASE else view)
        if model is not CLASSIFIER:
            page.click("#settings summary")
            assert fits(page)
        background = page.run("getComputedStyle(document.body).backgroundColor")
        assert (sum(json.loads(background.replace("rgb(", "[").replace(")", "]"))) < 200) is dark


# --- monitor


@pytest.mark.parametrize("width", [1100, 360])
def test_monitor_draws(stub: Stub, open_page: Open, width: int):
    page = open_page("/monitor", width=width)
    page.wait("document.querySelectorAll('#charts svg path').length >= 13")
    assert fits(page)
    paths = page.run("[...document.querySelectorAll('#charts path')].map(each => each.getAttribute('d'))")
    assert not any("NaN" in path or not path for path in paths)
    requests = [point["requests"] for point in stub.monitor["points"]]
    row = page.texts("#values tr:first-child > *")
    assert row == ["Requests: in each interval", *map(str, (requests[-1], min(requests), max(requests)))]
    assert "Drift: none" in page.text("#drift")
    assert "tokens36,000" in page.texts("#totals")[0]


def test_monitor_says_an_alarm_in_words_and_follows(stub: Stub, open_page: Open):
    stub.monitor = {**monitor_data(0, state="learning"), "interval_s": 0.1}
    page = open_page("/monitor")
    page.wait("!document.querySelector('#empty').hidden")
    assert "120 of 200" in page.text("#drift")
    stub.monitor = {**monitor_data(30, state="alarm"), "interval_s": 0.1}
    page.wait("document.querySelector('#drift').className == 'alarm'")
    assert "log-probability of tokens is -3.10; at the start it was -2.10" in page.text("#drift").replace(
        MINUS, "-"
    )
    assert "6.4 standard errors away, beyond the limit of 4" in page.text("#drift")
    assert page.run("document.title").startswith("Alarm")
    stub.key = "changed"
    page.wait("document.querySelector('#key-dialog').open")
