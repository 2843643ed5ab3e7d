"""Requests that come and go: each has the text that it gets alone, whatever is decoded beside it."""

import random
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gptpl.errors import InputError
from gptpl.generation import Decoding, SamplingRules, TokenDetails
from gptpl.generation.continuous import MIN_SHARED, MOST_KEPT, ContinuousBatch, Request
from gptpl.generation.sampling import seeded_generator
from gptpl.model import CachedGPT, GPTConfig, GPTModel

V, C, END = 37, 48, 0
MODERN = {"position": "rope", "norm": "rmsnorm", "feed_forward": "swiglu", "linear_bias": False}
RULES = (
    SamplingRules(),
    SamplingRules(temperature=1.0, top_k=9),
    SamplingRules(temperature=0.9, repetition_penalty=1.4),
    SamplingRules(temperature=1.3, frequency_penalty=0.8, banned_tokens=(3, 4)),
    SamplingRules(temperature=1.0, forced_tokens=(5, 6)),
)


def build(**changes: Any) -> GPTModel:
    torch.manual_seed(11)
    sizes: dict[str, Any] = {"vocab_size": V, "context_length": C, "emb_dim": 32, "n_heads": 4, "n_layers": 2}
    model = GPTModel(GPTConfig(**{**sizes, "drop_rate": 0.5, "qkv_bias": True, **changes}))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=0.5)
    return model


class Recorded(Request):
    """Keeps everything it is told; a text ends with END."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.written: dict[int, list[int]] = defaultdict(list)
        self.details: list[TokenDetails | None] = []
        self.shared: int | None = None
        self.of_prompt: list[TokenDetails] | None = None
        self.errors: list[str] = []

    def on_prompt(self, *, shared: int, details: list[TokenDetails] | None) -> None:
        self.shared, self.of_prompt = shared, details

    def on_token(self, sample: int, token: int, details: TokenDetails | None) -> bool:
        self.written[sample].append(token)
        self.details.append(details)
        return token != END

    def on_error(self, message: str) -> None:
        self.errors.append(message)

    @property
    def texts(self) -> list[list[int]]:
        return [self.written[sample] for sample in range(self.num_samples)]


def request(prompt: list[int], *, new: int = 8, rules: SamplingRules = RULES[0], **settings: Any) -> Recorded:
    return Recorded(prompt, rules=rules, max_new_tokens=new, **settings)


def alone(model: nn.Module, given: Request) -> list[list[int]]:
    decoding = Decoding(
        model,
        [given.prompt],
        rules=given.rules,
        max_new_tokens=given.max_new_tokens,
        num_samples=given.num_samples,
        eot_id=END,
        generator=seeded_generator(given.seed or 0, torch.device("cpu")),
    )
    while decoding.step():
        pass
    return decoding.written


def run(batch: ContinuousBatch, *requests: Recorded, after: Callable[[int], None] | None = None) -> int:
    """Have all of them continued together; returns the number of steps."""
    for each in requests:
        batch.add(each)
    steps = 0
    while batch.busy:
        batch.step()
        steps += 1
        if after is not None:
            after(steps)
    return steps


class Uncached(nn.Module):
    """A model of another class: nothing but `forward` and its two numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = build()
        self.vocab_size, self.context_length = V, C

    def forward(self, tokens: Tensor) -> Tensor:
        return self.inner(tokens)


@pytest.mark.parametrize("make", [build, lambda: build(**MODERN), Uncached], ids=["gpt2", "modern", "other"])
@pytest.mark.parametrize("piece", [3, 64])
def test_requests_that_come_and_go_at_random_have_the_texts_that_they_get_alone(make, piece):
    model, numbers = make(), random.Random(piece)
    beginning = [numbers.randrange(1, V) for _ in range(MIN_SHARED + 4)]
    requests = [
        request(
            (beginning if number % 3 == 0 else [])
            + [numbers.randrange(1, V) for _ in range(numbers.choice([1, 2, 9, 15]))],
            new=numbers.choice([1, 3, 12]),
            rules=numbers.choice(RULES),
            num_samples=numbers.choice([1, 1, 2, 4]),
            seed=number,
        )
        for number in range(30)
    ]
    batch = ContinuousBatch(model, max_rows=4, piece=piece, kept_bytes=10**7)
    to_come = list(requests)
    while to_come or batch.busy:
        for _ in range(numbers.choice([0, 0, 1, 2])):
            if to_come:
                batch.add(to_come.pop(0))
        batch.step()
        assert batch.rows <= 4
    assert [each.texts for each in requests] == [alone(model, each) for each in requests]
    if make is not Uncached:
        assert {each.shared for each in requests[3::3]} >= {len(beginning)}


def test_the_tokens_of_a_common_beginning_are_read_once(monkeypatch):
    model = build()
    read: list[int] = []
    original = GPTModel.hidden

    def counted(self: GPTModel, tokens: Tensor, *others: Any, **settings: Any) -> Tensor:
        read.append(tokens.numel())
        return original(self, tokens, *others, **settings)

    monkeypatch.setattr(GPTModel, "hidden", counted)
    batch = ContinuousBatch(model, max_rows=2, kept_bytes=10**7)
    beginning = list(range(1, MIN_SHARED + 2))
    first, second = request([*beginning, 30], new=1), request([*beginning, 31], new=1)
    run(batch, first)
    assert sum(read) == len(first.prompt)
    read.clear()
    run(batch, second)
    assert (sum(read), second.shared) == (1, len(beginning))
    # The text that was written is known, too: the next turn of a conversation begins with it.
    first = request(beginning, new=6)
    run(batch, first)
    turn = request([*beginning, *first.texts[0], 9, 8], new=2)
    run(batch, turn)
    assert turn.shared == len(beginning) + 5  # the last token had not been read
    assert turn.texts == alone(model, turn)


@pytest.mark.parametrize(
    ("lengths", "read"),
    [((20, 20, 20), [60]), ((30, 25, 5), [90]), ((40, 7, 7), [40, 14]), ((50, 8, 8), [50, 16, 6])],
)
def test_prompts_of_similar_lengths_are_read_side_by_side(lengths, read, monkeypatch):
    found: list[int] = []
    original = GPTModel.hidden

    def counted(self: GPTModel, tokens: Tensor, *others: Any, **settings: Any) -> Tensor:
        found.append(tokens.numel())
        return original(self, tokens, *others, **settings)

    model = build(context_length=64)
    monkeypatch.setattr(GPTModel, "hidden", counted)
    batch = ContinuousBatch(model, max_rows=3, piece=60)
    for number, length in enumerate(lengths):
        batch.add(request([number + 1] * length, new=1))
    while batch.busy:
        batch.step()
    assert found == read


def test_kept_beginnings_stay_within_their_memory_and_the_least_used_goes_first():
    model = build()
    prompts = [[number] * 20 for number in (1, 2, 3)]
    one = 2 * 2 * 20 * 32 * 4  # layers, keys and values, tokens, D, bytes
    batch = ContinuousBatch(model, max_rows=2, kept_bytes=5 * one // 2)
    for prompt in (prompts[0], prompts[1], prompts[0], prompts[2]):
        run(batch, request(prompt, new=1))
    shared = []
    for prompt in (prompts[0], prompts[2], prompts[1]):
        again = request([*prompt, 5], new=1)
        run(batch, again)
        shared.append(again.shared)
    assert shared == [20, 20, 0]


def test_nothing_is_kept_without_memory_for_it():
    batch, prompt = ContinuousBatch(build(), max_rows=1), list(range(1, 31))
    first, again = request(prompt), request(prompt)
    run(batch, first, again)
    assert again.shared == 0
    assert again.texts == first.texts


def test_a_long_prompt_delays_a_short_one_by_a_piece_only():
    batch = ContinuousBatch(build(), max_rows=3, piece=4)
    writing, long, short = request([1], new=30), request([2] * 40, new=2), request([3], new=2)
    batch.add(writing)
    batch.step()
    batch.add(long)
    batch.add(short)
    before = len(writing.written[0])
    batch.step()  # the first piece of the long prompt
    batch.step()  # the short prompt
    assert len(short.written[0]) > 0 == len(long.written[0])
    assert len(writing.written[0]) == before + 2  # a token at every step
    while batch.busy:
        batch.step()
    assert long.texts == alone(build(), long)


def test_a_request_starts_in_its_turn_when_all_its_samples_have_a_place():
    batch = ContinuousBatch(build(), max_rows=3)
    first, wide, last = (
        request([1], new=6, num_samples=2),
        request([2], new=2, num_samples=3),
        request([3], new=1),
    )
    for each in (first, wide, last):
        batch.add(each)
    batch.step()
    assert list(batch.waiting) == [wide, last]
    while batch.busy:
        batch.step()
        assert bool(wide.written) or not last.written
    assert wide.texts == alone(build(), wide)


def test_a_cancelled_request_frees_its_place_and_leaves_others_alone():
    model = build()
    batch = ContinuousBatch(model, max_rows=2, piece=4)
    stays, leaves, waits = request([1, 2], new=12), request([3], new=40), request([5, 6], new=12)
    reading = request([4] * 40, new=2)

    def after(step: int) -> None:
        if step == 3:
            leaves.cancelled = True
        if step == 4:
            assert batch.rows == 2  # the one that waited has the place
            batch.add(reading)
        if step == 14:
            reading.cancelled = True

    run(batch, stays, leaves, waits, after=after)
    assert stays.texts == alone(model, stays)
    assert waits.texts == alone(model, waits)
    assert len(leaves.written[0]) <= 4
    assert batch.rows == batch.tokens == 0


def test_logits_that_are_not_finite_end_their_own_request_only():
    model, rules = build(tie_weights=False), SamplingRules(banned_tokens=(30,))
    with torch.no_grad():
        model.tok_emb.weight[30] = torch.nan
    batch = ContinuousBatch(model, max_rows=2)
    damaged, well = request([30, 1]), request([1, 2], rules=rules)
    run(batch, damaged, well)
    [error] = damaged.errors
    assert "not finite" in error
    expected = alone(model, well)
    assert (well.errors, well.texts) == ([], expected)
    later = [request([1, 2], rules=rules), request([1, 2], rules=rules)]  # in the place of the damaged one
    run(batch, *later)
    assert [each.texts for each in later] == [expected, expected]


def test_what_is_not_finite_is_not_kept_for_prompts_that_begin_alike(monkeypatch):
    model, prompt = build(), list(range(1, 30))
    batch = ContinuousBatch(model, max_rows=2, kept_bytes=10**7)
    original = CachedGPT.read

    def damaged(self: CachedGPT, *given: Any, **settings: Any) -> list[Tensor]:
        return [logits * torch.nan for logits in original(self, *given, **settings)]

    with monkeypatch.context() as patch:
        patch.setattr(CachedGPT, "read", damaged)
        first = request(prompt)
        run(batch, first)
    assert first.errors
    again = request(prompt)
    run(batch, again)
    assert (again.errors, again.shared, again.texts) == ([], 0, alone(model, again))


def test_a_prompt_is_found_among_many_beginnings():
    model = build()
    batch = ContinuousBatch(model, max_rows=1, kept_bytes=10**9)
    numbers = random.Random(2)
    prompts = [[numbers.randrange(1, V) for _ in range(20)] for _ in range(MOST_KEPT + 10)]
    for prompt in prompts:
        run(batch, request(prompt, new=1))
    shared = []
    for prompt in (prompts[0], prompts[-1], prompts[50]):
        again = request([*prompt, 3], new=1)
        run(batch, again)
        shared.append(again.shared)
    assert shared == [0, 20, 20]


def test_rules_by_which_nothing_can_be_drawn_end_their_own_request_only():
    model = build()
    extreme = request([1, 2], rules=SamplingRules(temperature=1.0, repetition_penalty=1e-320))
    well = request([1, 2], rules=RULES[1], seed=1)
    run(ContinuousBatch(model), extreme, well)
    [error] = extreme.errors
    assert "no token can be chosen by temperature 1, repetition penalty" in error
    assert (well.errors, well.texts) == ([], alone(model, well))


def test_details_are_the_model_s_own_distribution_also_of_the_prompt():
    model, prompt = build().eval(), [5, 9, 2, 7, 7, 1, 30]
    given = request(
        prompt, new=5, rules=SamplingRules(temperature=0.5, banned_tokens=(2,)), seed=3, alternatives=4,
        prompt_details=True,
    )  # fmt: skip
    run(ContinuousBatch(model, piece=3, kept_bytes=10**6), given)
    assert given.of_prompt is not None
    tokens = [*prompt, *given.written[0]]
    with torch.no_grad():
        log_p = model(torch.tensor([tokens]))[0].log_softmax(-1)
    found = [*given.of_prompt, *given.details]
    for position, (token, each) in enumerate(zip(tokens[1:], found, strict=True)):
        assert each is not None
        assert each.log_probability == pytest.approx(float(log_p[position, token]), abs=1e-4)
        best = log_p[position].topk(4).indices.tolist()
        assert [other for other, _ in each.alternatives] == best


def test_a_prompt_alone_can_be_scored():
    given = request([5, 9, 2], new=0, alternatives=0, prompt_details=True)
    run(ContinuousBatch(build()), given)
    assert given.of_prompt is not None
    assert len(given.of_prompt) == 2
    assert given.written == {}


def test_a_bias_moves_logits_of_its_own_request_only():
    model = build()
    forced = request([1, 2], new=4, logit_bias={17: 1e4})
    free = request([1, 2], new=4)
    run(ContinuousBatch(model), forced, free)
    assert forced.texts == [[17] * 4]
    assert free.texts == alone(model, free)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"prompt": []}, "at least one token"),
        ({"prompt": [V]}, "token ids from 0 to 36"),
        ({"prompt": [1] * 41}, "context holds 48 tokens, the request needs 49: 41 of the prompt and 8"),
        ({"num_samples": 9}, "num_samples must be from 1 to 8, got 9"),
        ({"rules": SamplingRules(temperature=1.0, top_k=V + 1)}, "top_k must be from 1 to 37"),
        ({"logit_bias": {V: 1.0}}, "logit_bias must hold token ids"),
        ({"alternatives": -1}, "alternatives must be from 0"),
        ({"new": -1}, "max_new_tokens must be at least 0"),
        ({"seed": 2**64}, "seed must be"),
    ],
)
def test_what_cannot_be_done_is_refused_before_it_waits(settings, message):
    batch = ContinuousBatch(build())
    with pytest.raises(InputError, match=message):
        batch.add(request(**{"prompt": [1], **settings}))
    assert not batch.busy


@pytest.mark.parametrize("name", ["max_rows", "piece"])
def test_sizes_must_be_positive(name):
    with pytest.raises(InputError, match=f"{name} must be at least 1, got 0"):
        ContinuousBatch(build(), **{name: 0})


def test_a_whole_context_can_be_used():
    model = build()
    full, other = request(list(range(1, 37)), new=12), request([1], new=47, seed=1, rules=RULES[1])
    run(ContinuousBatch(model, max_rows=2), full, other)
    assert [full.texts, other.texts] == [alone(model, full), alone(model, other)]


def test_a_cleared_batch_starts_afresh():
    model = build()
    batch = ContinuousBatch(model, max_rows=2, kept_bytes=10**6)
    for _ in range(3):
        batch.add(request([1] * 20, new=20))
    batch.step()
    batch.clear()
    assert not batch.busy
    again = request([1] * 20)
    run(batch, again)
    assert again.shared == 0
    assert again.texts == alone(model, again)


def test_what_is_not_finite_does_not_stay_in_a_slot():
    model, well = build(tie_weights=False), SamplingRules(banned_tokens=(30,))
    with torch.no_grad():
        model.tok_emb.weight[30] = torch.nan
    batch = ContinuousBatch(model, max_rows=2)
    run(batch, request([30] * 9))  # longer than what has its slot next
    later = [request([1, 2], rules=well), request(list(range(1, 16)), rules=well)]
    run(batch, *later)
    assert [each.errors for each in later] == [[], []]
    assert [each.texts for each in later] == [alone(model, each) for each in later]


def test_nor_behind_a_shorter_row_that_takes_its_slot():
    model, well = build(tie_weights=False), SamplingRules(banned_tokens=(30,))
    with torch.no_grad():
        model.tok_emb.weight[30] = torch.nan
    damaged = request([1] * 9, rules=SamplingRules(forced_tokens=(5, 5, 5, 5, 30)), new=20)
    long, short = request(list(range(1, 16)), rules=well, new=20), request([1, 2], rules=well, new=20)
    run(ContinuousBatch(model, max_rows=3), damaged, long, short)
    assert damaged.errors
    assert (long.errors, short.errors) == ([], [])
    assert [long.texts, short.texts] == [alone(model, long), alone(model, short)]


def test_a_prompt_that_is_being_read_can_be_cancelled():
    batch = ContinuousBatch(build(), max_rows=1, piece=4)
    reading, waits = request([4] * 40), request([5], new=1)
    batch.add(reading)
    batch.add(waits)
    batch.step()
    reading.cancelled = True
    batch.step()
    assert waits.written
    assert not reading.written
