"""Servers of tiny models in this process, and a client that sees what is sent."""

import http.client
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from gptpl.data.instructions.records import PromptTemplate
from gptpl.generation.continuous import ContinuousBatch
from gptpl.model import ClassifierConfig, GPTClassifier, GPTConfig, GPTModel
from gptpl.runs.models import Classifier, InstructionModel, LanguageModel
from gptpl.serving import Server, serve
from gptpl.tokenizers import BytesTokenizer

SIZES: dict[str, Any] = {
    "context_length": 160,
    "emb_dim": 32,
    "n_heads": 4,
    "n_layers": 2,
    "drop_rate": 0.1,
    "qkv_bias": True,
}
PROMPT = "Every effort moves"


def with_opinions(net: torch.nn.Module) -> Any:
    """Logits so far apart that rounding decides nothing."""
    torch.manual_seed(17)
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=0.5)
    return net.eval()


def repeating(base: LanguageModel, cycle: bytes) -> LanguageModel:
    """A model that repeats these bytes, all different."""
    V = base.tokenizer.vocab_size
    net = GPTModel(
        GPTConfig(
            vocab_size=V, context_length=64, emb_dim=V, n_heads=1, n_layers=1, drop_rate=0.0, qkv_bias=False,
            tie_weights=False,
        )
    )  # fmt: skip
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.zero_()
        net.tok_emb.weight.copy_(torch.eye(V))
        net.final_norm.weight.fill_(50.0)
        for byte, following in zip(cycle, [*cycle[1:], cycle[0]], strict=True):
            net.out_head.weight[following, byte] = 1.0
    return LanguageModel(**(vars(base) | {"net": net.eval()}))


@pytest.fixture(scope="session")
def base() -> LanguageModel:
    torch.manual_seed(8)
    tokenizer = BytesTokenizer()
    net = GPTModel(GPTConfig(vocab_size=tokenizer.vocab_size, **SIZES))
    return LanguageModel(
        path=Path("/nowhere/tale"),
        net=with_opinions(net),
        tokenizer=tokenizer,
        run_config={},
        step=7,
        lineage={},
    )


@pytest.fixture(scope="session")
def instruct(base: LanguageModel) -> InstructionModel:
    own = vars(base) | {"path": Path("/nowhere/tuned"), "template": PromptTemplate.named("phi3")}
    return InstructionModel(**own)


@pytest.fixture(scope="session")
def spam(base: LanguageModel) -> Classifier:
    torch.manual_seed(8)
    net = GPTClassifier(
        GPTConfig(vocab_size=base.tokenizer.vocab_size, **SIZES),
        ClassifierConfig(n_classes=2),
    )
    return Classifier(
        path=Path("/nowhere/spam"), net=with_opinions(net), tokenizer=base.tokenizer, run_config={}, step=3,
        lineage={}, labels=("ham", "spam"), max_length=60, padded_to=None,
    )  # fmt: skip


def until(done: Callable[[], object], seconds: float = 20.0) -> None:
    """Wait until something is true."""
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end, "it has not come true in time"
        time.sleep(0.01)


def slow_down(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    """Steps that take so much longer."""
    original = ContinuousBatch.step

    def step(self: ContinuousBatch) -> None:
        time.sleep(seconds)
        original(self)

    monkeypatch.setattr(ContinuousBatch, "step", step)


def hold_steps(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Every step ends when the event is set. A server tries its threads first: let it answer before."""
    original, released = ContinuousBatch.step, threading.Event()

    def step(self: ContinuousBatch) -> None:
        original(self)
        released.wait(60)

    monkeypatch.setattr(ContinuousBatch, "step", step)
    return released


class Client:
    """Requests to a server: `(status, body)`, JSON where it is JSON."""

    def __init__(self, server: Server) -> None:
        assert server.port is not None
        self.port = server.port

    @contextmanager
    def sent(
        self, method: str, path: str, body: bytes | None = None, /, **headers: str
    ) -> Iterator[http.client.HTTPResponse]:
        """The answer to a request, while it comes."""
        with closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)) as connection:
            named = {name.replace("_", "-"): value for name, value in headers.items()}
            connection.request(method, path, body, named)
            with connection.getresponse() as response:
                yield response

    @contextmanager
    def begun(self, path: str, body: bytes) -> Iterator[socket.socket]:
        """A request that has been sent; leaving the context hangs up."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=30) as connection:
            head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
            yield connection

    def ask(self, method: str, path: str, body: bytes | None = None, /, **headers: str) -> tuple[int, Any]:
        with self.sent(method, path, body, **headers) as response:
            data = response.read()
            is_json = response.headers.get_content_type() == "application/json"
            return response.status, json.loads(data) if is_json else data

    def get(self, path: str, **headers: str) -> tuple[int, Any]:
        return self.ask("GET", path, **headers)

    def post(self, path: str, body: Any, **headers: str) -> tuple[int, Any]:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        return self.ask("POST", path, data, **({"Content_Type": "application/json"} | headers))

    def complete(self, prompt: Any = PROMPT, **body: Any) -> Any:
        status, answer = self.post("/v1/completions", {"prompt": prompt, "temperature": 0} | body)
        assert status == 200, answer
        return answer

    def refused(self, path: str, body: Any, **headers: str) -> tuple[int, dict[str, Any]]:
        """The status and the error of a request that is refused in OpenAI's way."""
        status, answer = self.post(path, body, **headers)
        assert status >= 400
        assert answer["error"].keys() - {"room"} == {"message", "type", "param", "code"}
        return status, answer["error"]

    def stream(self, path: str, body: Any) -> tuple[list[Any], bool]:
        """The events of a stream, and whether it has its proper end."""
        data = json.dumps({"stream": True, **body}).encode()
        with self.sent("POST", path, data, Content_Type="application/json") as response:
            assert response.headers["Content-Type"].startswith("text/event-stream"), response.read()
            events = [line.removeprefix(b"data: ") for line in response.read().split(b"\n\n") if line]
        ended = events[-1] == b"[DONE]"
        return [json.loads(event) for event in (events[:-1] if ended else events)], ended


@pytest.fixture
def start() -> Iterator[Callable[..., tuple[Server, Client]]]:
    """`start(*models, **settings)`: a server on a free port, stopped at the end, and a client of it."""
    with ExitStack() as running:

        def started(*models: Any, **settings: Any) -> tuple[Server, Client]:
            server = running.enter_context(serve(*models, **({"port": 0, "grace_s": 1.0} | settings)))
            return server, Client(server)

        yield started


@pytest.fixture(scope="module")
def client(base: LanguageModel, instruct: InstructionModel, spam: Classifier) -> Iterator[Client]:
    """A client of a server of all three models."""
    with serve(base, instruct, spam, port=0, max_rows=4, prompt_piece=8) as server:
        yield Client(server)
