"""A server that speaks the interface of `gptpl serve` with canned texts, slowly enough to be stopped."""

import asyncio
import json
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

from aiohttp import web

from gptpl.serving.routes import page_response

STORY = (
    " the sea was calm, and nobody in the village had seen a ship for weeks.\n\nThen, one morning, a sail"
    " appeared. It came from the west, where no one had ever been; the children ran to the pier."
)
PROBABILITIES = (0.62, 0.31, 0.12, 0.03, 0.004, 0.0004, 0.8)
OTHERS = (" wind", " old", "\n", "\ufffd", "<|endoftext|>")

BASE = {
    "id": "tale/2026-11-26_10-00-00",
    "kind": "base",
    "chat": False,
    "context_length": 1024,
    "parameters": 124439808,
    "step": 1000,
    "labels": None,
    "card": "/card/0",
    "warning": None,
}
INSTRUCT = {**BASE, "id": "helper/2026-11-27_09-30-00", "kind": "instruct", "chat": True}
CLASSIFIER = {
    **BASE,
    "id": "spam/2026-11-20_08-00-00",
    "kind": "classifier",
    "labels": ["ham", "spam"],
    "card": None,
}


class Stub:
    """What the server says next can be set at any time; `asked` is what it was asked, as (path, body)."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Say what it says at first."""
        self.info: dict[str, Any] = {
            "models": [INSTRUCT],
            "filter": None,
            "feedback": False,
            "presets": {
                "greedy": {"temperature": 0.0},
                "chat": {"temperature": 0.7, "top_k": 40},
                "creative": {"temperature": 1.0, "top_k": 60, "min_p": 0.02},
            },
            "max_tokens": 1024,
        }
        self.text = STORY
        self.delay = 0.02
        self.finish = "stop"
        self.filter: dict[str, Any] | None = None
        self.prompt_filter: list[dict[str, Any]] | None = None
        self.refusals: list[web.HTTPException] = []
        """What is answered to the next requests for texts."""
        self.breaks_after: int | None = None
        """Tokens after which the connection breaks."""
        self.key: str | None = None
        self.starting = False
        self.monitor: dict[str, Any] = monitor_data(60)
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self.left = 0
        """Clients that went away before the end."""

    def app(self) -> web.Application:
        """The server."""
        app = web.Application()
        app.router.add_get("/", self._page)
        app.router.add_get("/monitor", self._page)
        app.router.add_get("/info", self._json(lambda: self.info))
        app.router.add_get("/monitor/data", self._json(lambda: self.monitor))
        app.router.add_get("/card/0", self._card)
        app.router.add_post("/v1/completions", self._write)
        app.router.add_post("/v1/chat/completions", self._write)
        app.router.add_post("/classify", self._classify)
        app.router.add_post("/feedback", self._feedback)
        return app

    async def _page(self, request: web.Request) -> web.Response:
        return page_response("monitor.html" if request.path == "/monitor" else "page.html")

    def _check(self, request: web.Request) -> None:
        if self.starting:
            raise refusal(web.HTTPServiceUnavailable, "The server is loading its model.")
        if self.key is not None and request.headers.get("Authorization") != f"Bearer {self.key}":
            raise refusal(web.HTTPUnauthorized, "The key is wrong.")

    def _json(self, value: Any) -> Any:
        async def handle(request: web.Request) -> web.Response:
            self._check(request)
            return web.json_response(value())

        return handle

    async def _card(self, request: web.Request) -> web.Response:
        self._check(request)
        return web.Response(
            text="# A model card\n\nTrained on <b>tales</b> & more.\n", content_type="text/markdown"
        )

    async def _asked(self, request: web.Request) -> dict[str, Any]:
        self._check(request)
        body = await request.json()
        self.asked.append((request.path, body))
        return body

    async def _classify(self, request: web.Request) -> web.Response:
        body = await self._asked(request)
        if self.refusals:
            raise self.refusals.pop(0)
        data = []
        for index, text in enumerate(body["texts"]):
            spam = 0.97 if "prize" in text else 0.08
            scores = {"ham": 1 - spam, "spam": spam}
            label = max(scores, key=lambda name: scores[name])
            data.append({"index": index, "label": label, "scores": scores, "truncated": len(text) > 500})
        return web.json_response({"object": "list", "model": body["model"], "data": data})

    async def _feedback(self, request: web.Request) -> web.Response:
        await self._asked(request)
        return web.Response(status=204)

    async def _write(self, request: web.Request) -> web.StreamResponse:
        body = await self._asked(request)
        if self.refusals:
            raise self.refusals.pop(0)
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        tokens = re.findall(r"\n+| ?[^\s]+", self.text)[: body["max_tokens"]]
        try:
            for number, token in enumerate(tokens):
                if number == self.breaks_after:
                    assert request.transport is not None
                    request.transport.abort()
                    return response
                await asyncio.sleep(self.delay)
                chunk = self._chunk(request.path, body, token, number)
                if number == 0 and self.prompt_filter:
                    chunk["prompt_filter"] = self.prompt_filter
                await response.write(event(chunk))
            end = {"index": 0, "finish_reason": self.finish, "text": "", "delta": {}, "logprobs": None}
            if self.filter:
                end["filter"] = self.filter
            usage = {"prompt_tokens": 5, "completion_tokens": len(tokens), "total_tokens": 5 + len(tokens)}
            for chunk in ({"choices": [end]}, {"choices": [], "usage": usage}):
                await response.write(event(chunk))
            await response.write(b"data: [DONE]\n\n")
        except ConnectionError:
            self.left += 1
        return response

    def _chunk(self, path: str, body: Mapping[str, Any], token: str, number: int) -> dict[str, Any]:
        choice: dict[str, Any] = {"index": 0, "finish_reason": None}
        if path == "/v1/chat/completions":
            return {"choices": [choice | {"delta": {"content": token}}]}
        probability = PROBABILITIES[number % len(PROBABILITIES)]
        top = {token: math.log(probability)}
        for rank, other in enumerate(OTHERS):
            top[other] = math.log((1 - probability) / 2 ** (rank + 1))
        logprobs = {
            "tokens": [token],
            "token_logprobs": [top[token]],
            "top_logprobs": [top],
            "text_offset": [0],
        }
        return {"choices": [choice | {"text": token, "logprobs": logprobs if body.get("logprobs") else None}]}


def event(value: Mapping[str, Any]) -> bytes:
    """A server-sent event."""
    return f"data: {json.dumps(value)}\n\n".encode()


def refusal(
    kind: type[web.HTTPException],
    message: str,
    code: str | None = None,
    headers: Iterable[tuple[str, str]] = (),
) -> web.HTTPException:
    """An error as OpenAI's servers write it."""
    error = {"message": message, "type": "invalid_request_error", "param": None, "code": code}
    return kind(text=json.dumps({"error": error}), content_type="application/json", headers=list(headers))


def monitor_data(points: int, *, state: str = "steady") -> dict[str, Any]:
    """What the monitor is told after this many intervals of five seconds."""
    worse = 1.0 if state == "alarm" else 0.0
    made = []
    for i in range(points):
        wave, busy = math.sin(i / 7), i % 20 < 15
        made.append(
            {
                "time": 1790000000.0 + 5 * i,
                "requests": round(4 + 3 * wave),
                "tokens": round(600 + 300 * wave),
                "queued": max(0, round(3 * wave)),
                "running": round(5 + 3 * wave),
                "first_token_ms": [40 + 20 * wave, 120 + 60 * wave] if busy else None,
                "between_tokens_ms": [11 + wave, 25 + 5 * wave] if busy else None,
                "cache_use": 0.4 + 0.2 * wave,
                "errors": int(i % 31 == 30),
                "filtered": int(i % 17 == 16),
                "log_probability": -2.1 - 0.1 * wave - worse * i / points if busy else None,
                "repetition": 0.08 + 0.01 * wave if busy else None,
            }
        )
    learning = state == "learning"
    measures = {
        "log_probability": {
            "reference": -2.1,
            "recent": -2.1 - worse,
            "deviation": 0.4 + 6 * worse,
            "threshold": 4.0,
        },
        "repetition": {"reference": 0.08, "recent": 0.081, "deviation": 0.3, "threshold": 4.0},
    }
    return {
        "interval_s": 5,
        "started": 1790000000.0,
        "models": [BASE["id"]],
        "points": made,
        "totals": {
            "requests": 4 * points,
            "tokens": 600 * points,
            "errors": points // 31,
            "filtered": points // 17,
            "rejected": 0,
        },
        "drift": {
            "state": state,
            "outputs": 120 if learning else 640,
            "needed": 200,
            "measures": {} if learning else measures,
        },
    }
