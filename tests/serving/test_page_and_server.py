"""The page in a real browser, with a real server and real models behind it."""

from collections.abc import Iterator

import pytest

from gptpl.filters import PersonalData
from gptpl.serving import Server, serve
from tests.serving.browser import CHROMIUM, Browser, Loop, Page

pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium or Chrome"),
    pytest.mark.slow,
]


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Loop() as loop, Browser(loop, tmp_path_factory.mktemp("chromium")) as browser:
        yield browser


@pytest.fixture(scope="module")
def server(base, instruct, spam) -> Iterator[Server]:
    with serve(base, instruct, spam, port=0, filter=None) as server:
        yield server


@pytest.fixture
def page(browser: Browser, server: Server) -> Iterator[Page]:
    page = browser.page(server.url)
    page.wait("document.querySelector('#start').hidden")
    yield page
    page.close()
    assert errors(page) == []
    assert [each for each in page.requests if not each.startswith((server.url, "data:", "blob:"))] == []


def errors(page: Page) -> list[str]:
    """What the page logged, but for the first request, which may ask for more than the context holds."""
    return [each for each in page.console if "responded with a status of 400" not in each]


def choose(page: Page, name: str) -> None:
    page.run(f"""(() => {{
        const picker = document.querySelector('#model');
        picker.value = '{name}';
        picker.dispatchEvent(new Event('change'));
    }})()""")


def greedy(page: Page) -> None:
    page.run(
        "[...document.querySelectorAll('#presets button')].find(b => b.textContent === 'greedy').click()"
    )


def test_a_text_is_written_on_and_its_tokens_show_what_else_was_likely(page, base):
    greedy(page)
    page.click("#text")
    page.type("Every effort moves")
    page.click("#write-on")
    page.wait("document.querySelectorAll('#tokens [role=option]').length > 3")
    page.wait("!document.querySelector('#write-on').hidden", seconds=30)
    text = page.run("document.querySelector('#tokens').textContent")
    expected = base.generate("Every effort moves", max_new_tokens=len(text), temperature=0)
    assert text.startswith("Every effort moves")
    assert expected.startswith(text.removeprefix("Every effort moves")[:20])


def test_a_question_is_answered(page, instruct):
    choose(page, "tuned")
    greedy(page)
    page.click("#chat-input")
    page.type("Name a colour.")
    page.click("#chat button.go")
    page.wait("document.querySelector('.assistant .text')?.textContent.length > 5")
    shown = page.run("document.querySelector('.assistant .text').textContent")
    assert instruct.respond("Name a colour.", max_new_tokens=150).startswith(shown[:5])


def test_texts_are_labelled(page, spam):
    choose(page, "spam")
    page.click("#texts")
    page.type("Win a prize now")
    page.click("#texts-form button.go")
    page.wait("document.querySelector('#judged').textContent.includes('%')")
    [expected] = spam.classify("Win a prize now")
    assert expected.label in page.text("#judged")


def test_the_monitor_shows_what_the_server_has_done(browser, server):
    server.monitor.tick()
    page = browser.page(f"{server.url}/monitor")
    page.wait("document.querySelectorAll('svg').length > 5")
    assert errors(page) == []
    page.close()


def test_the_monitor_of_a_classifier_has_no_drift(browser, spam):
    with serve(spam, port=0) as server:
        server.monitor.tick()
        page = browser.page(f"{server.url}/monitor")
        page.wait("document.querySelectorAll('svg').length > 5")
        assert page.run("document.querySelector('#drift').hidden")
        assert page.console == []
        page.close()


def test_what_the_filter_did_is_shown(browser, base):
    with serve(base, port=0, filter=PersonalData()) as server:
        page = browser.page(server.url)
        page.wait("document.querySelector('#start').hidden")
        page.click("#text")
        page.type("Write to jo@example.org")
        page.click("#write-on")
        page.wait("document.querySelector('#editor-notes').textContent.includes('e-mail address')")
        assert errors(page) == []
        page.close()
