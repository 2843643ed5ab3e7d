"""A headless Chromium, driven through the DevTools protocol."""

import asyncio
import base64
import json
import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Coroutine
from concurrent.futures import Future
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import aiohttp

T = TypeVar("T")

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--remote-debugging-port=0",
)
KEYS = {"Enter": 13, "Escape": 27, "Home": 36, "End": 35} | {
    f"Arrow{way}": 37 + i for i, way in enumerate(("Left", "Up", "Right", "Down"))
}
CONTROL = 2  # a modifier


class Loop:
    """An event loop in a thread of its own: tests are plain functions, `run` waits for a coroutine there."""

    def __enter__(self) -> Self:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def run(self, coroutine: Coroutine[Any, Any, T], *, timeout: float = 20) -> T:
        """What the coroutine returns."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(timeout)


class Browser:
    """A process of Chromium with a profile in `folder`; `page` opens a tab. Downloads are dropped."""

    def __init__(self, loop: Loop, folder: Path) -> None:
        self.loop = loop
        self._folder = folder
        self._waiting: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._sessions: dict[str, Page] = {}
        self._calls = 0

    def __enter__(self) -> Self:
        assert CHROMIUM is not None
        self._process = subprocess.Popen(
            [CHROMIUM, *FLAGS, f"--user-data-dir={self._folder}", "about:blank"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        port = self._folder / "DevToolsActivePort"
        for _ in range(600):
            if port.is_file() and len(lines := port.read_text().split()) == 2:
                break
            assert self._process.poll() is None, "Chromium ended"
            time.sleep(0.05)
        self.loop.run(self._connect(f"ws://127.0.0.1:{lines[0]}{lines[1]}"))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.loop.run(self._disconnect())
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    async def _connect(self, address: str) -> None:
        self._client = aiohttp.ClientSession()
        self._socket = await self._client.ws_connect(address, max_msg_size=0)
        self._reader = asyncio.create_task(self._read())

    async def _disconnect(self) -> None:
        await self._socket.close()
        await self._reader
        await self._client.close()

    async def _read(self) -> None:
        async for frame in self._socket:
            message = json.loads(frame.data)
            if (waiting := self._waiting.pop(message.get("id"), None)) is not None:
                waiting.set_result(message)
            elif (page := self._sessions.get(message.get("sessionId"))) is not None:
                page.heard(message["method"], message["params"])

    async def _call(self, method: str, session: str | None, parameters: dict[str, Any]) -> dict[str, Any]:
        self._calls += 1
        message = {"id": self._calls, "method": method, "params": parameters}
        self._waiting[self._calls] = asyncio.get_running_loop().create_future()
        answer = self._waiting[self._calls]
        await self._socket.send_json(message if session is None else {**message, "sessionId": session})
        result = await answer
        assert "error" not in result, (method, result["error"])
        return result["result"]

    def call(self, method: str, session: str | None = None, **parameters: Any) -> dict[str, Any]:
        """The result of a method of the protocol."""
        return self.loop.run(self._call(method, session, parameters))

    def page(self, address: str, *, width: int = 1100, height: int = 800, dark: bool = False) -> "Page":
        """A tab with the page at `address`, loaded, in a browser context of its own."""
        context = self.call("Target.createBrowserContext")["browserContextId"]
        self.call("Browser.setDownloadBehavior", behavior="deny", browserContextId=context)
        target = self.call("Target.createTarget", url="about:blank", browserContextId=context)["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        page = Page(self, session, target, context)
        self._sessions[session] = page
        page.open(address, width=width, height=height, dark=dark)
        return page


class Page:
    """A tab. `console`: errors and violations of the policy; `requests`: addresses that were asked for."""

    def __init__(self, browser: Browser, session: str, target: str, context: str) -> None:
        self._browser, self._session, self._target, self._context = browser, session, target, context
        self.console: list[str] = []
        self.requests: list[str] = []
        self._loaded: Future[None] = Future()

    def heard(self, method: str, parameters: dict[str, Any]) -> None:
        """Take an event of the protocol."""
        if method == "Network.requestWillBeSent":
            self.requests.append(parameters["request"]["url"])
        elif method == "Runtime.exceptionThrown":
            self.console.append(json.dumps(parameters["exceptionDetails"]))
        elif method == "Runtime.consoleAPICalled" and parameters["type"] in ("error", "warning", "assert"):
            self.console.append(json.dumps(parameters["args"]))
        elif method == "Log.entryAdded" and parameters["entry"]["level"] in ("error", "warning"):
            self.console.append(json.dumps(parameters["entry"]))
        elif method == "Page.loadEventFired" and not self._loaded.done():
            self._loaded.set_result(None)

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """The result of a method of the protocol, for this tab."""
        return self._browser.call(method, self._session, **parameters)

    def open(self, address: str, *, width: int, height: int, dark: bool) -> None:
        """Load an address in a window of this size."""
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=width < 600,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self._loaded = Future()
        self.call("Page.navigate", url=address)
        self._loaded.result(20)

    def let(self, *permissions: str) -> None:
        """Give the page these permissions."""
        self._browser.call(
            "Browser.grantPermissions", browserContextId=self._context, permissions=list(permissions)
        )

    def close(self) -> None:
        """Close the tab, and forget what it stored."""
        self._browser.call("Target.disposeBrowserContext", browserContextId=self._context)

    def run(self, script: str) -> Any:
        """The value of an expression of JavaScript, or of the promise that it is."""
        result = self.call(
            "Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True, userGesture=True
        )
        assert "exceptionDetails" not in result, (script, result["exceptionDetails"])
        return result["result"].get("value")

    def wait(self, script: str, *, seconds: float = 10) -> Any:
        """The value of an expression, as soon as it is neither null nor false."""
        until = time.monotonic() + seconds
        while (value := self.run(script)) in (None, False):
            assert time.monotonic() < until, f"not within {seconds} s: {script}\n{self.text('body')}"
            time.sleep(0.03)
        return value

    def text(self, selector: str) -> str:
        """The text of an element as it is seen."""
        return str(self.run(f"document.querySelector({json.dumps(selector)}).innerText"))

    def texts(self, selector: str) -> list[str]:
        """The texts of all such elements, seen or not."""
        found = f"[...document.querySelectorAll({json.dumps(selector)})]"
        return list(self.run(f"{found}.map(each => each.textContent)"))

    def click(self, selector: str, *, text: str | None = None) -> None:
        """Click the middle of the first element that is seen (and has this text) with the mouse."""
        x, y = self.wait(f"""(() => {{
            const all = [...document.querySelectorAll({json.dumps(selector)})];
            const each = all.find(each => each.offsetParent !== null
                && ({json.dumps(text)} === null || each.textContent.trim() === {json.dumps(text)}));
            if (!each) return null;
            each.scrollIntoView({{block: "nearest"}});
            const box = each.getClientRects()[0];
            return [box.x + box.width / 2, box.y + box.height / 2];
        }})()""")
        self.point(x, y)
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def point(self, x: float, y: float) -> None:
        """Move the mouse."""
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def type(self, text: str) -> None:
        """Write into what has the focus."""
        self.call("Input.insertText", text=text)

    def press(self, key: str, modifiers: int = 0) -> None:
        """Press a key, and let it go."""
        typed = {"key": key, "code": key, "modifiers": modifiers, "windowsVirtualKeyCode": KEYS.get(key, 0)}
        letter = {"text": key} if len(key) == 1 else {"text": "\r"} if key == "Enter" else {}
        self.call("Input.dispatchKeyEvent", type="keyDown", **typed, **letter)
        self.call("Input.dispatchKeyEvent", type="keyUp", **typed)

    def screenshot(self, path: Path) -> None:
        """Write what is seen as a PNG."""
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))
