"""`gptpl respond`: answers to one instruction and to files of them, by a model tuned by the command."""

import json
import random
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from gptpl.checkpoints.loading import load_model
from gptpl.files.durable import PartialResults

MARKER = "\n> "
ENTRIES = [
    {"instruction": f"Say {n % 7}, {n}.", "input": "loud" * (n % 2), "output": f"No {n % 7}!"}
    for n in range(40)
]


@pytest.fixture(scope="session")
def tuned(command, tmp_path_factory) -> Path:
    """A run of `task=instruct` on 40 entries; its checkpoint answers in a few letters."""
    folder = tmp_path_factory.mktemp("tuned")
    (folder / "my entries.json").write_text(json.dumps(ENTRIES))
    outcome = command(
        *(
            "train",
            "task=instruct",
            "data=instruction_file",
            "data.path=my entries.json",
            "data.shuffle=false",
        ),
        *("data.template='{{ instruction }}{{ input }}'", f"data.response_marker={MARKER}"),
        *("model=tiny", "model.n_layers=1", "tokenizer=bytes", "model.drop_rate=0", "optimizer.lr=5e-3"),
        *("trainer=cpu", "trainer.precision=32-true", "trainer.max_epochs=20", "eval_every_n_steps=80"),
        *("callbacks.sample_responses.entries=1", "run_dir=run", "eval_val_batches=null", "logger=csv"),
        cwd=folder,
    )
    assert outcome.status == 0, outcome.err
    return folder / "run"


def by_hand(run: Path, instruction: str, text: str = "", most: int = 20) -> tuple[str, bool]:
    """The greedy answer of a plain loop, and whether the model ended it."""
    loaded = load_model(run / "checkpoints/last.ckpt")
    ids = list(f"{instruction}{text}{MARKER}".encode())
    start = len(ids)
    for _ in range(most):
        with torch.no_grad():
            token = int(loaded.net(torch.tensor([ids]))[0, -1].argmax())
        if token == 256:
            return bytes(ids[start:]).decode().strip(), True
        ids.append(token)
    return bytes(ids[start:]).decode(errors="replace").strip(), False


def test_a_run_leaves_its_splits_and_answers(tuned, run_folder):
    run = run_folder(tuned)
    kept = [json.loads((tuned / f"data/{name}.json").read_text()) for name in ("train", "test", "validation")]
    assert kept == [ENTRIES[:34], ENTRIES[34:38], ENTRIES[38:]]
    assert [sample["prompt"] for sample in run.samples][-1] == "Say 3, 38."
    assert {"val/loss", "val/token_accuracy", "val/well_formed"} <= set(run.rows[-1])
    assert run.checkpoint("last")["gptpl"]["task"]["template"]["response_marker"] == MARKER


def test_an_answer_is_that_of_a_plain_loop_and_ends_by_itself(gptpl, tuned):
    answer, ended = by_hand(tuned, "Say 3, 38.")
    assert ended
    assert answer
    outcome = gptpl("respond", f"checkpoint={tuned}", "instruction=Say 3, 38.")
    assert (outcome.status, outcome.out) == (0, answer + "\n"), outcome.err
    assert list(outcome.folder.iterdir()) == []


@pytest.mark.parametrize("instruction", ["What, then? a=b {c} ${d} 'e' \"f\"", "???", "null"])
def test_json_says_what_was_asked_and_answered(gptpl, tuned, instruction):
    outcome = gptpl(
        *("respond", f"checkpoint={tuned}", f"instruction={instruction}", "input=x, y", "--json"),
        "max_new_tokens=5",
    )
    assert outcome.status == 0, outcome.err
    record = json.loads(outcome.out)
    answer, ended = by_hand(tuned, instruction, "x, y", most=5)
    assert (record["instruction"], record["input"]) == (instruction, "x, y")
    assert record["model_response"] == answer
    assert record["finish"] == ("end_of_text" if ended else "length")
    assert record["well_formed"] == (ended and bool(answer))
    assert (record["template"], record["step"]) == ("own", 80)
    assert record["sampling"] == {"temperature": 0.0}


def test_a_seed_makes_drawn_answers_reproducible(gptpl, tuned):
    given = ("respond", f"checkpoint={tuned}", "instruction=Say", "temperature=3", "max_new_tokens=9")
    outs = [gptpl(*given, f"seed={seed}").out for seed in (1, 1, 2)]
    assert outs[0] == outs[1] != outs[2]


def test_the_runs_own_test_entries_in_the_books_format(gptpl, tuned, tmp_path):
    outcome = gptpl("respond", f"checkpoint={tuned}", "split=test", "output=out.json", "batch_size=3")
    assert (outcome.status, outcome.out) == (0, ""), outcome.err
    made = json.loads((tmp_path / "out.json").read_text())
    expected = [by_hand(tuned, entry["instruction"], entry["input"]) for entry in ENTRIES[34:38]]
    assert made == [
        {**entry, "model_response": answer, "well_formed": ended and bool(answer)}
        for entry, (answer, ended) in zip(ENTRIES[34:38], expected, strict=True)
    ]
    good = sum(ended and bool(answer) for answer, ended in expected)
    assert f"well-formed answers: {good} of 4 (" in outcome.err
    assert [path.name for path in tmp_path.iterdir()] == ["out.json"]


def test_answers_are_filtered_and_counted(gptpl, tuned, tmp_path):
    one = ("filter=patterns", 'filter.patterns.number="[0-9]+"')
    asked = ("respond", f"checkpoint={tuned}", "instruction=Say 3, 38.")
    answer, _ = by_hand(tuned, "Say 3, 38.")
    marked, count = re.subn("[0-9]+", "[number]", answer)
    assert count
    outcome = gptpl(*asked, *one)
    assert (outcome.out, outcome.err.splitlines()[-1]) == (
        f"{marked}\n",
        f"filter: 1 of 1 text: number {count}",
    )
    record = json.loads(gptpl(*asked, *one, "--json").out)
    assert (record["model_response"], record["filtered"]) == (marked, {"number": count})

    given = ("respond", f"checkpoint={tuned}", "split=test", "output=out.json")
    outcome = gptpl(*given, *one, "filter.action=withhold")
    assert outcome.status == 0, outcome.err
    expected = [by_hand(tuned, entry["instruction"], entry["input"]) for entry in ENTRIES[34:38]]
    counts = [len(re.findall("[0-9]+", answer)) for answer, _ in expected]
    for made, (answer, ended), count in zip(
        json.loads((tmp_path / "out.json").read_text()), expected, counts, strict=True
    ):
        assert made["model_response"] == ("[withheld: number]" if count else answer)
        assert made["well_formed"] == (ended and bool(answer))
        assert made["filtered"] == ({"number": count} if count else {})
    line = f"filter: {sum(map(bool, counts))} of 4 texts: number {sum(counts)}"
    assert outcome.err.splitlines()[-1] == line


def test_it_goes_on_where_it_was_broken_off(gptpl, tuned, tmp_path, monkeypatch):
    entries = [{"q": f"Say {n}.", "id": n} for n in range(7)]
    (tmp_path / "asked.jsonl").write_text("\n".join(map(json.dumps, entries)))
    given = (
        *("respond", f"checkpoint={tuned}", "file=asked.jsonl", "output=out.json", "batch_size=2"),
        *("instruction_column=q", "input_column=null"),
    )
    plain = gptpl(*given)
    assert plain.status == 0, plain.err
    whole = json.loads((tmp_path / "out.json").read_text())
    assert [(record["id"], record["instruction"], record["input"]) for record in whole] == [
        (n, f"Say {n}.", "") for n in range(7)
    ]
    (tmp_path / "out.json").unlink()

    add, calls = PartialResults.add, []

    def breaking(self: PartialResults, values: Any) -> None:
        calls.append(len(values))
        if len(calls) == 3:
            raise KeyboardInterrupt
        add(self, values)

    monkeypatch.setattr(PartialResults, "add", breaking)
    assert gptpl(*given).status == 130
    assert not (tmp_path / "out.json").exists()
    other = gptpl(*given, "max_new_tokens=3")
    assert other.status == 2
    assert "out.json.partial was started with max_new_tokens=256, not 3: remove it" in other.err
    calls[:] = [0] * 5
    again = gptpl(*given)
    assert again.status == 0, again.err
    assert "4 of 7 answers are in" in again.err
    assert f"well-formed answers: {sum(record['well_formed'] for record in whole)} of 7 (" in again.err
    assert calls[5:] == [2, 1]
    assert json.loads((tmp_path / "out.json").read_text()) == whole


def test_answers_do_not_go_on_beside_other_references(gptpl, refused, tuned, tmp_path, monkeypatch):
    entries = [{"instruction": "Say.", "input": "", "output": str(n)} for n in range(2)]
    given = ("respond", f"checkpoint={tuned}", "file=f.json", "output=o.json", "max_new_tokens=2")
    (tmp_path / "f.json").write_text(json.dumps(entries))
    with monkeypatch.context() as broken:
        broken.setattr(PartialResults, "finish", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
        assert gptpl(*given).status == 130
    (tmp_path / "f.json").write_text(json.dumps([entries[0], {**entries[1], "output": "mended"}]))
    assert "o.json.partial was started with file=" in refused(*given)


def test_runs_show_says_how_to_ask_it(gptpl, tuned):
    shown = gptpl("runs", "show", str(tuned)).out
    assert "to respond: gptpl respond " in shown
    assert " instruction='Name a synonym of happy.'" in shown


def test_another_model_does_not_go_on_with_the_answers(gptpl, tuned, tmp_path):
    (tmp_path / "out.json.partial").write_text(json.dumps({"settings": {"model": "another"}}) + "\n")
    outcome = gptpl("respond", f"checkpoint={tuned}", "split=val", "output=out.json")
    assert outcome.status == 2
    assert "was started with" in outcome.err


def test_long_prompts_are_refused_or_skipped_and_said(gptpl, tuned, tmp_path):
    entries = [{"instruction": "x" * 70, "input": ""}, {"instruction": "Say 1.", "input": ""}]
    (tmp_path / "asked.json").write_text(json.dumps(entries))
    given = ("respond", f"checkpoint={tuned}", "file=asked.json", "output=out.json")
    refused = gptpl(*given)
    assert refused.status == 2
    assert (
        "asked.json, entry 1 has 73 tokens with its template, the model's context_length is 64" in refused.err
    )
    skipped = gptpl(*given, "too_long=skip")
    assert skipped.status == 0
    assert "warning: skipped: asked.json, entry 1 has 73 tokens" in skipped.err
    assert len(json.loads((tmp_path / "out.json").read_text())) == 1


def test_a_model_that_was_not_tuned_needs_a_template(gptpl, refused, quick):
    run = quick.run.path
    line = refused("respond", f"checkpoint={run}", "instruction=Say.")
    assert "was not tuned to follow instructions (task=pretrain): give template=alpaca" in line
    outcome = gptpl(
        "respond",
        f"checkpoint={run}",
        "instruction=S",
        "template={{ instruction }}",
        "max_new_tokens=2",
        "--json",
    )
    assert outcome.status == 0, outcome.err
    assert json.loads(outcome.out)["template"] == "own"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ((), "instruction is not set: give instruction='...', file=FILE, or split=test"),
        (("instruction= ",), "instruction is not set"),
        (("instruction=a", "split=test"), "instruction= and split= are both set"),
        (("split=test",), "split= needs a file for the answers: give output=responses.json"),
        (("instruction=a", "output=o.json"), "output=o.json is for file= or split="),
        (("split=test", "output=o.json", "--json"), "--json is for one instruction"),
        (("split=exam", "output=o.json"), "split=exam: must be 'train', 'val' or 'test'"),
        (("file=no.json", "output=o.json"), "cannot read no.json"),
        (("split=test", "output=no/o.json"), "output=no/o.json is in a folder that does not exist"),
        (("instruction=a", "batch_size=0"), "batch_size=0: must be greater than 0"),
        (("instruction=a", "too_long=cut"), "too_long=cut: must be 'refuse' or 'skip'"),
        (("instruction=a", "template=alpacca"), "alpacca is neither alpaca nor phi3 nor a file"),
        (("instruction=" + "a" * 70,), "the instruction has 73 tokens with its template"),
        (("instruction=a", "temperature=-1"), "positive number, got -1"),
    ],
)
def test_wrong_settings_are_refused(given, said, refused, tuned, monkeypatch):
    monkeypatch.setattr("sys.stdin", None)
    assert said in refused("respond", f"checkpoint={tuned}", *given)


def test_a_checkpoint_outside_a_run_has_no_split(refused, tuned, tmp_path):
    shutil.copy(tuned / "checkpoints/best.ckpt", tmp_path / "best.ckpt")
    line = refused("respond", "checkpoint=best.ckpt", "split=test", "output=o.json")
    assert "is not in a run of task=instruct with that split: give file=FILE" in line


@pytest.mark.parametrize("masked", [False, True])
def test_evaluate_gives_the_loss_of_the_answers(gptpl, tuned, tmp_path, masked):
    (tmp_path / "e.json").write_text(json.dumps(ENTRIES))
    outcome = gptpl(
        *("evaluate", f"checkpoint={tuned}", "data=instruction_file", "data.path=e.json", "split=test"),
        *("data.shuffle=false", f"data.mask_instruction={masked}"),
    )
    assert outcome.status == 0, outcome.err
    net = load_model(tuned / "checkpoints/last.ckpt").net
    losses: list[float] = []
    for entry in ENTRIES[34:38]:
        prompt = f"{entry['instruction']}{entry['input']}{MARKER}".encode()
        tokens = torch.tensor([*prompt, *entry["output"].encode(), 256])
        with torch.no_grad():
            each = F.cross_entropy(net(tokens[None, :-1])[0], tokens[1:], reduction="none").tolist()
        losses += each[len(prompt) - 1 :] if masked else each
    assert f"loss        {sum(losses) / len(losses):.4f} nats" in outcome.out
    assert f"tokens      {len(losses)}" in outcome.out


def test_evaluate_says_what_is_cut_and_what_the_model_was_trained_on(gptpl, tuned, tmp_path):
    (tmp_path / "e.json").write_text(json.dumps(ENTRIES))
    given = ("evaluate", f"checkpoint={tuned}", "data=instruction_file", "data.path=e.json", "split=test")
    own = gptpl(*given, "data.shuffle=false")
    assert "trained on" not in own.err
    assert "data.max_length" not in own.err
    cut = gptpl(*given, "data.max_length=14", "data.shuffle=false")
    assert "4 examples longer than data.max_length=14 lost the end" in cut.err
    drawn = ENTRIES.copy()
    random.Random(123).shuffle(drawn)
    known = sum(entry in ENTRIES[:34] for entry in drawn[34:38])
    assert known
    shuffled = gptpl(*given)  # as a file of one's own is, unless told otherwise
    assert f"{known} of 4 entries are in {tuned / 'data/train.json'}, which the model was" in shuffled.err


def test_evaluate_takes_another_template_where_it_is_asked_for(gptpl, tuned, tmp_path):
    (tmp_path / "e.json").write_text(json.dumps(ENTRIES))
    given = ("evaluate", f"checkpoint={tuned}", "data=instruction_file", "data.path=e.json", "split=test")
    asked = gptpl(*given, "data.template=phi3", "data.max_length=64")
    assert asked.status == 0, asked.err
    assert "template phi3" in asked.out
    assert "the model was tuned with template=own, not phi3" in asked.err


def test_training_data_of_another_task_are_refused(refused):
    line = refused("train", "task=instruct", "data=tale", "model=tiny", "tokenizer=bytes")
    assert line.startswith("task=instruct cannot train on these data (TextDataModule): choose data=instruct")
    line = refused("train", "data=instructions", "model=tiny", "tokenizer=bytes")
    assert line.endswith("or task=instruct")


def test_generate_takes_a_tuned_model_for_a_language_model_but_has_no_text_of_it(gptpl, refused, tuned):
    given = ("generate", f"checkpoint={tuned}", "prompt=Say", "max_new_tokens=2")
    assert gptpl(*given).status == 0
    line = refused(*given, "memorisation=true")
    assert line.startswith(f"the text that {tuned / 'checkpoints/last.ckpt'} was trained on")
    assert "name it, training_text=FILE" in line
