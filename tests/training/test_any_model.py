"""A stranger's model, which shares no line with `GPTModel`: trained, resumed, sampled, saved, refused."""

# C context length, V vocabulary

import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gptpl.callbacks.checkpoints import LastCheckpoint
from gptpl.callbacks.metrics import Throughput
from gptpl.callbacks.samples import SampleText
from gptpl.callbacks.stopping import RunStopped, StopAtBoundary
from gptpl.checkpoints.format import HEADER_KEY, check_same_model, model_config, read_checkpoint
from gptpl.checkpoints.loading import LoadedCheckpoint, RunWeights, load_model, write_model
from gptpl.checkpoints.resume_state import state_digest
from gptpl.errors import InputError
from gptpl.evaluation.likelihood import evaluate, score_groups, surprisals
from gptpl.generation import SamplingRules, complete, search_text
from gptpl.model import CachedGPT, GPTConfig, GPTModel
from gptpl.model.loss import training_loss
from gptpl.model.parameters import TuneHead, TuneLastBlock, TuneLowRank
from gptpl.model.protocol import cached_form, check_language_model, gpt_model, has_fused_head
from gptpl.tokenizers import BytesTokenizer
from gptpl.training.classification import ClassificationModule
from gptpl.training.performance import choose_fast_path
from gptpl.training.sharding import shard
from gptpl.weights.starting import PublishedWeights, RandomWeights

V, C = 257, 16
NAME = f"{__name__}.TinyRNN"


class TinyRNN(nn.Module):
    """A GRU over an embedding of its own."""

    def __init__(self, *, width: int, vocab_size: int, context_length: int, p: float = 0.1) -> None:
        super().__init__()
        self.vocab_size, self.context_length = vocab_size, context_length
        self.table = nn.Embedding(vocab_size, width)
        self.rnn = nn.GRU(width, width, batch_first=True)
        self.drop = nn.Dropout(p)
        self.classify = nn.Linear(width, vocab_size)

    def forward(self, tokens: Tensor) -> Tensor:
        states, _ = self.rnn(self.drop(self.table(tokens)))
        logits: Tensor = self.classify(states)
        return logits


NODE = {"_target_": NAME, "width": 24, "vocab_size": V, "context_length": C}


def build(node: Mapping[str, Any]) -> nn.Module:
    """Stands for the `instantiate` of whoever trusts this package."""
    assert node["_target_"] == NAME
    return TinyRNN(**{name: value for name, value in node.items() if name != "_target_"})


@pytest.fixture
def net() -> TinyRNN:
    torch.manual_seed(3)
    return TinyRNN(width=24, vocab_size=V, context_length=C)


@pytest.fixture
def saved(pretraining, net, tmp_path) -> LoadedCheckpoint:
    """The stranger's model after four steps, read back."""
    module = pretraining.module(net, total_steps=4, model_config=NODE)
    pretraining.fit(LastCheckpoint(dirpath=str(tmp_path / "checkpoints")), module=module)
    loaded = load_model(tmp_path / "checkpoints/last.ckpt", build=build)
    for name, weight in net.state_dict().items():
        assert loaded.net.state_dict()[name].equal(weight), name
    return loaded


# --- training -------------------------------------------------------------------------------------------


def test_ten_steps_and_evaluations_are_those_of_a_plain_loop(pretraining, net):
    net.drop.p = 0.0
    expected = TinyRNN(width=24, vocab_size=V, context_length=C)
    expected.load_state_dict(net.state_dict())
    expected.drop.p = 0.0
    data = pretraining.data()
    pretraining.fit(Throughput(), module=pretraining.module(net, total_steps=10), data=data)

    optimizer = pretraining.optimizer(expected)
    losses: dict[int, float] = {}
    batches = list(zip(range(1, 11), data.train_dataloader(), strict=False))
    for step, (inputs, targets) in batches:
        for group in optimizer.param_groups:
            factor = pretraining.schedule.factor(step - 1, total_steps=10, peak_lr=pretraining.lr)
            group["lr"] = pretraining.lr * factor
        loss = F.cross_entropy(expected(inputs).flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(expected.parameters(), 1.0)
        optimizer.step()
        losses[step] = loss.item()
    assert pretraining.column("train/loss") == pytest.approx(losses, abs=1e-6)
    assert losses[1] - losses[10] > 0.5
    found = [
        (F.cross_entropy(expected(inputs).flatten(0, 1), targets.flatten(), reduction="sum"), targets.numel())
        for inputs, targets in data.val_dataloader()[1]
    ]
    mean = sum(total.item() for total, _ in found) / sum(count for _, count in found)
    assert pretraining.column("val/loss")[10] == pytest.approx(mean, abs=1e-6)
    header = (pretraining.folder / "metrics.csv").read_text().partition("\n")[0]
    assert "tokens_per_second" in header  # the speed is known, and its share of an unknown arithmetic is not
    assert "mfu" not in header


def test_a_resumed_run_ends_with_the_same_bits(pretraining, tmp_path):
    def run(folder: Path, *, stop: int | None = None, resume: Path | None = None) -> None:
        for seed in (random.seed, np.random.seed, torch.manual_seed):
            seed(3 if resume is None else 99)
        module = pretraining.module(build(NODE), total_steps=9, model_config=NODE)
        samples = SampleText(prompts=["ab"], path=folder / "s.jsonl", max_new_tokens=20, every_n_steps=2)
        last = LastCheckpoint(dirpath=str(folder))
        pretraining.fit(last, samples, StopAtBoundary(stop_at_step=stop), module=module, resume=resume)

    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run(whole)
    with pytest.raises(RunStopped):
        run(parts, stop=5)
    run(parts, resume=(parts / "last.ckpt").resolve())
    one, other = (
        state_digest(read_checkpoint((folder / "last.ckpt").resolve())) for folder in (whole, parts)
    )
    different = [part for part in one if one[part] != other[part]]
    assert different == []
    assert (whole / "s.jsonl").read_text() == (parts / "s.jsonl").read_text()
    samples = [json.loads(line)["continuation"] for line in (whole / "s.jsonl").read_text().splitlines()]
    assert len(samples) == 5
    assert any(samples)


def test_a_fused_head_is_used_where_the_model_has_one_and_refused_by_name_where_not(net):
    class WithHead(TinyRNN):
        def __init__(self, **sizes: int) -> None:
            super().__init__(**sizes)
            self.out_head = nn.Linear(24, V, bias=False)

        def hidden(self, tokens: Tensor) -> Tensor:
            states: Tensor = self.rnn(self.table(tokens))[0]
            return states

        def forward(self, tokens: Tensor) -> Tensor:
            logits: Tensor = self.out_head(self.hidden(tokens))
            return logits

    path = choose_fast_path(device_type="cpu", precision="32-true", total_steps=1)
    assert path.fitted_to(net).head == "plain"
    assert path.fitted_to(net).attention is None
    assert "attention" not in str(path.fitted_to(net))
    headed = WithHead(width=24, vocab_size=V, context_length=C)
    assert path.fitted_to(headed).head == "fused"
    tokens = torch.randint(0, V, (2, 8))
    expected = F.cross_entropy(headed(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
    loss = training_loss(headed, tokens[:, :-1], tokens[:, 1:], head="fused")
    torch.testing.assert_close(loss, expected)
    headed.out_head = nn.Linear(24, V)  # the fused loss would leave its bias out
    assert path.fitted_to(headed).head == "plain"


def test_a_subclass_of_ours_with_another_forward_is_not_taken_apart():
    class Softened(GPTModel):
        def forward(self, tokens: Tensor, segments: Tensor | None = None) -> Tensor:
            return 5 * torch.tanh(super().forward(tokens, segments) / 5)

    torch.manual_seed(0)
    ours = Softened(
        GPTConfig(
            vocab_size=V, context_length=C, emb_dim=16, n_heads=2, n_layers=1, drop_rate=0.0, qkv_bias=False
        )
    )
    tokens = torch.randint(0, V, (2, 9))
    logits = ours(tokens[:, :-1])
    expected = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).item()
    assert evaluate(ours, [(tokens[:, :-1], tokens[:, 1:])]).loss == pytest.approx(expected, abs=1e-6)
    (completion,) = complete(ours, BytesTokenizer(), ["abc"], rules=SamplingRules(), max_new_tokens=1)
    assert completion.tokens[0] == ours(torch.tensor([[97, 98, 99]]))[0, -1].argmax().item()
    assert not has_fused_head(ours)
    assert cached_form(ours, rows=1) is None


# --- using it -------------------------------------------------------------------------------------------


def test_the_loss_of_a_text_is_the_cross_entropy(net):
    tokens = torch.randint(0, V, (3, 9))
    targets = tokens[:, 1:].clone()
    targets[1, 4:] = -100
    expected = F.cross_entropy(net.eval()(tokens[:, :-1]).flatten(0, 1), targets.flatten()).item()
    found = evaluate(net, [(tokens[:, :-1], targets)])
    assert found.loss == pytest.approx(expected, abs=1e-6)
    assert found.tokens == 20


def test_text_is_that_of_a_loop_that_reads_the_last_tokens_again(net):
    prompts = ["ab", "a much longer prompt than its context of 16"]
    found = complete(net, BytesTokenizer(), prompts, rules=SamplingRules(), max_new_tokens=20)
    net.eval()
    for prompt, completion in zip(prompts, found, strict=True):
        row = list(prompt.encode())
        for _ in range(20):
            row.append(net(torch.tensor([row[-C:]]))[0, -1].argmax().item())
            if row[-1] == 256:  # end of text
                break
        assert list(completion.tokens) == row[len(prompt) :]


def test_one_beam_is_greedy_and_more_are_no_worse(net):
    greedy = complete(net, BytesTokenizer(), ["ab"], rules=SamplingRules(), max_new_tokens=6)
    one = search_text(net, BytesTokenizer(), "ab", num_beams=1, max_new_tokens=6)
    assert one[0].tokens == greedy[0].tokens
    assert len(search_text(net, BytesTokenizer(), "ab", num_beams=3, max_new_tokens=6)) == 3


def test_surprisals_and_scores_are_the_log_probabilities(net):
    text = list(b"hello world")
    log_p = net.eval()(torch.tensor([[256, *text[:-1]]]))[0].log_softmax(-1)
    expected = log_p[torch.arange(len(text)), torch.tensor(text)]
    found = torch.tensor([-each.surprisal for each in surprisals(net, text, eot_id=256)])
    torch.testing.assert_close(found, expected.detach())
    [(_, [score])] = score_groups(net, [[([256, *text[:4]], text[4:])]])
    assert score.log_probability == pytest.approx(expected[4:].sum().item(), abs=1e-4)


def test_a_form_for_decoding_of_its_own_is_used():
    class Running(TinyRNN):
        def cached(self, *, rows: int) -> "Kept":
            return Kept(self)

    class Cache:
        state: Tensor

        def select(self, rows: list[int]) -> None:
            self.state = self.state[:, rows]

    class Kept:
        """Reads each token once: a GRU needs no more than its state."""

        steps = 0

        def __init__(self, model: TinyRNN) -> None:
            self.model = model

        def new_cache(self, *, rows: int, capacity: int) -> Cache:
            return Cache()

        def prefill(self, prompts: Any, cache: Cache) -> Tensor:
            assert len(prompts) == 1
            return self.read(torch.tensor(prompts), None, cache)

        def step(self, tokens: Tensor, cache: Cache) -> Tensor:
            Kept.steps += 1
            return self.read(tokens[:, None], cache.state, cache)

        def read(self, tokens: Tensor, state: Tensor | None, cache: Cache) -> Tensor:
            states, cache.state = self.model.rnn(self.model.table(tokens), state)
            logits: Tensor = self.model.classify(states[:, -1])
            return logits

    torch.manual_seed(3)
    net = Running(width=24, vocab_size=V, context_length=C)
    plain = build(NODE)
    plain.load_state_dict(net.state_dict())
    rules = SamplingRules(temperature=1.0)
    found, expected = (
        complete(
            model, BytesTokenizer(), ["ab"], rules=rules, max_new_tokens=14, num_samples=3,
            generator=torch.Generator().manual_seed(5),
        )
        for model in (net, plain)
    )  # fmt: skip
    assert [each.tokens for each in found] == [each.tokens for each in expected]
    assert Kept.steps == 13
    assert isinstance(cached_form(GPTModel(GPTConfig(
        vocab_size=V, context_length=C, emb_dim=16, n_heads=2, n_layers=1, drop_rate=0.0, qkv_bias=False
    )), rows=1), CachedGPT)  # fmt: skip


# --- checkpoints ----------------------------------------------------------------------------------------


def test_a_checkpoint_is_rebuilt_by_the_given_build_alone(saved):
    header = read_checkpoint(saved.path)[HEADER_KEY]
    assert header["model"] == saved.model == NODE
    before = torch.random.get_rng_state()
    load_model(saved.path, build=build)
    assert torch.random.get_rng_state().equal(before)
    package = NAME.partition(".")[0]
    with pytest.raises(InputError, match=rf"holds a {NAME}.*trust=\[{package}\]"):
        load_model(saved.path)


def test_an_export_of_ours_keeps_what_it_was_built_from(saved, tmp_path):
    write_model(saved, tmp_path / "model.ckpt")
    again = load_model(tmp_path / "model.ckpt", build=build)
    assert again.model == NODE
    tokens = torch.arange(8)[None]
    assert again.net(tokens).equal(saved.net(tokens))


def test_a_new_run_begins_with_the_weights_of_an_earlier_one(saved):
    start, tokenizer = RunWeights(checkpoint=str(saved.path)), BytesTokenizer().state()
    new = build(NODE)
    origin = start.fill(new, NODE, tokenizer)
    assert (origin["init"], origin["parent"]["step"]) == ("run", 4)
    for name, weight in saved.net.state_dict().items():
        assert new.state_dict()[name].equal(weight), name
    with pytest.raises(InputError, match=r"model\.width=24, this run wants 32"):
        start.fill(new, NODE | {"width": 32}, tokenizer)
    with pytest.raises(InputError, match="tokenizer=bytes"):
        start.fill(new, NODE, {"name": "gpt2"})
    assert RandomWeights().fill(new, NODE, tokenizer) == {"init": "random"}
    with pytest.raises(InputError, match=f"this model is a {NAME}: use init=random"):
        PublishedWeights(source="hf").fill(new, NODE, tokenizer)


def test_a_module_that_was_told_nothing_keeps_the_name_of_the_class(pretraining, net):
    assert pretraining.module(net).model_state == {"_target_": NAME}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"width": 32}, r"model\.width=24, this run wants 32"),
        ({"p": 0.2}, r"model\.p=0\.1, this run wants 0\.2"),
        ({"_target_": "other.Model"}, rf"holds a {NAME}, this run has a other\.Model"),
    ],
)
def test_another_model_does_not_resume_it(saved, change, words):
    header = read_checkpoint(saved.path)[HEADER_KEY]
    check_same_model(header, NODE, BytesTokenizer().state())
    check_same_model(header, NODE | {"p": 0.1}, BytesTokenizer().state())  # a setting that is new, by default
    with pytest.raises(InputError, match=words):
        check_same_model(header, NODE | change, BytesTokenizer().state())


@pytest.mark.parametrize("name", ["TinyRNN", 3, "a.b\x1b[2J", "os.system('x')"])
def test_what_names_no_class_is_damaged(saved, tmp_path, name):
    checkpoint = read_checkpoint(saved.path)
    checkpoint[HEADER_KEY]["model"]["_target_"] = name
    torch.save(checkpoint, tmp_path / "a.ckpt")
    with pytest.raises(InputError, match="is not the name of a class"):
        load_model(tmp_path / "a.ckpt", build=build)


# --- what it cannot do ----------------------------------------------------------------------------------


LORA = TuneLowRank(rank=2, alpha=4.0, dropout=0.0, targets=["qkv"])


@pytest.mark.parametrize(
    ("ask", "words"),
    [
        (lambda net: TuneHead().apply(net), "tune=head needs"),
        (lambda net: TuneLastBlock().apply(net), "tune=last_block needs"),
        (lambda net: LORA.apply(net), "tune=lora needs"),
        (lambda net: gpt_model(net, "format=hf holds GPT-2 models"), "format=hf holds GPT-2 models"),
        (lambda net: shard(net, cast(Any, None)), "trainer.strategy=fsdp shards"),
        (lambda net: fitted(net, head="fused"), "trainer.head=fused needs"),
        (lambda net: fitted(net, attention="sdpa"), "trainer.attention=sdpa"),
        (lambda net: fitted(net, recompute=True), "trainer.recompute_activations=true needs"),
        (lambda net: ClassificationModule(net, labels=["a", "b"], max_length=8), "task=classify puts"),
        (lambda net: segments(net), "packed rows need"),
    ],
)
def test_what_needs_more_says_so_and_names_the_class(net, ask, words):
    with pytest.raises(InputError, match=words) as caught:
        ask(net)
    assert NAME in str(caught.value)
    assert "\n" not in str(caught.value)


def fitted(net: nn.Module, **asked: Any) -> None:
    choose_fast_path(device_type="cpu", precision="32-true", total_steps=1, **asked).fitted_to(net)


def segments(net: nn.Module) -> None:
    tokens = torch.ones(1, 4, dtype=torch.int64)
    training_loss(net, tokens, tokens, head="plain", segments=tokens)


def test_what_needs_a_gpt2_names_the_class_of_the_checkpoint(saved):
    header = read_checkpoint(saved.path)[HEADER_KEY]
    with pytest.raises(InputError, match=rf"holds a {NAME}, a gptpl\.model\.GPTModel is needed"):
        model_config(header, saved.path)


def test_a_language_model_is_checked_when_it_is_made(net):
    check_language_model(net, tokens=V, max_length=C)
    with pytest.raises(InputError, match=r"vocab_size of .* must be 300 or more"):
        check_language_model(net, tokens=300)
    with pytest.raises(InputError, match=r"data\.max_length=17 is longer than context_length=16"):
        check_language_model(net, max_length=17)
    with pytest.raises(InputError, match="Linear needs a whole number as its attribute vocab_size"):
        check_language_model(nn.Linear(2, 2))
    net.forward = lambda tokens: (tokens, None)
    with pytest.raises(InputError, match=r"tokens of shape \(1, 1\) to logits .* got a tuple"):
        check_language_model(net)
