"""What a server answers: OpenAI's API, classification, pages, health, metrics."""

import asyncio
import hmac
import ipaddress
import json
import logging
import math
import secrets
import time
from collections import Counter, defaultdict, deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from aiohttp import HttpVersion11, web
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import TypeAdapter

from gptpl.config.groups import choices, said_by
from gptpl.errors import InputError
from gptpl.files.durable import append_durably, json_lines, write_atomically
from gptpl.files.template import package_templates
from gptpl.generation import SamplingRules
from gptpl.generation.text import check_stop, prompt_ids
from gptpl.model.parameters import parameters_of
from gptpl.model.protocol import context_length, vocab_size
from gptpl.runs.export import CARD
from gptpl.runs.models import Classifier, InstructionModel, LanguageModel
from gptpl.serving.api import (
    ApiError,
    Body,
    ChatBody,
    ChatPrompt,
    ClassifyBody,
    CompletionBody,
    FeedbackBody,
    TextsBody,
    chat_logprobs,
    completion_logprobs,
    head,
    parsed,
)
from gptpl.serving.engine import Engine, PromptRead
from gptpl.serving.monitoring import Load, Monitor
from gptpl.serving.texts import Prompt, Texts, by_index, check_place, ending, merged
from gptpl.text import one_line

if TYPE_CHECKING:
    from gptpl.serving.server import ServerSettings

log = logging.getLogger(__name__)

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
_SERVED, _FAILED = web.RequestKey("served", str), web.RequestKey("failed", int)
_CLIENT_LEFT = 499  # as nginx records it
_BODY_SECONDS = 30.0  # to send a body in, or to read what is written
_OPEN = ("/", "/monitor", "/health", "/ready")
"""Paths that need no key: the pages ask for it."""
_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "X-Frame-Options": "DENY",
    "Cross-Origin-Resource-Policy": "same-origin",
}


@dataclass(kw_only=True, eq=False)
class Served:
    """A model by its name, with what answers: an engine, or, of a classifier, one call at a time."""

    id: str
    number: int
    model: LanguageModel | Classifier
    engine: Engine | None = None
    chat: ChatPrompt | None = None
    pool: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1))
    calls: set[Future[Any]] = field(default_factory=set)  # of the classifier, those that wait included

    @property
    def kind(self) -> str:
        """What it is for: "base", "instruct" or "classifier"."""
        if isinstance(self.model, Classifier):
            return "classifier"
        return "instruct" if isinstance(self.model, InstructionModel) else "base"

    @property
    def card(self) -> Path | None:
        """The model card, where there is one."""
        run_dir = self.model.run_dir
        return run_dir / CARD if run_dir is not None and (run_dir / CARD).is_file() else None

    def load(self) -> Load:
        """How busy it is."""
        if self.engine is None:
            calls = len(self.calls)
            return Load(queued=max(0, calls - 1), running=min(1, calls), cache_use=0.0)
        batch = self.engine.batch
        running, tokens = batch.load
        return Load(
            queued=self.engine.queued,
            running=running,
            cache_use=tokens / (batch.max_rows * batch.context_length),
        )

    def info(self) -> dict[str, Any]:
        """Plain data for the page."""
        model = self.model
        return {
            "id": self.id,
            "kind": self.kind,
            "chat": self.chat is not None,
            "context_length": model.max_length
            if isinstance(model, Classifier)
            else context_length(model.net),
            "parameters": parameters_of(model.net),
            "step": model.step,
            "labels": list(model.labels) if isinstance(model, Classifier) else None,
            "card": None if self.card is None else f"/card/{self.number}",
        }


class Routes:
    """What a server answers; `active` requests are being answered."""

    def __init__(self, served: Sequence[Served], settings: "ServerSettings") -> None:
        self._served, self._settings = served, settings
        self.stopping = False
        self.active = 0
        drift = {each.id: settings.drift() for each in served if each.engine is not None}
        first = {} if settings.drift_file is None else _first_outputs(Path(settings.drift_file))
        for name in drift.keys() & first.keys():
            try:
                drift[name].restore(first[name])
            except InputError as error:
                raise InputError(
                    f"drift_file={settings.drift_file} does not fit {name}: {error}; remove the file, or give"
                    " the drift_reference that it was made with"
                ) from error
        self.monitor = Monitor(
            {each.id: each.load for each in served}, drift=drift, learned=self._keep_first_outputs
        )
        self._clients = _Clients(settings.max_per_client, settings.requests_per_minute)
        presets = {name: SamplingRules(**said_by("sampling", name)) for name in choices("sampling")}
        self._presets = {
            name: {"temperature": rules.temperature} | rules.changes for name, rules in presets.items()
        }

    def _keep_first_outputs(self) -> None:
        if self._settings.drift_file is None:
            return
        path = Path(self._settings.drift_file).expanduser()
        learned = {
            name: each.first for name, each in self.monitor.drift.items() if each.outputs >= each.reference
        }
        try:
            write_atomically(path, json.dumps(_first_outputs(path) | learned))  # those of other models stay
        except (InputError, OSError) as error:
            log.error("drift_file=%s cannot be written: %s", self._settings.drift_file, error)

    def app(self) -> web.Application:
        """The routes as an application."""
        app = web.Application(
            middlewares=[self._answered, self._guarded], client_max_size=self._settings.max_body_kb * 1024
        )
        app.add_routes(
            [
                web.get("/", self.page),
                web.get("/monitor", self.page),
                web.get("/monitor/data", self.monitor_data),
                web.get("/metrics", self.metrics),
                web.get("/health", self.health),
                web.get("/ready", self.ready),
                web.get("/info", self.info),
                web.get("/card/{number}", self.card),
                web.get("/v1/models", self.models),
                web.get("/v1/models/{id:.+}", self.models),
                web.post("/v1/completions", self.completions),
                web.post("/v1/chat/completions", self.chat),
                web.post("/classify", self.classify),
                web.post("/feedback", self.feedback),
            ]
        )
        return app

    # --- every request --------------------------------------------------------------------------------------

    @web.middleware
    async def _answered(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Errors as bodies, headers, the log, and the count of active requests."""
        started = time.monotonic()
        self.active += 1
        try:
            response = await handler(request)
        except (asyncio.CancelledError, ConnectionError):
            self._record(request, _CLIENT_LEFT, started)
            raise
        except ApiError as error:
            response = self._failed(error)
        except web.HTTPException as error:
            reason = f"{request.method} {request.path[:200]}: {error.reason}"
            response = self._failed(ApiError(error.status, reason))
        except InputError as error:
            response = self._failed(ApiError(400, str(error)))
        except Exception:
            log.exception("a request failed")
            response = self._failed(ApiError(500, "the server failed: its log says why"))
        finally:
            self.active -= 1
        if not response.prepared:
            response.headers.update(self._headers(request))
        self._record(request, request.get(_FAILED, response.status), started)
        return response

    def _record(self, request: web.Request, status: int, started: float) -> None:
        """Count and log a request that has ended."""
        seconds = time.monotonic() - started
        if request.method == "POST":
            resource = request.match_info.route.resource
            endpoint = "other" if resource is None else resource.canonical
            self.monitor.answered(request.get(_SERVED, ""), endpoint, status, seconds)
        record = {
            "client": request.remote,
            "request": f"{request.method} {request.path}",
            "status": status,
            "ms": round(1000 * seconds),
            "model": request.get(_SERVED),
        }
        level = logging.INFO if request.method == "POST" or status >= 400 else logging.DEBUG
        log.log(level, "%s", json.dumps(record))

    def _failed(self, error: ApiError) -> web.StreamResponse:
        if error.status in (401, 403, 413, 429):
            self.monitor.rejected(str(error.status))
        headers = {} if error.retry_after is None else {"Retry-After": str(error.retry_after)}
        return web.json_response(error.body, status=error.status, headers=headers)

    @web.middleware
    async def _guarded(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Refuse other sites' pages and names, clients without the key, and too many requests."""
        settings = self._settings
        origin = request.headers.get("Origin")
        if settings.is_local and not _names_this_machine(request.headers.get("Host", "")):
            # A page elsewhere whose name was made to mean this machine (DNS rebinding).
            raise ApiError(403, "the server is for this machine, not for the name that was asked for")
        # The scheme is not compared: a proxy may speak TLS for this server.
        own = (f"http://{request.host}", f"https://{request.host}")
        if origin is not None and origin not in (*own, *settings.cors):
            raise ApiError(403, f"pages of {origin[:100]} may not use this server (its setting cors)")
        if request.method == "OPTIONS" and origin is not None:
            return web.Response(status=204)
        client = request.remote or ""
        if settings.api_key is not None and request.path not in _OPEN:
            self._clients.check(client, "wrong keys", most=MOST_WRONG_KEYS)  # a right one does not help
            scheme, _, given = request.headers.get("Authorization", "").partition(" ")
            right = hmac.compare_digest(given.strip().encode("utf-8", "replace"), settings.api_key.encode())
            if scheme.lower() != "bearer" or not right:
                self._clients.note(client, "wrong keys")
                raise ApiError(
                    401, "the API key is missing or wrong: send it as a bearer token", code="invalid_api_key"
                )
        if request.method != "POST":
            return await handler(request)
        if self.stopping:
            raise ApiError(503, "the server is stopping", retry_after=10)
        with self._clients.counted(client):
            return await handler(request)

    def _headers(self, request: web.Request) -> dict[str, str]:
        origin = request.headers.get("Origin")
        if origin is None or origin not in self._settings.cors:
            return _HEADERS
        return _HEADERS | {
            "Cross-Origin-Resource-Policy": "cross-origin",
            "Access-Control-Allow-Origin": origin,
            "Access-Control-Allow-Headers": request.headers.get(
                "Access-Control-Request-Headers", "Authorization, Content-Type"
            ),
            "Access-Control-Allow-Methods": "GET, POST",
            "Access-Control-Expose-Headers": "Retry-After",
            "Access-Control-Max-Age": "600",
            "Vary": "Origin",
        }

    async def _body(self, request: web.Request, body: type[Body]) -> Body:
        if request.content_type != "application/json":  # another site's form could send other types
            raise ApiError(
                415, f"send the header Content-Type: application/json, it is {request.content_type}"
            )
        try:
            async with asyncio.timeout(_BODY_SECONDS):
                data = await request.read()
        except TimeoutError as error:
            raise ApiError(408, f"the body has not come within {_BODY_SECONDS:g} seconds") from error
        except web.RequestPayloadError as error:
            raise ApiError(400, f"the body cannot be read: {error}") from error
        return parsed(body, data)

    def _of(self, request: web.Request, name: str | None) -> Served:
        """The model of that name, or the first one."""
        found = next((each for each in self._served if name in (None, each.id)), None)
        if found is None:
            known = ", ".join(each.id for each in self._served)
            raise ApiError(
                404, f"there is no model {name!r}; served: {known}", param="model", code="model_not_found"
            )
        request[_SERVED] = found.id
        return found

    def _writer(self, request: web.Request, body: TextsBody, prompts: int) -> tuple[Served, Engine]:
        """A model that writes. Raises ApiError for a classifier, and where so many texts have no place."""
        served = self._of(request, body.model)
        if served.engine is None:
            raise ApiError(
                400, f"{served.id} is a classifier: it does not write, use /classify", param="model"
            )
        if body.n > (most := self._settings.max_rows):
            raise ApiError(
                400, f"n must be from 1 to {most} (the server's max_rows), got {body.n}", param="n"
            )
        check_place(served.engine.queued, prompts, most=self._settings.max_queue)
        return served, served.engine

    # --- texts ----------------------------------------------------------------------------------------------

    async def completions(self, request: web.Request) -> web.StreamResponse:
        """POST /v1/completions."""
        body = await self._body(request, CompletionBody)
        served, engine = self._writer(request, body, len(body.prompts))
        model, most, alternatives = engine.model, body.max_tokens, body.logprobs
        common = self._common(body, model, logprobs=alternatives)
        if body.best_of not in (None, body.n):
            raise ApiError(400, f"best_of must equal n, got {body.best_of}", param="best_of")
        prompts = [await self._judged(served, prompt) for prompt in body.prompts]
        with Texts(self.monitor, served.id, engine, most_queued=self._settings.max_queue) as texts:
            for prompt in prompts:
                # A long text takes its time.
                ids = await asyncio.to_thread(prompt_ids, prompt.given, model.tokenizer)
                texts.add(ids, max_new_tokens=most, echo=body.echo, **common)

            async def choices() -> AsyncIterator[dict[str, Any]]:
                ends: dict[int, int] = defaultdict(int)  # of each text, in characters
                async for number, event in texts.events():
                    first = number * body.n
                    if isinstance(event, PromptRead):
                        if not body.echo and most:
                            continue
                        # An empty prompt is read as an end of text.
                        own = prompts[number].text(model) or model.tokenizer.decode([model.tokenizer.eot_id])
                        parts = [
                            (first + sample, own if body.echo else "", event.token_texts or ())
                            for sample in range(body.n)
                        ]
                    else:
                        parts = [(first + event.sample, event.text, event.token_texts or ())]
                    for index, text, tokens in parts:
                        logprobs = None
                        if alternatives is not None:
                            offset = ends[index]
                            logprobs = completion_logprobs(tokens, alternatives=alternatives, offset=offset)
                            ends[index] += sum(len(token.text) for token in tokens)
                        yield {"index": index, "text": text, "logprobs": logprobs, **ending(event, most)}

            about = head("cmpl", "text_completion", served.id)
            return await self._answer(request, body, texts, choices(), about, prompts)

    async def chat(self, request: web.Request) -> web.StreamResponse:
        """POST /v1/chat/completions."""
        body = await self._body(request, ChatBody)
        served, engine = self._writer(request, body, 1)
        model = engine.model
        if served.chat is None:
            raise ApiError(
                400,
                f"{served.id} continues texts and was not tuned to answer: use /v1/completions, or start the"
                " server with chat_template=",
                param="model",
            )
        if body.top_logprobs and not body.logprobs:
            raise ApiError(400, "top_logprobs needs logprobs: true", param="top_logprobs")
        common = self._common(body, model, logprobs=body.top_logprobs if body.logprobs else None)
        judged = [await self._judged(served, message.text) for message in body.messages]
        messages = [
            message.model_copy(update={"content": prompt.given})
            for message, prompt in zip(body.messages, judged, strict=True)
        ]
        ids = await asyncio.to_thread(prompt_ids, served.chat(messages), model.tokenizer)
        most = body.max_completion_tokens or body.max_tokens
        if most is None:
            most = max(1, engine.batch.context_length - len(ids))
        with Texts(self.monitor, served.id, engine, most_queued=self._settings.max_queue) as texts:
            texts.add(ids, max_new_tokens=most, **common)

            async def choices() -> AsyncIterator[dict[str, Any]]:
                begun = [False] * body.n
                async for _, event in texts.events():
                    if isinstance(event, PromptRead):
                        for index in range(body.n):
                            delta = {"role": "assistant", "content": ""}
                            yield {"index": index, "delta": delta, "logprobs": None, **ending(event, 1)}
                        continue
                    text = event.text if begun[event.sample] else event.text.lstrip()
                    begun[event.sample] |= bool(text)
                    logprobs = None if event.token_texts is None else chat_logprobs(event.token_texts)
                    delta = {"content": text} if text else {}
                    yield {"index": event.sample, "delta": delta, "logprobs": logprobs, **ending(event, 1)}

            kind = "chat.completion.chunk" if body.stream else "chat.completion"
            about = head("chatcmpl", kind, served.id)
            return await self._answer(request, body, texts, choices(), about, judged)

    def _common(self, body: TextsBody, model: LanguageModel, *, logprobs: int | None) -> dict[str, Any]:
        """The settings of texts. Raises ApiError where `logprobs` would tell what a filter hides."""
        filter = self._settings.filter
        if logprobs is not None and filter is not None and filter.changes_texts:
            raise ApiError(
                400,
                "logprobs show tokens that the server's filter has not judged: leave them out",
                param="logprobs",
            )
        check_stop(body.stops, model.tokenizer)
        return {
            "rules": body.rules(vocab_size(model.net)),
            "num_samples": body.n,
            "seed": body.seed32,
            "logprobs": logprobs,
            "logit_bias": body.biases(),
            "stop": body.stops,
            "filter": filter,
            "seconds": self._settings.timeout_s,
        }

    async def _judged(self, served: Served, prompt: str | list[int]) -> Prompt:
        """A prompt as the filter lets it pass. Raises ApiError for one that it withholds."""
        filter, given = self._settings.filter, Prompt(given=prompt)
        if filter is None or not self._settings.filter_prompts:
            return given
        text = given.text(served.model)
        verdict = await asyncio.to_thread(filter.verdict, text)  # a classifier takes its time
        self.monitor.verdict(served.id, verdict, where="prompt")
        if verdict.action == "withhold":
            rules = ", ".join(verdict.counts)
            raise ApiError(400, f"the server's filter refuses the prompt: {rules}", code="content_filter")
        if not verdict.findings:
            return given
        note = {"action": verdict.action, "counts": verdict.counts, "text": verdict.text}
        return Prompt(given=verdict.text if verdict.changed else prompt, note=note)

    async def _answer(
        self,
        request: web.Request,
        body: TextsBody,
        texts: Texts,
        choices: AsyncIterator[dict[str, Any]],
        about: dict[str, Any],
        prompts: Sequence[Prompt],
    ) -> web.StreamResponse:
        """The choices as they come, or together; `about` is what all parts of the answer begin with."""
        if notes := [{"index": i, **prompt.note} for i, prompt in enumerate(prompts) if prompt.note]:
            about["prompt_filter"] = notes
        if not body.stream:
            whole = [merged(parts) for parts in await by_index(choices)]
            self._log_texts(request, body, whole)
            return web.json_response(about | {"choices": whole, "usage": texts.usage()})
        response = web.StreamResponse(
            headers={
                "Content-Type": "text/event-stream; charset=utf-8",
                "Cache-Control": "no-cache",
                **self._headers(request),
            }
        )
        if request.version < HttpVersion11:
            response.force_close()  # nothing else tells such a client where the stream ends
        sent = []
        try:
            async for choice in choices:
                if not response.prepared:  # not before: an error in place of the first has its own status
                    await response.prepare(request)
                await self._send(request, response, about | {"choices": [choice]})
                about.pop("prompt_filter", None)
                if self._settings.log_texts:
                    sent.append(choice)
        except ApiError as error:
            if not response.prepared:
                raise
            request[_FAILED] = error.status
            await self._send(request, response, error.body)
            return response
        if body.stream_options.include_usage:
            await self._send(request, response, about | {"choices": [], "usage": texts.usage()})
        await self._send(request, response, None)
        self._log_texts(request, body, sent)
        return response

    async def _send(self, request: web.Request, response: web.StreamResponse, data: Any) -> None:
        """An event of a stream; None is its end."""
        text = "[DONE]" if data is None else json.dumps(data, ensure_ascii=False)
        try:
            async with asyncio.timeout(_BODY_SECONDS):
                await response.write(f"data: {text}\n\n".encode())
        except TimeoutError:
            if request.transport is not None:  # who does not read has no need of the rest
                request.transport.abort()
            raise ConnectionResetError("the client does not read") from None

    def _log_texts(self, request: web.Request, body: TextsBody, choices: list[dict[str, Any]]) -> None:
        if self._settings.log_texts:
            given = body.model_dump(exclude_unset=True)
            record = {"request": request.path, "body": given, "choices": choices}
            log.info("%s", json.dumps(record, ensure_ascii=False))

    # --- labels, reports ------------------------------------------------------------------------------------

    async def classify(self, request: web.Request) -> web.StreamResponse:
        """POST /classify: `{"texts": [...]}` gives each a label, with the probabilities of all."""
        body = await self._body(request, ClassifyBody)
        served = self._of(request, body.model)
        if not isinstance(served.model, Classifier):
            raise ApiError(400, f"{served.id} writes texts: it is no classifier", param="model")
        check_place(len(served.calls), 1, most=self._settings.max_queue)
        # One call at a time; it has its place until it has ended, also when the client leaves.
        call = served.pool.submit(served.model.classify, body.texts)
        served.calls.add(call)
        call.add_done_callback(served.calls.discard)
        found = await asyncio.wrap_future(call)
        data = [
            {
                "index": index,
                "label": each.label,
                "scores": dict(zip(each.labels, each.probabilities, strict=True)),
                "truncated": each.lost_tokens > 0,
            }
            for index, each in enumerate(found)
        ]
        return web.json_response({"object": "list", "model": served.id, "data": data})

    async def feedback(self, request: web.Request) -> web.StreamResponse:
        """POST /feedback: a line in the file of the setting `feedback`."""
        if self._settings.feedback is None:
            raise ApiError(404, "this server takes no feedback: its setting feedback is not set")
        body = await self._body(request, FeedbackBody)
        served = self._of(request, body.model)
        said = body.model_dump(include={"rating", "prompt", "text", "comment"})
        line = json_lines([{"time": round(time.time(), 3), **said, "model": served.id}])
        path = Path(self._settings.feedback).expanduser()
        try:
            await asyncio.to_thread(append_durably, path, line)
        except OSError as error:
            log.error("feedback=%s cannot be written: %s", path, error)
            raise ApiError(500, "the feedback could not be written") from error
        return web.Response(status=204)

    # --- the server itself ----------------------------------------------------------------------------------

    async def models(self, request: web.Request) -> web.StreamResponse:
        """GET /v1/models, and one of them."""
        entries = [
            {"id": each.id, "object": "model", "created": int(self.monitor.started), "owned_by": "gptpl"}
            for each in self._served
        ]
        if "id" in request.match_info:
            return web.json_response(entries[self._of(request, request.match_info["id"]).number])
        return web.json_response({"object": "list", "data": entries})

    async def info(self, request: web.Request) -> web.StreamResponse:
        """GET /info: what the page shows."""
        filter = self._settings.filter
        judging = None
        if filter is not None and filter.rules:
            judging = {
                "rules": [getattr(rule, "name", type(rule).__name__) for rule in filter.rules],
                "prompts": self._settings.filter_prompts,
                "changes": filter.changes_texts,
                "withholds": any(rule.action == "withhold" for rule in filter.rules),
            }
        return web.json_response(
            {
                "models": [each.info() for each in self._served],
                "filter": judging,
                "feedback": self._settings.feedback is not None,
                "max_tokens": max(
                    (each.engine.batch.context_length for each in self._served if each.engine), default=0
                ),
                "presets": self._presets,
            }
        )

    async def card(self, request: web.Request) -> web.StreamResponse:
        """GET /card/N: the model card of the N-th model."""
        number = request.match_info["number"]
        card = self._served[int(number)].card if number in map(str, range(len(self._served))) else None
        if card is None:
            raise ApiError(404, "there is no model card: gptpl card checkpoint=RUN writes one")
        return web.Response(text=card.read_text(encoding="utf-8"), content_type="text/plain")

    async def page(self, request: web.Request) -> web.StreamResponse:
        """GET / and /monitor: pages of one file each, which load nothing from elsewhere."""
        return page_response("monitor.html" if request.path == "/monitor" else "page.html")

    async def health(self, request: web.Request) -> web.StreamResponse:
        """GET /health: 503 when a model has stopped answering for good."""
        dead = [each.id for each in self._served if each.engine is not None and not each.engine.alive]
        return web.json_response({"status": "failed" if dead else "ok"}, status=503 if dead else 200)

    async def ready(self, request: web.Request) -> web.StreamResponse:
        """GET /ready: 503 also while the server is stopping."""
        if self.stopping:
            return web.json_response({"status": "stopping"}, status=503)
        return await self.health(request)

    async def metrics(self, request: web.Request) -> web.StreamResponse:
        """GET /metrics, for Prometheus."""
        return web.Response(body=self.monitor.metrics(), headers={"Content-Type": CONTENT_TYPE_LATEST})

    async def monitor_data(self, request: web.Request) -> web.StreamResponse:
        """GET /monitor/data, for the page /monitor."""
        return web.json_response(self.monitor.data())


_PAGES = package_templates()


def page_response(name: str) -> web.Response:
    """A page of this folder, whose own scripts and styles are the only ones that it may use."""
    nonce = secrets.token_urlsafe(16)
    policy = (
        f"default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; connect-src 'self';"
        " img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return web.Response(
        text=_PAGES.get_template(f"serving/{name}").render(nonce=nonce),
        content_type="text/html",
        headers={"Content-Security-Policy": policy, "Cache-Control": "no-store"},
    )


def _first_outputs(path: Path) -> dict[str, dict[str, list[float]]]:
    """The first outputs of each model in a file of an earlier server. Raises InputError for another file."""
    path = path.expanduser()
    if not path.exists():
        return {}
    try:
        return TypeAdapter(dict[str, dict[str, list[float]]]).validate_json(path.read_bytes())
    except (OSError, ValueError) as error:
        reason = one_line(str(error))
        raise InputError(f"drift_file={path} is not a file of first outputs: {reason}") from error


def _names_this_machine(host: str) -> bool:
    """Whether the Host header names this machine itself."""
    try:
        return is_loopback(urlsplit(f"//{host}").hostname or "")
    except ValueError:  # such as "[::1"
        return False


def is_loopback(name: str) -> bool:
    """Whether the name or address of a host means this machine itself."""
    try:
        return name == "localhost" or ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


# --- clients --------------------------------------------------------------------------------------------


MOST_WRONG_KEYS = 20  # of an address in a minute


class _Clients:
    """How many requests each address has, at the time and within a minute."""

    def __init__(self, most: int, per_minute: int | None) -> None:
        self._most, self._per_minute = most, per_minute
        self._active: Counter[str] = Counter()
        self._times: dict[tuple[str, str], deque[float]] = {}
        """When events were, by address and event."""

    @contextmanager
    def counted(self, client: str) -> Iterator[None]:
        """Count a request while it is answered. Raises ApiError for one too many."""
        if self._active[client] >= self._most:
            raise ApiError(429, f"{self._most} requests of yours are being answered already", retry_after=1)
        if self._per_minute is not None:
            self.check(client, "requests", most=self._per_minute)
            self.note(client, "requests")
        self._active[client] += 1
        try:
            yield
        finally:
            self._active -= Counter([client])  # which leaves out addresses without any

    def note(self, client: str, event: str) -> None:
        """Count an event."""
        self._times.setdefault((client, event), deque()).append(time.monotonic())

    def check(self, client: str, event: str, *, most: int) -> None:
        """Raise ApiError for an address with `most` events in the last minute; older ones are forgotten."""
        since = time.monotonic() - 60
        self._times = {key: times for key, times in self._times.items() if times[-1] >= since}
        own = self._times.get((client, event), deque())
        while own and own[0] < since:
            own.popleft()
        if len(own) >= most:
            wait = math.ceil(own[0] - since) or 1
            raise ApiError(429, f"more than {most} {event} in a minute", retry_after=wait)
