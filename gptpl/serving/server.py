"""A server with OpenAI's API, and pages for people: `gptpl.serve`."""

import asyncio
import html
import math
import threading
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import Future
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aiohttp
from aiohttp import web

from gptpl.data.sources.base import read_utf8
from gptpl.errors import InputError
from gptpl.filters import Filter
from gptpl.runs.loaded import load
from gptpl.runs.models import Classifier, InstructionModel, LanguageModel
from gptpl.serving.api import jinja_prompt, tuned_prompt
from gptpl.serving.engine import Engine
from gptpl.serving.monitoring import INTERVAL, Drift
from gptpl.serving.routes import Routes, Served, is_loopback

API_KEY = "GPTPL_API_KEY"


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """How a server is reached, and its limits.

    Attributes:
        host, port: where it listens; port 0: a free one.
        api_key: clients must send it as a bearer token; None: nobody needs one.
        insecure: whether other machines may be served without `api_key`.
        cors: origins, such as "https://example.org", whose pages may use the server.
        chat_template: a Jinja text, or a file of one, in which models that were not tuned to follow
            instructions are asked.
        filter: judges prompts and texts.
        filter_prompts: whether it judges prompts.
        max_rows: texts of a model that are written at a time.
        prompt_piece: tokens of a prompt that are read between two tokens of the texts beside it.
        kept_mb: memory for what prompts and texts had in common, for each model; 0: nothing is kept.
        max_queue: prompts of a model that wait; more are refused with status 429.
        max_per_client: requests of an address at the same time.
        requests_per_minute: of an address; None: any number.
        max_body_kb: size of a request.
        timeout_s: seconds until a text is ended as too slow.
        grace_s: seconds that requests have to end in when the server stops.
        feedback: a JSON Lines file for what people report; None: they cannot.
        log_texts: whether the log has prompts and texts.
        drift_reference, drift_window, drift_threshold: as for `Drift`.
        drift_file: keeps the first outputs, so that a server that is started again compares with them; None:
            each compares with its own.

    Raises InputError for a number out of range, and for what is not safe.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = None
    insecure: bool = False
    cors: Sequence[str] = ()
    chat_template: str | None = None
    filter: Filter | None = None
    filter_prompts: bool = True
    max_rows: int = 8
    prompt_piece: int = 64
    kept_mb: int = 256
    max_queue: int = 64
    max_per_client: int = 64
    requests_per_minute: int | None = None
    max_body_kb: int = 1024
    timeout_s: float = 600.0
    grace_s: float = 30.0
    feedback: str | Path | None = None
    log_texts: bool = False
    drift_reference: int = 200
    drift_window: int = 50
    drift_threshold: float = 6.0
    drift_file: str | Path | None = None

    def __post_init__(self) -> None:
        least = {"max_rows": 1, "prompt_piece": 1, "kept_mb": 0, "max_queue": 1, "max_per_client": 1}
        least |= {"requests_per_minute": 1, "max_body_kb": 1}
        for name, number in least.items():
            if (value := getattr(self, name)) is not None and value < number:
                raise InputError(f"{name} must be at least {number}, got {value}")
        if not 0 <= self.port <= 65535:
            raise InputError(f"port must be from 0 (a free one) to 65535, got {self.port}")
        for name, above in {"timeout_s": 0.0, "grace_s": -1.0}.items():
            if not above < getattr(self, name) < math.inf:
                raise InputError(f"{name} must be a positive number of seconds, got {getattr(self, name)}")
        if self.api_key is not None and len(self.api_key) < 8:
            raise InputError("api_key must have 8 characters or more: others could guess it")
        for origin in self.cors:
            parts = urlsplit(origin)
            if parts.scheme not in ("http", "https") or not parts.netloc or parts.path:
                raise InputError(f"cors={origin} is no origin: give such as https://example.org")
        if not (self.is_local or self.api_key or self.insecure):
            raise InputError(
                f"host={self.host} lets other machines in: give an api_key (or set {API_KEY}), or say"
                " insecure=true"
            )
        self.drift()

    def drift(self) -> Drift:
        """A new comparison of a model's outputs."""
        return Drift(reference=self.drift_reference, window=self.drift_window, threshold=self.drift_threshold)

    @property
    def is_local(self) -> bool:
        """Whether only this machine reaches the server."""
        return is_loopback(self.host)


def serve(*models: Any, names: Sequence[str] | None = None, **settings: Any) -> "Server":
    """Serve loaded models, or what `gptpl.load` loads; returns when requests are answered.

        with gptpl.serve("runs/tale/2026-11-26_10-00-00", port=0) as server:
            print(server.url)

    `settings` are fields of `ServerSettings`. The server runs in threads of its own until `stop`, or the end
    of the `with`. `names` are the models' in the API; None: their folders'.

    Raises InputError for settings that are out of range or not safe, and for an address in use.
    """
    loaded = [load(model) if isinstance(model, str | Path) else model for model in models]
    server = Server(loaded, ServerSettings(**settings), names=names)
    server.start()
    return server


@asynccontextmanager
async def client(*models: Any, **settings: Any) -> AsyncIterator[aiohttp.ClientSession]:
    """A client of a server of its own, for asynchronous tests of yours and notebooks.

        async with gptpl.serving.client(model) as session:
            answer = await session.post("/v1/completions", json={"prompt": "Every effort moves"})

    Arguments as for `serve`; the server has a free port, and stops at the end.
    """
    server = await asyncio.to_thread(serve, *models, **({"port": 0} | settings))
    try:
        async with aiohttp.ClientSession(server.url) as session:
            yield session
    finally:
        await asyncio.to_thread(server.stop)


class Server:
    """A server of these models, from `start` to `stop`. See `serve`."""

    def __init__(
        self,
        models: Sequence[LanguageModel | Classifier],
        settings: ServerSettings,
        *,
        names: Sequence[str] | None = None,
    ) -> None:
        self.settings = settings
        self.port: int | None = None
        """Where it listens, once it does."""
        if not models:
            raise InputError("no model to serve: give at least one")
        self.names = _names(models) if names is None else list(names)
        """The models' names in the API."""
        if len(set(self.names)) != len(models) or not all(self.names):
            raise InputError(f"names must be {len(models)} different texts, got {self.names}")
        chat = None
        if (source := settings.chat_template) is not None:
            chat = jinja_prompt(_template_text(source))
        self._served: list[Served] = []
        for number, (name, model) in enumerate(zip(self.names, models, strict=True)):
            served = Served(id=name, number=number, model=model)
            if isinstance(model, LanguageModel):
                served.chat = tuned_prompt(model.template) if isinstance(model, InstructionModel) else chat
                served.engine = Engine(
                    model,
                    max_rows=settings.max_rows,
                    piece=settings.prompt_piece,
                    kept_bytes=settings.kept_mb * 2**20,
                    alone=len(models) == 1,
                )
            self._served.append(served)
        self._routes = Routes(self._served, settings)
        self.monitor = self._routes.monitor
        """What the server has done."""
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop = asyncio.Event()
        self._started: Future[None] = Future()
        self._thread = threading.Thread(target=self._run, name="server", daemon=True)

    @property
    def url(self) -> str:
        """Of the page, from this machine; the API's is this and `/v1`."""
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.settings.host, self.settings.host)
        host = f"[{host}]" if ":" in host else host
        return f"http://{host}:{self.port}"

    def start(self) -> None:
        """Start, and return when requests are answered."""
        self._thread.start()
        try:
            self._started.result()
        except (OSError, UnicodeError) as error:  # names of hosts are encoded
            reason = error.strerror or error if isinstance(error, OSError) else error
            raise InputError(
                f"host={self.settings.host} port={self.settings.port} cannot be used ({reason}): give another"
                " port, or 0 for a free one"
            ) from error

    def wait(self, seconds: float | None = None) -> bool:
        """Wait until the server has stopped; returns whether it has."""
        if self._thread.ident is not None:
            self._thread.join(seconds)
        return not self._thread.is_alive()

    def request_stop(self) -> None:
        """Refuse new requests, finish those that have begun, within `grace_s`, and stop."""
        if self._loop is not None:
            with suppress(RuntimeError):  # the loop is closed: it has stopped
                self._loop.call_soon_threadsafe(self._stop.set)

    def stop(self) -> None:
        """`request_stop`, and wait."""
        self.request_stop()
        self.wait()

    def _repr_html_(self) -> str:
        """A link to the page, for notebooks."""
        return (
            f'<a href="{self.url}" target="_blank">{", ".join(map(html.escape, self.names))}: {self.url}</a>'
        )

    def __enter__(self) -> "Server":
        if self._thread.ident is None:
            self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def _run(self) -> None:
        try:
            asyncio.run(self._main())
        except BaseException as error:
            if self._started.done():
                raise
            self._started.set_exception(error)

    async def _main(self) -> None:
        self._loop = asyncio.get_running_loop()
        # Handlers are cancelled when their client leaves: what they wait for ends then.
        runner = web.AppRunner(
            self._routes.app(),
            handler_cancellation=True,
            access_log=None,
            shutdown_timeout=1.0,
            keepalive_timeout=75,
        )
        await runner.setup()
        ticking = asyncio.create_task(self._tick())
        engines = [served.engine for served in self._served if served.engine is not None]
        try:
            site = web.TCPSite(runner, self.settings.host, self.settings.port)
            await site.start()
            self.port = runner.addresses[0][1]
            for engine in engines:
                engine.start()
            self._started.set_result(None)
            await self._stop.wait()
            self._routes.stopping = True
            with suppress(TimeoutError):
                async with asyncio.timeout(self.settings.grace_s):
                    while self._routes.active:
                        await asyncio.sleep(0.02)
        finally:
            ticking.cancel()
            for engine in engines:
                await asyncio.to_thread(engine.stop)
            for served in self._served:
                served.pool.shutdown(wait=False, cancel_futures=True)
            await runner.cleanup()

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(INTERVAL)
            self.monitor.tick()


def _names(models: Sequence[LanguageModel | Classifier]) -> list[str]:
    """The last two parts of the folders of runs, the names of other files; a number where two are equal."""
    names: list[str] = []
    for model in models:
        run_dir = model.run_dir
        parts = (model.path.name,) if run_dir is None else run_dir.absolute().parts[-2:]
        name = "/".join(parts)
        names.append(name if name not in names else f"{name}-{len(names) + 1}")
    return names


def _template_text(source: str) -> str:
    if "{{" in source or "{%" in source:
        return source
    path = Path(source).expanduser()
    if not path.is_file():
        raise InputError(f"chat_template={source} is neither a Jinja text nor a file")
    return read_utf8(path)
