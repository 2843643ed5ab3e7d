"""A model that writes texts for many requests at a time, in a thread of its own."""

import logging
import math
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch

from gptpl.filters import Filter
from gptpl.generation import Piece, SamplingRules, TokenDetails
from gptpl.generation.continuous import ContinuousBatch, Request
from gptpl.generation.text import Continuation, TextStream, text_rules
from gptpl.model.protocol import device_of, vocab_size
from gptpl.runs.models import LanguageModel
from gptpl.tokenizers import Tokenizer

log = logging.getLogger(__name__)

_TRIALS = 6  # steps with each number of threads
_LONG_STEP = 0.02  # seconds, most of them in products, which use all threads
_FASTER = 0.9
_SWITCH = 0.0002  # seconds


@dataclass(frozen=True, kw_only=True)
class TokenText:
    """A token as text, the details of its choice, and those of the alternatives as texts.

    The texts of a continuation's tokens are together its text: a character's bytes may be spread over several
    tokens, of which the last one has it.
    """

    text: str
    details: TokenDetails | None
    alternatives: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True, kw_only=True)
class PromptRead:
    """The prompt has been read, `shared` of its tokens from an earlier one; `token_texts` where asked for."""

    shared: int
    token_texts: tuple[TokenText, ...] | None


@dataclass(frozen=True, kw_only=True)
class Delta(Piece):
    """The next piece of a sample's text; `token_texts`, where asked for, are those that end in it."""

    token_texts: tuple[TokenText, ...] | None


@dataclass(frozen=True, kw_only=True)
class Failure:
    """The end of all samples by an error of this kind."""

    kind: str  # "timeout", "server_error" or "unavailable"
    message: str


Event = PromptRead | Delta | Failure


class Generation(Request):
    """A request for texts, whose events `deliver` is given in the engine's thread.

    Args:
        model: whose tokenizer reads and writes.
        prompt: token ids.
        logprobs: number of alternatives with each token; None: no `token_texts` in the events. Texts that a
            filter may change have none.
        echo: whether the prompt's own tokens have details.
        stop: texts that end a sample.
        filter: judges each sample.
        seconds: until it is ended as too slow.

    The other arguments are those of `Request`. Raises InputError for a token id unknown to the tokenizer.
    """

    def __init__(
        self,
        model: LanguageModel,
        prompt: Sequence[int],
        *,
        deliver: Callable[[Event], None],
        rules: SamplingRules,
        max_new_tokens: int,
        num_samples: int = 1,
        seed: int | None = None,
        logprobs: int | None = None,
        echo: bool = False,
        logit_bias: Mapping[int, float] | None = None,
        stop: Sequence[str] = (),
        filter: Filter | None = None,
        seconds: float = 600.0,
    ) -> None:
        tokenizer = model.tokenizer
        tokenizer.known_ids(prompt)
        super().__init__(
            list(prompt),
            rules=text_rules(rules, tokenizer, vocab_size(model.net)),
            max_new_tokens=max_new_tokens,
            num_samples=num_samples,
            seed=seed,
            alternatives=logprobs or 0,  # the details of the token itself are monitored
            prompt_details=echo and logprobs is not None,
            logit_bias=logit_bias,
        )
        self.deliver, self.seconds = deliver, seconds
        self.deadline = time.monotonic() + seconds
        self._tokenizer = tokenizer
        self.samples = [
            Continuation(tokenizer, prompt, sample=sample, stop=stop, detailed=True, filter=filter)
            for sample in range(self.num_samples)
        ]
        """All tokens and details of those that have ended, also where a filter hides them."""
        self._token_texts = [
            None if logprobs is None else _TokenTexts(tokenizer, prompt) for _ in self.samples
        ]

    def on_prompt(self, *, shared: int, details: list[TokenDetails] | None) -> None:
        """Tell how much was read, and the prompt's own tokens."""
        found = None
        if details is not None:
            texts = _TokenTexts(self._tokenizer, ())
            for token, each in zip(self.prompt, [None, *details], strict=True):
                texts.push(token, each)
            found = texts.within(sys.maxsize, final=True)
        self.deliver(PromptRead(shared=shared, token_texts=found))

    def on_token(self, sample: int, token: int, details: TokenDetails | None) -> bool:
        """Pass the text on that this token makes certain."""
        continuation, texts = self.samples[sample], self._token_texts[sample]
        if texts is not None and token != continuation.eot_id:
            texts.push(token, details)
        try:
            piece = continuation.take(token, details)
            if piece.completion is None and len(continuation.tokens) == self.max_new_tokens:
                last = continuation.close("length")
                piece = replace(last, text=piece.text + last.text)
        except Exception as error:  # a filter of the user may raise any
            log.exception("a text could not be judged")
            self.fail(f"the text could not be judged: {error}", "server_error")
            return False
        if piece.text or piece.completion is not None:
            found = None
            if texts is not None:
                found = texts.within(len(continuation.text), final=piece.completion is not None)
            self.deliver(Delta(**vars(piece), token_texts=found))
        return piece.completion is None

    def on_error(self, message: str) -> None:
        """Tell of the model's failure, which ends all samples."""
        self.deliver(Failure(kind="server_error", message=message))

    def fail(self, message: str, kind: str) -> None:
        """End all samples, unless they have ended."""
        if not self.cancelled:
            self.cancelled = True
            self.deliver(Failure(kind=kind, message=message))


class _TokenTexts:
    """The texts of tokens, each with its details, held until they lie within a text."""

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int]) -> None:
        self._stream, self._tokenizer = TextStream(tokenizer, prompt), tokenizer
        self._held: deque[TokenText] = deque()
        self._end = 0  # of the characters given

    def push(self, token: int, details: TokenDetails | None) -> None:
        others = () if details is None else details.alternatives
        alternatives = tuple((self._shown(other), log_p) for other, log_p in others)
        text = self._stream.push(token)
        self._held.append(TokenText(text=text, details=details, alternatives=alternatives))

    def within(self, length: int, *, final: bool) -> tuple[TokenText, ...]:
        """Those that end within the first `length` characters; of a final text all that begin there."""
        if final and self._held:
            last = self._held.pop()
            self._held.append(replace(last, text=last.text + self._stream.rest()))
        found = []
        while self._held:
            end = self._end + len(self._held[0].text)
            if (self._end >= length) if final else (end > length):
                break
            found.append(self._held.popleft())
            self._end = end
        return tuple(found)

    def _shown(self, token: int) -> str:
        if token >= self._tokenizer.vocab_size:  # a model may have more rows than its tokenizer has tokens
            return ""
        if token == self._tokenizer.eot_id:
            return self._tokenizer.decode([token])
        return self._stream.with_token(token)


class _Trial(Request):
    """Texts that nobody reads."""

    def on_token(self, sample: int, token: int, details: TokenDetails | None) -> bool:
        return True

    def on_error(self, message: str) -> None:
        log.warning("the model cannot write: %s", message)


class Engine:
    """Continues the requests of a model together, see `ContinuousBatch`, from `start` to `stop`.

    One that is `alone` in its process uses one thread of a CPU if steps are faster so, and has Python's lock
    change hands sooner: by default a step waits up to 5 ms for it at each of its operations while the event
    loop has it.
    """

    def __init__(
        self, model: LanguageModel, *, max_rows: int, piece: int, kept_bytes: int, alone: bool = False
    ) -> None:
        self.model, self._alone = model, alone
        self.batch = ContinuousBatch(model.net, max_rows=max_rows, piece=piece, kept_bytes=kept_bytes)
        self.alive = False
        """Whether requests are continued."""
        self._new: deque[Generation] = deque()
        self._wake = threading.Condition()
        self._stopping = False
        self._thread = threading.Thread(target=self._work, name=f"engine of {model.path.name}", daemon=True)

    @property
    def queued(self) -> int:
        """Requests without a place."""
        return len(self._new) + len(self.batch.waiting)

    def start(self) -> None:
        """Start the thread."""
        self.alive = True
        self._thread.start()

    def submit(self, generation: Generation) -> None:
        """Have a request continued that has passed the batch's `check`; `cancelled` ends it."""
        with self._wake:
            if not self.alive or self._stopping:
                generation.fail("the server is stopping", "unavailable")
                return
            self._new.append(generation)
            self._wake.notify()

    def stop(self) -> None:
        """End all requests, and the thread."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        if self._thread.is_alive():
            self._thread.join()

    def _work(self) -> None:
        threads, interval = torch.get_num_threads(), sys.getswitchinterval()
        try:
            if self._alone:
                sys.setswitchinterval(_SWITCH)
                if threads > 1 and device_of(self.model.net).type == "cpu":
                    self._guarded(partial(self._choose_threads, threads))
            while self._has_work():
                for generation in self._generations():
                    if time.monotonic() > generation.deadline:
                        generation.fail(f"not finished within {generation.seconds:g} seconds", "timeout")
                self._guarded(self.batch.step)
        finally:
            torch.set_num_threads(threads)
            sys.setswitchinterval(interval)
            self.alive = False
            with self._wake:
                self._take_new()
            self._fail_all("the server is stopping", "unavailable")

    def _guarded(self, work: Callable[[], None]) -> None:
        """Do something with the batch; if it fails, end what is in it."""
        try:
            work()
        except Exception as error:  # such as no memory for another row
            log.exception("a step failed; its requests are ended")
            self._fail_all(f"the model failed: {error}", "server_error")
            self.batch.clear()

    def _choose_threads(self, most: int) -> None:
        """Use one thread where steps are faster so: the threads of a small model only wait for each other."""
        seconds = {most: math.inf, 1: math.inf}
        room = self.batch.context_length - 1
        trial = _Trial([0], rules=SamplingRules(), max_new_tokens=room, num_samples=self.batch.max_rows)
        self.batch.add(trial)
        self.batch.step()
        for threads in [most, 1] * _TRIALS:
            if not self.batch.busy or _LONG_STEP < seconds[most] < math.inf:
                break
            torch.set_num_threads(threads)
            started = time.perf_counter()
            self.batch.step()
            seconds[threads] = min(seconds[threads], time.perf_counter() - started)
        self.batch.clear()
        torch.set_num_threads(1 if seconds[1] < _FASTER * seconds[most] else most)

    def _has_work(self) -> bool:
        """Wait for requests; False when the engine stops."""
        with self._wake:
            self._wake.wait_for(lambda: self._stopping or self._new or self.batch.busy)
            self._take_new()
            return not self._stopping

    def _take_new(self) -> None:
        while self._new:
            self.batch.add(self._new.popleft())

    def _generations(self) -> list[Generation]:
        return [each for each in self.batch.requests() if isinstance(each, Generation)]

    def _fail_all(self, message: str, kind: str) -> None:
        for generation in self._generations():
            generation.fail(message, kind)
