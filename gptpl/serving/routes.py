"""What a server answers: OpenAI's API, classification, pages, health, metrics."""

import asyncio
import hmac
import ipaddress
import json
import logging
import math
import secrets
import time
from collections import defaultdict, deque
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import jinja2
from aiohttp import HttpVersion11, web
from prometheus_client import CONTENT_TYPE_LATEST

from gptpl.config.groups import choices, said_by
from gptpl.errors import InputError
from gptpl.files.durable import append_durably, json_lines, write_atomically
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
    Head,
    TextsBody,
    chat_logprobs,
    completion_logprobs,
    parsed,
)
from gptpl.serving.engine import Engine, PromptRead
from gptpl.serving.monitoring import Drift, Load, Monitor
from gptpl.serving.texts import Prompt, Texts, by_index, check_place, ending, merged

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
    engine: Engine | None
    chat: ChatPrompt | None
    pool: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1))
    calls: int = 0  # of the classifier, those that wait included

    def called(self) -> None:
        """A call of the classifier has ended."""
        self.calls -= 1

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
        path = None if run_dir is None else run_dir / CARD
        return path if path is not None and path.is_file() else None

    def load(self) -> Load:
        """How busy it is."""
        if self.engine is None:
            return Load(queued=max(0, self.calls - 1), running=min(1, self.calls), cache_use=0.0)
        batch = self.engine.batch
        running, tokens = batch.load
        return Load(
            queued=self.engine.queued,
            running=running,
            cache_use=tokens / (batch.max_rows * batch.context_length),
        )

    @cached_property
    def parameters(self) -> int:
        """The number of the model's parameters."""
        return parameters_of(self.model.net)

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
            "parameters": self.parameters,
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
        drift = {
            each.id: Drift(
                reference=settings.drift_reference,
                window=settings.drift_window,
                threshold=settings.drift_threshold,
            )
            for each in served
            if each.engine is not None
        }
        if settings.drift_file is not None:
            for name, first in _first_outputs(Path(settings.drift_file)).items():
                if name in drift:
                    try:
                        drift[name].restore(first)
                    except InputError as error:
                        raise InputError(
                            f"drift_file={settings.drift_file} does not fit {name}: {error}; remove the file,"
                            " or give the drift_reference that it was made with"
                        ) from error
        self.monitor = Monitor(
            {each.id: each.load for each in served}, drift=drift, learned=self._keep_first_outputs
        )
        self._clients = _Clients(settings.max_per_client, settings.requests_per_minute)
        presets = {name: SamplingRules(**said_by("sampling", name)) for name in choices("sampling")}
        self._presets = {
            name: {"temperature": rules.temperature} | rules.changes for name, rules in presets.items()
        }
        contexts = [context_length(each.model.net) for each in served if each.engine is not None]
        self._max_tokens = max(contexts, default=0)

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
            response = await self._error_bodies(request, handler)
        except (asyncio.CancelledError, ConnectionError):
            self._record(request, _CLIENT_LEFT, started)
            raise
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

    async def _error_bodies(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        try:
            return await handler(request)
        except ApiError as error:
            found = error
        except web.HTTPException as error:
            if error.status < 400:
                raise
            found = ApiError(error.status, f"{request.method} {request.path[:200]}: {error.reason}")
        except InputError as error:
            found = ApiError(400, str(error))
        except (asyncio.CancelledError, ConnectionError):
            raise
        except Exception:
            log.exception("a request failed")
            found = ApiError(500, "the server failed: its log says why")
        if found.status in (401, 403, 413, 429):
            self.monitor.rejected(str(found.status))
        headers = {} if found.retry_after is None else {"Retry-After": str(found.retry_after)}
        return web.json_response(found.body, status=found.status, headers=headers)

    @web.middleware
    async def _guarded(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Refuse other sites' pages and names, clients without the key, and too many requests."""
        settings = self._settings
        origin = request.headers.get("Origin")
        if settings.is_local and not _is_local_name(request.headers.get("Host", "")):
            # A page elsewhere whose name was made to mean this machine (DNS rebinding).
            raise ApiError(403, "the server is for this machine, not for the name that was asked for")
        # The scheme is not compared: a proxy may speak TLS for this server.
        own = (f"http://{request.host}", f"https://{request.host}")
        if origin is not None and origin not in (*own, *settings.cors):
            raise ApiError(403, f"pages of {origin[:100]} may not use this server (its setting cors)")
        if request.method == "OPTIONS" and origin is not None:
            return web.Response(status=204)
        if settings.api_key is not None and request.path not in _OPEN:
            self._clients.check_keys(request.remote or "")
            scheme, _, given = request.headers.get("Authorization", "").partition(" ")
            right = hmac.compare_digest(given.strip().encode("utf-8", "replace"), settings.api_key.encode())
            if scheme.lower() != "bearer" or not right:
                self._clients.wrong_key(request.remote or "")
                raise ApiError(
                    401, "the API key is missing or wrong: send it as a bearer token", code="invalid_api_key"
                )
        if request.method != "POST":
            return await handler(request)
        self._check_running()
        client = request.remote or ""
        self._clients.begin(client)
        try:
            return await handler(request)
        finally:
            self._clients.end(client)

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

    def _writer(
        self, request: web.Request, body: TextsBody, prompts: int
    ) -> tuple[Served, LanguageModel, Engine]:
        """A model that writes. Raises ApiError for a classifier, and where so many texts have no place."""
        served = self._of(request, body.model)
        if served.engine is None or not isinstance(served.model, LanguageModel):
            raise ApiError(
                400, f"{served.id} is a classifier: it does not write, use /classify", param="model"
            )
        if body.samples > (most := self._settings.max_rows):
            raise ApiError(
                400, f"n must be from 1 to {most} (the server's max_rows), got {body.n}", param="n"
            )
        check_place(served.engine.queued, prompts, most=self._settings.max_queue)
        return served, served.model, served.engine

    def _check_running(self) -> None:
        if self.stopping:
            raise ApiError(503, "the server is stopping", retry_after=10)

    # --- texts ----------------------------------------------------------------------------------------------

    async def completions(self, request: web.Request) -> web.StreamResponse:
        """POST /v1/completions."""
        body = await self._body(request, CompletionBody)
        served, model, engine = self._writer(request, body, len(body.prompts))
        alternatives = self._alternatives(body.logprobs)
        if body.best_of not in (None, body.samples):
            raise ApiError(400, f"best_of must equal n, got {body.best_of}", param="best_of")
        prompts = [await self._judged(served, prompt) for prompt in body.prompts]
        most = 16 if body.max_tokens is None else body.max_tokens
        notes = [{"index": i, **prompt.note} for i, prompt in enumerate(prompts) if prompt.note]
        common = self._common(body, model)
        with self._texts(served, engine) as texts:
            for prompt in prompts:
                texts.add(
                    model,
                    await asyncio.to_thread(prompt.ids, model),  # a long text takes its time
                    max_new_tokens=most,
                    logprobs=alternatives,
                    echo=bool(body.echo),
                    **common,
                )

            async def choices() -> AsyncIterator[dict[str, Any]]:
                ends: dict[int, int] = defaultdict(int)  # of each text, in characters
                async for number, event in texts.events():
                    first = number * body.samples
                    if isinstance(event, PromptRead):
                        if not body.echo and most:
                            continue
                        # An empty prompt is read as an end of text.
                        own = prompts[number].text(model) or model.tokenizer.decode([model.tokenizer.eot_id])
                        parts = [
                            (first + sample, own if body.echo else "", event.tokens or ())
                            for sample in range(body.samples)
                        ]
                    else:
                        parts = [(first + event.sample, event.text, event.tokens or ())]
                    for index, text, tokens in parts:
                        logprobs = None
                        if alternatives is not None:
                            offset = ends[index]
                            logprobs = completion_logprobs(tokens, alternatives=alternatives, offset=offset)
                            ends[index] += sum(len(token.text) for token in tokens)
                        yield {"index": index, "text": text, "logprobs": logprobs, **ending(event, most)}

            head = Head.new("cmpl", "text_completion", served.id)
            return await self._answer(request, body, texts, choices(), head, notes)

    async def chat(self, request: web.Request) -> web.StreamResponse:
        """POST /v1/chat/completions."""
        body = await self._body(request, ChatBody)
        served, model, engine = self._writer(request, body, 1)
        if served.chat is None:
            raise ApiError(
                400,
                f"{served.id} continues texts and was not tuned to answer: use /v1/completions, or start the"
                " server with chat_template=",
                param="model",
            )
        if body.top_logprobs and not body.logprobs:
            raise ApiError(400, "top_logprobs needs logprobs: true", param="top_logprobs")
        alternatives = self._alternatives((body.top_logprobs or 0) if body.logprobs else None)
        judged = [await self._judged(served, message.text) for message in body.messages]
        notes = [{"index": i, **prompt.note} for i, prompt in enumerate(judged) if prompt.note]
        messages = [
            message.model_copy(update={"content": prompt.given})
            for message, prompt in zip(body.messages, judged, strict=True)
        ]
        ids = await asyncio.to_thread(prompt_ids, served.chat(messages), model.tokenizer)
        most = body.most_tokens
        with self._texts(served, engine) as texts:
            texts.add(
                model,
                ids,
                max_new_tokens=max(1, context_length(model.net) - len(ids)) if most is None else most,
                logprobs=alternatives,
                **self._common(body, model),
            )

            async def choices() -> AsyncIterator[dict[str, Any]]:
                begun = [False] * body.samples
                async for _, event in texts.events():
                    if isinstance(event, PromptRead):
                        for index in range(body.samples):
                            delta = {"role": "assistant", "content": ""}
                            yield {"index": index, "delta": delta, "logprobs": None, **ending(event, 1)}
                        continue
                    text = event.text if begun[event.sample] else event.text.lstrip()
                    begun[event.sample] |= bool(text)
                    logprobs = None if event.tokens is None else chat_logprobs(event.tokens)
                    delta = {"content": text} if text else {}
                    yield {"index": event.sample, "delta": delta, "logprobs": logprobs, **ending(event, 1)}

            kind = "chat.completion.chunk" if body.stream else "chat.completion"
            head = Head.new("chatcmpl", kind, served.id)
            return await self._answer(request, body, texts, choices(), head, notes)

    def _texts(self, served: Served, engine: Engine) -> Texts:
        return Texts(self.monitor, served.id, engine, most_queued=self._settings.max_queue)

    def _alternatives(self, asked: int | None) -> int | None:
        """Raises ApiError where tokens would tell what a filter hides."""
        filter = self._settings.filter
        if asked is not None and filter is not None and filter.changes_texts:
            raise ApiError(
                400,
                "logprobs show tokens that the server's filter has not judged: leave them out",
                param="logprobs",
            )
        return asked

    def _common(self, body: TextsBody, model: LanguageModel) -> dict[str, Any]:
        """The settings of texts that completions and chats have in common."""
        check_stop(body.stops, model.tokenizer)
        return {
            "rules": body.rules(vocab_size(model.net)),
            "num_samples": body.samples,
            "seed": body.seed32,
            "logit_bias": body.biases(),
            "stop": body.stops,
            "filter": self._settings.filter,
            "seconds": self._settings.timeout_s,
        }

    async def _judged(self, served: Served, prompt: str | list[int]) -> Prompt:
        """A prompt as the filter lets it pass. Raises ApiError for one that it withholds."""
        filter = self._settings.filter
        if filter is None or not self._settings.filter_prompts:
            return Prompt(given=prompt)
        given = Prompt(given=prompt)
        model = served.model
        verdict = await asyncio.to_thread(filter.verdict, given.text(model))  # a classifier takes its time
        self.monitor.verdict(served.id, verdict, where="prompt")
        if verdict.action == "withhold":
            rules = ", ".join(verdict.counts)
            raise ApiError(400, f"the server's filter refuses the prompt: {rules}", code="content_filter")
        return Prompt(given=verdict.text if verdict.changed else prompt, verdict=verdict)

    async def _answer(
        self,
        request: web.Request,
        body: TextsBody,
        texts: Texts,
        choices: AsyncIterator[dict[str, Any]],
        head: Head,
        notes: list[dict[str, Any]],
    ) -> web.StreamResponse:
        """The choices as they come, or together."""
        about: dict[str, Any] = vars(head) | ({"prompt_filter": notes} if notes else {})
        if not body.stream:
            whole = [merged(parts) for parts in await by_index(choices)]
            answer = about | {"choices": whole, "usage": texts.usage()}
            self._log_texts(request, body, whole)
            return web.json_response(answer)
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
        if body.stream_options is not None and body.stream_options.include_usage:
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
            record = {"request": request.path, "body": body.model_dump(exclude_none=True), "choices": choices}
            log.info("%s", json.dumps(record, ensure_ascii=False))

    # --- labels, reports ------------------------------------------------------------------------------------

    async def classify(self, request: web.Request) -> web.StreamResponse:
        """POST /classify: `{"texts": [...]}` gives each a label, with the probabilities of all."""
        body = await self._body(request, ClassifyBody)
        served = self._of(request, body.model)
        if not isinstance(served.model, Classifier):
            raise ApiError(400, f"{served.id} writes texts: it is no classifier", param="model")
        check_place(served.calls, 1, most=self._settings.max_queue)
        served.calls += 1
        # One call at a time; it has its place until it has ended, also when the client leaves.
        call = served.pool.submit(served.model.classify, body.texts)
        loop = asyncio.get_running_loop()

        def ended(_: object) -> None:
            with suppress(RuntimeError):  # the server has stopped in the meantime
                loop.call_soon_threadsafe(served.called)

        call.add_done_callback(ended)
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
        record = {"time": round(time.time(), 3), **body.model_dump(include=_FEEDBACK), "model": served.id}
        line = json_lines([record])
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
                "max_tokens": self._max_tokens,
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


_FEEDBACK = {"rating", "prompt", "text", "comment"}
_PAGES = jinja2.Environment(
    loader=jinja2.PackageLoader("gptpl", "."), autoescape=True, undefined=jinja2.StrictUndefined
)


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
        content = json.loads(path.read_bytes())
        return {
            str(name): {key: list(map(float, numbers)) for key, numbers in its.items()}
            for name, its in content.items()
        }
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise InputError(f"drift_file={path} is not a file of first outputs: {error}") from error


def _is_local_name(host: str) -> bool:
    """Whether the Host header names this machine itself."""
    try:
        name = urlsplit(f"//{host}").hostname or ""
        return name == "localhost" or ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


# --- clients --------------------------------------------------------------------------------------------


MOST_WRONG_KEYS = 20  # of an address in a minute


class _Clients:
    """How many requests each address has, at the time and within a minute."""

    def __init__(self, most: int, per_minute: int | None) -> None:
        self._most, self._per_minute = most, per_minute
        self._active: dict[str, int] = defaultdict(int)
        self._times: dict[str, deque[float]] = defaultdict(deque)
        self._wrong: dict[str, deque[float]] = defaultdict(deque)

    def begin(self, client: str) -> None:
        """Count a request. Raises ApiError for one too many."""
        if self._active.get(client, 0) >= self._most:
            raise ApiError(429, f"{self._most} requests of yours are being answered already", retry_after=1)
        if self._per_minute is not None:
            _check(self._times, client, self._per_minute, "requests")
            self._times[client].append(time.monotonic())
        self._active[client] += 1

    def check_keys(self, client: str) -> None:
        """Raise ApiError for an address with too many wrong keys in a minute; a right one does not help."""
        _check(self._wrong, client, MOST_WRONG_KEYS, "wrong keys")

    def wrong_key(self, client: str) -> None:
        """Count a wrong key."""
        self._wrong[client].append(time.monotonic())

    def end(self, client: str) -> None:
        """A request that began has ended."""
        self._active[client] -= 1
        if not self._active[client]:
            del self._active[client]


def _check(times: dict[str, deque[float]], client: str, most: int, of: str) -> None:
    """Raise ApiError for an address that has `most` times in the last minute; older ones are forgotten."""
    since = time.monotonic() - 60
    for each in [each for each, its in times.items() if its[-1] < since]:
        del times[each]
    own = times.get(client, deque())
    while own and own[0] < since:
        own.popleft()
    if len(own) >= most:
        wait = math.ceil(own[0] - since) or 1
        raise ApiError(429, f"more than {most} {of} in a minute", retry_after=wait)
