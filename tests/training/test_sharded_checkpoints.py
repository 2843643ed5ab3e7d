"""Checkpoints of which every process writes its part: the bits of whole ones, for any number of processes."""

import os
import shutil
import socket
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch

from gptpl.checkpoints.files import CheckpointFolder, part_files, verify
from gptpl.checkpoints.format import read_checkpoint, read_header
from gptpl.checkpoints.resume_state import state_digest
from gptpl.checkpoints.sharded import Share, write_share
from gptpl.cli.main import main
from gptpl.errors import InputError, ProcessError
from gptpl.runs.listing import disk_use
from gptpl.runs.removal import foreign_files, remove_checkpoints

ROOT = Path(__file__).parents[2]
ONE = ("trainer=cpu", "data.batch_size=8")
TWO = ("trainer=fsdp", "trainer.accelerator=cpu", "trainer.devices=2", "data.batch_size=4")
SHARDED = (*TWO, "trainer.sharded_checkpoints=true", "callbacks.checkpoint_last.every_n_steps=1")

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory, train) -> Path:
    """A run of two processes with whole checkpoints."""
    return train(tmp_path_factory.mktemp("whole"), *TWO)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory, train) -> Path:
    """The same with parts, stopped after step 3 of 6."""
    return train(tmp_path_factory.mktemp("stopped"), *SHARDED, "trainer.stop_at_step=3")


@pytest.fixture
def run(stopped, tmp_path) -> Path:
    """A copy of the stopped run."""
    return Path(shutil.copytree(stopped, tmp_path / "run", symlinks=True))


def last(run_dir: Path) -> Path:
    return (run_dir / "checkpoints" / "last.ckpt").resolve()


def parts(run_dir: Path) -> list[Path]:
    return sorted(path for path in part_files(last(run_dir)) if path.suffix == ".part")


def test_no_process_has_more_than_its_part(run):
    """Two parts of about half the tensors each, and a file with the rest."""
    assert sorted(read_header(last(run))) == sorted(read_checkpoint(last(run))["gptpl"])
    tensors = read_checkpoint(last(run))
    bytes_whole = sum(each.nbytes for each in tensors["state_dict"].values())
    bytes_whole += sum(
        each.nbytes for state in tensors["optimizer_states"][0]["state"].values() for each in state.values()
    )
    sizes = [path.stat().st_size for path in parts(run)]
    assert len(sizes) == 2
    assert all(0.45 * bytes_whole < size < 0.6 * bytes_whole for size in sizes)
    assert last(run).stat().st_size < 0.2 * bytes_whole
    for path in parts(run):
        recorded = path.with_name(f"{path.name}.sha256").read_text().split()
        assert recorded[1] == path.name


@pytest.mark.parametrize("processes", [SHARDED, TWO])
def test_a_resumed_run_ends_with_the_bits_of_one_with_whole_checkpoints(run, whole, train, processes):
    train(run.parent, f"resume={run}", "trainer.stop_at_step=null", *processes)
    ours, theirs = (state_digest(read_checkpoint(last(each))) for each in (run, whole))
    assert ours == theirs


def test_one_process_continues_it_and_two_continue_with_parts(run, whole, train):
    train(run.parent, f"resume={run}", "trainer.stop_at_step=4", *ONE, "trainer.sharded_checkpoints=false")
    assert parts(run) == []
    train(run.parent, f"resume={run}", "trainer.stop_at_step=null", *SHARDED)
    assert len(parts(run)) == 2
    ours, theirs = (read_checkpoint(last(each)) for each in (run, whole))
    for name, weight in theirs["state_dict"].items():
        torch.testing.assert_close(ours["state_dict"][name], weight, atol=1e-5, rtol=0, msg=name)
    for number, state in theirs["optimizer_states"][0]["state"].items():
        for name, value in state.items():
            found = ours["optimizer_states"][0]["state"][number][name]
            torch.testing.assert_close(found, value, atol=1e-6, rtol=1e-4)


def test_four_processes_on_two_nodes_then_two_then_one(tmp_path, train, gptpl_train, whole):
    """Sharded within each node, with a copy on each (HSDP); the learnt weights are those of two processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = [
        *("experiment=quick", "model.drop_rate=0", "trainer.max_steps=6", "scheduler.warmup_steps=2"),
        *("eval_every_n_steps=3", "trainer=fsdp", "trainer.strategy=hsdp", "trainer.accelerator=cpu"),
        *("data.batch_size=2", "~callbacks.sample_text", "trainer.sharded_checkpoints=true"),
        *(f"run_dir={tmp_path / 'run'}", "trainer.stop_at_step=2"),
    ]
    environment = os.environ | {
        "GPTPL_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT),
    }  # fmt: skip
    nodes = [
        subprocess.Popen(
            [
                *(sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=2"),
                *(f"--node-rank={node}", "--master-addr=127.0.0.1", f"--master-port={port}"),
                *("-m", "gptpl", "train", *settings),
            ],
            cwd=tmp_path,
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for node in range(2)
    ]
    said = [node.communicate(timeout=150)[1] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], said
    run_dir = tmp_path / "run"
    assert [path.name[-11:] for path in parts(run_dir)] == ["1-of-2.part", "2-of-2.part"]
    assert verify(last(run_dir)) is None
    train(tmp_path, f"resume={run_dir}", "trainer.stop_at_step=4", *SHARDED, "trainer.num_nodes=1")
    gptpl_train(
        *(tmp_path, f"resume={run_dir}", "trainer.stop_at_step=null", *ONE, "trainer.num_nodes=1"),
        "trainer.sharded_checkpoints=false",
    )
    ours, theirs = (read_checkpoint(last(each))["state_dict"] for each in (run_dir, whole))
    assert ours.keys() == theirs.keys()
    for name, weight in theirs.items():
        torch.testing.assert_close(ours[name], weight, atol=2e-5, rtol=0, msg=name)


def test_it_is_used_and_exported_like_any_other(run, capsys, tmp_path):
    exported = tmp_path / "exported"
    assert main(["weights", "convert", f"checkpoint={run}", "format=gptpl", f"output={exported}"]) == 0
    weights = torch.load(exported / "model.ckpt", weights_only=True)["state_dict"]
    for name, tensor in read_checkpoint(last(run))["state_dict"].items():
        assert weights[name].equal(tensor), name
    texts = []
    for checkpoint in (run, exported):
        capsys.readouterr()
        sampled = ["prompt=Once", "max_new_tokens=4", "sampling.top_k=1"]
        assert main(["generate", f"checkpoint={checkpoint}", *sampled]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != ""


# --- what may be wrong with it --------------------------------------------------------------------------


def lose(part: Path) -> None:
    part.unlink()


def flip(part: Path) -> None:
    content = bytearray(part.read_bytes())
    content[len(content) // 2] ^= 1
    part.write_bytes(content)


def cut(part: Path) -> None:
    os.truncate(part, part.stat().st_size // 2)


@pytest.mark.parametrize("damage", [lose, flip, cut])
def test_a_damaged_part_is_found_and_the_step_before_resumed(run, train, damage):
    damage(parts(run)[1])
    reason = verify(last(run))
    assert reason is not None
    assert "is damaged (its part " in reason
    with pytest.raises(InputError, match="step-00000003"):
        read_checkpoint(last(run))
    good = CheckpointFolder(run / "checkpoints", keep=2).newest_good()
    assert good is not None
    assert good.path.name == "step-00000002.ckpt"
    damaged = last(run)
    train(run.parent, f"resume={run}", "trainer.stop_at_step=null", *SHARDED)
    assert damaged.with_name(f"{damaged.name}.damaged").exists()
    assert verify(last(run)) is None


def test_other_names_than_its_own_are_refused(run):
    """Only names that gptpl gives are looked for, next to the checkpoint."""
    checkpoint = torch.load(last(run), weights_only=True)
    for named in (
        {"../secret.00000000-1-of-1.part": ""},
        {"step-00000003.00000000-1-of-3.part": ""},
        {"step-00000003.00000000-2-of-1.part": ""},
        {},
        ["step-00000003.00000000-1-of-1.part"],
        7,
    ):
        path = run / "stranger.ckpt"
        torch.save(checkpoint | {"gptpl_parts": named}, path)
        with pytest.raises(InputError, match="names no parts of its own"):
            read_checkpoint(path)


@pytest.mark.parametrize(
    "change",
    [
        lambda part: part["state_dict"].popitem(),
        lambda part: part["state_dict"].update({"net.head.weight": torch.zeros(3, 3)}),
        lambda part: part["state_dict"].update({"net.head.weight": torch.tensor(3.0)}),
        lambda part: part["state_dict"].update({"net.head.weight": "rows"}),
        lambda part: part.update(state_dict=[1]),
        lambda part: part.update(optimizer_states={"a": 1}),
        lambda part: part.clear(),
    ],
)
def test_a_part_that_fits_no_other_is_refused(run, change):
    part = parts(run)[1]
    content = torch.load(part, weights_only=True)
    change(content)
    torch.save(content, part)
    with pytest.raises(InputError, match="do not fit together"):
        read_checkpoint(last(run), verified=True)


def test_a_part_with_code_is_not_loaded(run):
    class Canary:
        def __reduce__(self) -> Any:
            return os.system, (f"touch {run / 'ran'}",)

    torch.save({"state_dict": {"net.head.weight": Canary()}, "optimizer_states": []}, parts(run)[0])
    with pytest.raises(InputError, match="plain"):
        read_checkpoint(last(run), verified=True)
    assert not (run / "ran").exists()


# --- writing --------------------------------------------------------------------------------------------


def share(number: int, *, of: int = 2, token: str = "0" * 8, seconds: float = 20) -> Share:
    return Share(number=number, of=of, token=token, timeout=timedelta(seconds=seconds))


def content(number: int) -> dict[str, Any]:
    part = {"state_dict": {"net.w": torch.full((2, 3), float(number))}, "optimizer_states": []}
    return {"part": part, **({"gptpl": {"step": 7}, "state_dict": {}} if number == 1 else {})}


def test_the_first_process_waits_for_the_parts_of_the_others(tmp_path):
    path = tmp_path / "step-00000007.ckpt"
    first = Thread(target=write_share, args=(content(1), path, share(1)))
    first.start()
    first.join(0.3)
    assert first.is_alive()
    assert not path.exists()  # no checkpoint before its parts
    write_share(content(2), path, share(2))
    first.join(20)
    assert verify(path) is None
    assert list(torch.load(path, weights_only=True)["gptpl_parts"]) == [
        f"step-00000007.00000000-{n}-of-2.part" for n in (1, 2)
    ]


def test_a_part_that_never_comes_ends_the_save(tmp_path):
    path = tmp_path / "step-00000007.ckpt"
    with pytest.raises(ProcessError, match=r"-2-of-2\.part has not been written within 0\.2 s"):
        write_share(content(1), path, share(1, seconds=0.2))
    assert not path.exists()


def save(path: Path, token: str) -> None:
    for number in (2, 1):
        write_share(content(number), path, share(number, token=token))


def test_parts_of_killed_saves_and_of_old_steps_go(tmp_path):
    folder = CheckpointFolder(tmp_path, keep=2)
    write_share(content(2), folder.path(1), share(2, token="a" * 8))  # its first process was killed
    (tmp_path / ".step-00000001.aaaaaaaa-1-of-2.part.1-1.tmp").write_bytes(b"cut")
    for step in (2, 3, 4):
        save(folder.path(step), "b" * 8)
        folder.settle(step)
    assert sorted({path.name.partition(".")[0] for path in tmp_path.glob("*.part")}) == [
        "step-00000003", "step-00000004",
    ]  # fmt: skip
    assert not list(tmp_path.glob(".*"))
    save(folder.path(4), "c" * 8)  # once more: the file names the new parts, the old ones go
    assert {path.name.split(".")[1][:8] for path in part_files(folder.path(4))} == {"c" * 8}
    assert verify(folder.path(4)) is None


def test_a_live_process_of_another_machine_keeps_its_unfinished_part(tmp_path):
    """Its number says nothing here."""
    theirs = tmp_path / ".step-00000009.dddddddd-2-of-2.part.999999999-1.tmp"
    theirs.write_bytes(b"half")
    save(tmp_path / "step-00000008.ckpt", "d" * 8)
    assert theirs.exists()


def test_the_parts_belong_to_the_run_that_is_removed(run):
    before = disk_use(run)
    assert any(name.endswith(".part") for name in before.checkpoints)
    assert [name for name in foreign_files(run, before) if ".part" in name] == []
    (run / "checkpoints" / "best.00000000-1-of-1.part").write_bytes(b"part")
    remove_checkpoints(run, disk_use(run))
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["best.00000000-1-of-1.part"]


def test_parts_of_a_model_that_is_whole_are_refused(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["train", "experiment=quick", "trainer=cpu", "trainer.sharded_checkpoints=true"]) == 2
    assert "trainer.sharded_checkpoints=true needs trainer.strategy=fsdp or hsdp" in capsys.readouterr().err
