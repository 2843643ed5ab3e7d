"""Checkpoints of which every process writes its part: the bits of whole ones, for any number of processes."""

import errno
import os
import shutil
import socket
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from threading import Event, Thread
from typing import Any

import pytest
import torch

from gptpl.callbacks.checkpoints import DurableCheckpointIO
from gptpl.checkpoints import sharded
from gptpl.checkpoints.files import (
    CheckpointFolder,
    Damaged,
    part_files,
    parts_of,
    set_aside,
    verify,
    write_checkpoint,
)
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


def same_bits(run_dir: Path, other: Path) -> bool:
    ours, theirs = (state_digest(read_checkpoint(last(each))) for each in (run_dir, other))
    return ours == theirs


def test_a_resumed_run_ends_with_the_bits_of_one_with_whole_checkpoints(run, whole, train):
    train(run.parent, f"resume={run}", "trainer.stop_at_step=null", *TWO)
    assert same_bits(run, whole)


def test_one_process_continues_it_and_two_continue_with_parts(run, whole, train):
    train(run.parent, f"resume={run}", "trainer.stop_at_step=4", *ONE, "trainer.sharded_checkpoints=false")
    assert parts(run) == []
    train(run.parent, f"resume={run}", "trainer.stop_at_step=null", *SHARDED)
    assert len(parts(run)) == 2
    ours, theirs = (read_checkpoint(last(each)) for each in (run, whole))
    for name, weight in theirs["state_dict"].items():
        torch.testing.assert_close(ours["state_dict"][name], weight, atol=2e-5, rtol=0, msg=name)
    for number, state in theirs["optimizer_states"][0]["state"].items():
        for name, value in state.items():
            found = ours["optimizer_states"][0]["state"][number][name]
            torch.testing.assert_close(found, value, atol=1e-6, rtol=1e-4)


@pytest.mark.hosts
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
def test_a_damaged_part_is_found_and_the_step_before_resumed(run, whole, train, damage):
    """With parts again, to the bits of a run that was never stopped."""
    damage(parts(run)[1])
    reason = verify(last(run))
    assert reason is not None
    assert "is damaged (its part " in reason
    words = "is missing: copy it together with the file" if damage is lose else "does not have its SHA-256"
    with pytest.raises(InputError, match=f"{words}.*: use .*step-00000002"):
        read_checkpoint(last(run))
    good = CheckpointFolder(run / "checkpoints", keep=2).newest_good()
    assert good is not None
    assert good.path.name == "step-00000002.ckpt"
    if damage is not cut:
        return  # resuming depends on what `verify` says alone
    damaged = last(run)
    train(run.parent, f"resume={run}", "trainer.stop_at_step=null", *SHARDED)
    assert damaged.with_name(f"{damaged.name}.damaged").exists()
    assert verify(last(run)) is None
    assert len(parts(run)) == 2
    assert same_bits(run, whole)


def test_other_names_than_its_own_are_refused(run):
    """Only names that gptpl gives are looked for, next to the checkpoint."""
    checkpoint = torch.load(last(run), weights_only=True)
    for named in (
        {"stem": "../secret", "token": "0" * 8, "sha256": ["0"]},
        {"stem": "a\\b", "token": "0" * 8, "sha256": ["0"]},
        {"stem": "..", "token": "0" * 8, "sha256": ["0"]},
        {"stem": "a\0b", "token": "0" * 8, "sha256": ["0"]},
        {"stem": "step-00000003", "token": "../../00", "sha256": ["0"]},
        {"stem": "step-00000003", "token": "0" * 8, "sha256": []},
        {"stem": "step-00000003", "token": "0" * 8, "sha256": [7]},
        {"stem": "step-00000003", "token": "0" * 8},
        {},
        ["step-00000003.00000000-1-of-1.part"],
        7,
    ):
        path = run / "stranger.ckpt"
        torch.save(checkpoint | {"gptpl_parts": named}, path)
        assert verify(path) == "is damaged (it names no parts of its own)"
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


def write(number: int, path: Path, *, token: str = "0" * 8, seconds: float = 20, **ended: Any) -> None:
    """Write a part of two, as a process does."""
    part = {"state_dict": {"net.w": torch.full((2, 3), float(number))}, "optimizer_states": []}
    rest: dict[str, Any] = {"gptpl": {"step": 7}, "state_dict": {}} if number == 1 else {}
    share = Share(number=number, of=2, token=token, timeout=timedelta(seconds=seconds))
    write_share(part, rest, path, share, ended=ended.get("ended", lambda: False))


def save(path: Path, token: str) -> None:
    for number in (2, 1):
        write(number, path, token=token)


def test_the_first_process_waits_for_the_parts_of_the_others(tmp_path):
    path = tmp_path / "step-00000007.ckpt"
    first = Thread(target=write, args=(1, path))
    first.start()
    first.join(0.3)
    assert first.is_alive()
    assert not path.exists()  # no checkpoint before its parts
    write(2, path)
    first.join(20)
    assert verify(path) is None
    assert [part.name for part in parts_of(torch.load(path, weights_only=True), path)] == [
        f"step-00000007.00000000-{n}-of-2.part" for n in (1, 2)
    ]


def test_a_part_that_never_comes_ends_the_save(tmp_path):
    path = tmp_path / "step-00000007.ckpt"
    with pytest.raises(ProcessError, match=r"-2-of-2\.part is not there, and 0\.2 s have passed"):
        write(1, path, seconds=0.2)
    assert not path.exists()


def test_a_part_that_cannot_be_written_ends_the_save_of_the_others_with_its_reason(tmp_path, monkeypatch):
    path = tmp_path / "step-00000007.ckpt"

    def full(checkpoint: Any, path: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(sharded, "write_durably", full)
        with pytest.raises(OSError, match="No space left"):
            write(2, path)
    with pytest.raises(
        ProcessError, match=r"-2-of-2\.part was not written: No space left on device .*make room"
    ):
        write(1, path)
    save(path, "1" * 8)  # once there is room; what the attempt left goes
    assert {part.name.split(".")[1][:8] for part in part_files(path)} == {"1" * 8}


def test_training_that_has_failed_waits_for_no_part(tmp_path):
    path, over = tmp_path / "step-00000007.ckpt", Event()
    io = DurableCheckpointIO()
    found: list[str] = []

    def first() -> None:
        try:
            write(1, path, ended=io._ended.is_set)
        except ProcessError as error:
            found.append(str(error))
        over.set()

    Thread(target=first, daemon=True).start()
    assert not over.wait(0.3)
    io.end()
    assert over.wait(10)
    assert "is not there, and training has ended" in found[0]


def test_any_name_will_do(tmp_path):
    """Such as those of Lightning's own ModelCheckpoint; the parts of a longer name are not its own."""
    for name in ("epoch=0-step=3.ckpt", "my run.v2.ckpt", "loss.ckpt", "loss.2.ckpt", "a[1].ckpt"):
        save(tmp_path / name, "a" * 8)
    save(tmp_path / "loss.ckpt", "b" * 8)
    for path in tmp_path.glob("*.ckpt"):
        assert verify(path) is None
        content = torch.load(path, weights_only=True)
        sharded.assemble(content, path)
        assert content["state_dict"]["net.w"][:, 0].tolist() == [1, 1, 2, 2]


def test_files_that_gptpl_did_not_write_stay(tmp_path):
    downloads = [
        tmp_path / name for name in ("model.ckpt.part", "model.safetensors.part", "model.x-1-of-2.part")
    ]
    for download in downloads:
        download.write_bytes(b"half")
    save(tmp_path / "model.ckpt", "a" * 8)
    write_checkpoint({"weights": torch.ones(3)}, tmp_path / "model.ckpt")
    assert part_files(tmp_path / "model.ckpt") == []
    assert all(download.exists() for download in downloads)


def test_a_copy_under_another_name_keeps_its_parts(tmp_path):
    folder = CheckpointFolder(tmp_path, keep=1)
    save(folder.path(5), "a" * 8)
    folder.settle(5)
    shutil.copy(folder.path(5), tmp_path / "milestone.ckpt")
    save(folder.path(6), "b" * 8)
    folder.settle(6)
    assert folder.steps() == [6]
    assert verify(tmp_path / "milestone.ckpt") is None


def test_many_names_for_the_same_numbers_take_no_memory(tmp_path):
    """Each would get its own: 1,000 times the file."""
    path, rows = tmp_path / "step-00000007.ckpt", torch.ones(100, 100)
    part = {"state_dict": {f"net.{n}": rows for n in range(1000)}, "optimizer_states": []}
    rest: dict[str, Any] = {"gptpl": {}, "state_dict": {}}
    once = Share(number=1, of=1, token="0" * 8, timeout=timedelta(seconds=1))
    write_share(part, rest, path, once, ended=lambda: False)
    with pytest.raises(InputError, match="stores the same numbers for several weights"):
        sharded.assemble(torch.load(path, weights_only=True), path)


def test_parts_of_killed_saves_and_of_old_steps_go(tmp_path):
    folder = CheckpointFolder(tmp_path, keep=2)
    write(2, folder.path(1), token="a" * 8)  # its first process was killed
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


def test_what_is_set_aside_keeps_its_parts_and_no_unfinished_file(tmp_path):
    path = tmp_path / "step-00000004.ckpt"
    save(path, "b" * 8)
    (tmp_path / ".step-00000004.cccccccc-1-of-2.part.1-1.tmp").write_bytes(b"cut")
    set_aside([Damaged(path=path, reason="is damaged")])
    names = sorted(file.name for file in tmp_path.iterdir())
    assert len(names) == 6
    assert all(name.endswith(".damaged") for name in names)
    save(tmp_path / "step-00000005.ckpt", "d" * 8)
    CheckpointFolder(tmp_path, keep=1).settle(5)
    assert set(names) < {file.name for file in tmp_path.iterdir()}


def test_a_live_process_of_another_machine_keeps_its_unfinished_part(tmp_path):
    """Its number says nothing here."""
    theirs = tmp_path / ".step-00000009.dddddddd-2-of-2.part.99999-1.tmp"
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
