"""Checkpoints on disk: whole or not there, whatever happens while one is written."""

import errno
import hashlib
import multiprocessing
import os
import pickle
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from gptpl.callbacks.checkpoints import DurableCheckpointIO
from gptpl.checkpoints.files import CheckpointFolder, verify, write_checkpoint
from gptpl.files.durable import record_file, sha256_of

pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork")


def state(value: float, numbers: int = 1000) -> dict[str, Any]:
    return {"state_dict": {"weight": torch.full((numbers,), float(value))}, "global_step": int(value)}


def value_of(path: Path) -> float:
    return float(torch.load(path, weights_only=True)["state_dict"]["weight"][0])


def test_the_record_is_what_sha256sum_reads(tmp_path):
    path = tmp_path / "a.ckpt"
    write_checkpoint(state(1), path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert record_file(path).read_text() == f"{digest}  a.ckpt\n"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.ckpt", "a.ckpt.sha256"]
    assert verify(path) is None


def test_what_is_written_is_what_torch_would_write(tmp_path):
    tensors = {
        f"{dtype}": torch.arange(5).to(dtype) for dtype in (torch.float32, torch.bfloat16, torch.int64)
    }
    whole = {"tensors": tensors, "scalar": torch.tensor(2.0), "text": "ü", "list": [1, None, {"a": (1.5,)}]}
    DurableCheckpointIO().save_checkpoint(whole, tmp_path / "a.ckpt")
    torch.save(whole, tmp_path / "torch.ckpt")
    mine, torchs = (torch.load(tmp_path / n, weights_only=True) for n in ("a.ckpt", "torch.ckpt"))
    assert str(mine) == str(torchs)
    assert str(DurableCheckpointIO().load_checkpoint(tmp_path / "a.ckpt")) == str(torchs)


def test_a_name_that_is_written_again_gets_the_new_content(tmp_path):
    path = tmp_path / "best.ckpt"
    for value in (1, 2):
        write_checkpoint(state(value), path)
    assert value_of(path) == 2
    assert verify(path) is None
    assert len(record_file(path).read_text().splitlines()) == 1


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda path: os.truncate(path, path.stat().st_size - 1), "SHA-256"),
        (lambda path: os.truncate(path, 0), "is empty"),
        (lambda path: path.unlink(), "is missing"),
        (lambda path: flip(path), "SHA-256"),
    ],
)
def test_damage_is_found(tmp_path, damage, reason):
    path = tmp_path / "a.ckpt"
    write_checkpoint(state(1), path)
    damage(path)
    assert reason in (verify(path) or "")


def flip(path: Path) -> None:
    """One bit of one weight, which torch loads without a word."""
    content = bytearray(path.read_bytes())
    position = content.index(torch.full((1000,), 1.0).numpy().tobytes()) + 2
    content[position] ^= 1
    path.write_bytes(content)
    assert torch.load(path, weights_only=True)["state_dict"]["weight"].ne(1.0).sum() == 1


@pytest.mark.parametrize("damaged", [False, True])
def test_a_file_that_is_replaced_while_it_is_verified_is_compared_with_its_own_hash(
    tmp_path, monkeypatch, damaged
):
    """Between reading the record and the file, as best.ckpt while training finds a better one."""
    path, used, hashed = tmp_path / "best.ckpt", "gptpl.checkpoints.files.sha256_of", list[str]()
    write_checkpoint(state(1), path)

    def replaced(file: Path) -> str:
        if not hashed:
            with monkeypatch.context() as patch:
                patch.setattr(used, sha256_of)
                write_checkpoint(state(2), path)
            if damaged:
                os.truncate(path, path.stat().st_size - 1)
        hashed.append(sha256_of(file))
        return hashed[-1]

    monkeypatch.setattr(used, replaced)
    assert verify(path) == ("is damaged (its SHA-256 is not the recorded one)" if damaged else None)
    assert len(hashed) == 2


def test_no_file_is_read_that_could_run_code(tmp_path):
    class Evil:
        def __reduce__(self) -> Any:
            return os.system, (f"touch {tmp_path / 'ran'}",)

    path = tmp_path / "a.ckpt"
    torch.save({"state_dict": Evil()}, path)
    with pytest.raises(pickle.UnpicklingError):
        DurableCheckpointIO().load_checkpoint(path)
    with pytest.raises(ValueError, match="would run code"):
        DurableCheckpointIO().load_checkpoint(path, weights_only=False)
    assert not (tmp_path / "ran").exists()


def test_removing_takes_the_record_along(tmp_path):
    path = tmp_path / "a.ckpt"
    write_checkpoint(state(1), path)
    DurableCheckpointIO().remove_checkpoint(path)
    DurableCheckpointIO().remove_checkpoint(path)
    assert not list(tmp_path.iterdir())


def test_a_record_that_cannot_be_read_keeps_nothing_from_being_saved(tmp_path, monkeypatch):
    path = tmp_path / "a.ckpt"
    write_checkpoint(state(1), path)

    def refused(*_: object, **__: object) -> str:
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_text", refused)
        write_checkpoint(state(2), path)
    assert value_of(path) == 2
    assert verify(path) is None


def in_a_process(work: Callable[[], object]) -> Any:
    """What `work` returns in a process of its own."""
    context = multiprocessing.get_context("fork")
    queue: Any = context.SimpleQueue()
    process = context.Process(target=lambda: queue.put(work()), daemon=True)
    process.start()
    process.join(60)
    assert process.exitcode == 0
    return queue.get()


# --- a process that is killed while it writes -----------------------------------------------------------


def left_by_a_killed_process(folder: Path, copies: Path, work: Callable[[], object]) -> list[Path]:
    """Does `work` in a process of its own; copies of the folder before each of its operations on files.

    A process that is killed at an operation leaves the files as they were before it. The last copy is of the
    end. The process is gone when they are looked at: its number is in the names of its temporary files.
    """

    def keep() -> None:
        shutil.copytree(folder, copies / f"{len(list(copies.iterdir())):03d}", symlinks=True)

    def kept(function: Any) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            keep()
            return function(*arguments, **options)

        return call

    def watched() -> None:
        os.fsync = kept(os.fsync)
        for name in ("replace", "unlink", "symlink_to"):
            setattr(Path, name, kept(getattr(Path, name)))
        from gptpl.checkpoints import files as checkpoint_files

        checkpoint_files._HashingFile.write = kept(checkpoint_files._HashingFile.write)  # type: ignore[method-assign]
        work()
        keep()

    copies.mkdir()
    in_a_process(watched)
    return sorted(copies.iterdir())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="writes in a forked process")
@pytest.mark.parametrize("again", ["a new step", "the same name", "the same name, its record lost"])
def test_killed_at_any_moment_the_folder_has_a_whole_newest_checkpoint(tmp_path, again):
    """Every visible checkpoint verifies, `last.ckpt` is one of them, the next save cleans up."""
    written = CheckpointFolder(tmp_path / "written", keep=1)
    write_checkpoint(state(1), written.path(1))
    written.settle(1)
    new = 2 if again == "a new step" else 1
    if "lost" in again:
        record_file(written.path(1)).unlink()

    def work() -> None:
        write_checkpoint(state(7), written.path(new))
        written.settle(new)

    left = left_by_a_killed_process(written.folder, tmp_path / "left", work)
    found, had_leftovers = [], 0
    for copy in left:
        folder = CheckpointFolder(copy, keep=1)
        had_leftovers += any(copy.glob(".*.tmp"))
        last = copy / "last.ckpt"
        for path in [*map(folder.path, folder.steps()), last.resolve()]:
            if record_file(path).exists() or "lost" not in again:
                assert verify(path) is None, path
        found.append(value_of(last))
        good = folder.newest_good()
        assert good is not None
        assert good.damaged == []
        write_checkpoint(state(3), folder.path(3))
        folder.settle(3)
        names = sorted(file.name for file in copy.iterdir())
        assert [name for name in names if name.startswith(".")] == []
        assert value_of(last) == 3.0
    assert had_leftovers > 5  # it was killed in more places than that
    switched = found.index(7.0)
    assert found == [1.0] * switched + [7.0] * (len(left) - switched)
    assert 0 < switched < len(left)


# --- disks that do not take it --------------------------------------------------------------------------


def full_disk(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Half of the file goes through."""
    from gptpl.checkpoints import files as checkpoint_files

    original, written = checkpoint_files._HashingFile._write_chunk, 0

    def write_chunk(self: Any, chunk: memoryview) -> None:
        nonlocal written
        written += len(chunk)
        if written > 2000:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        original(self, chunk)

    monkeypatch.setattr(checkpoint_files._HashingFile, "_write_chunk", write_chunk)


def no_permission(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Also for root, whom a folder's mode does not keep out."""
    original = Path.open

    def opened(self: Path, *arguments: Any, **options: Any) -> Any:
        if self.parent == folder and self.suffix == ".tmp":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self))
        return original(self, *arguments, **options)

    monkeypatch.setattr(Path, "open", opened)


@pytest.mark.parametrize(
    ("trouble", "says"), [(full_disk, "No space left on device"), (no_permission, "Permission denied")]
)
def test_the_error_is_the_systems_and_the_old_checkpoint_stays(tmp_path, monkeypatch, trouble, says):
    path = tmp_path / "a.ckpt"
    write_checkpoint(state(1), path)
    trouble(monkeypatch, tmp_path)
    with pytest.raises(OSError, match=says) as raised:
        write_checkpoint(state(2), path)
    monkeypatch.undo()
    assert raised.value.filename == str(path)
    assert value_of(path) == 1
    assert verify(path) is None
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.ckpt", "a.ckpt.sha256"]


def test_a_real_limit_of_the_system_is_met_in_the_middle_of_the_file(tmp_path):
    path = tmp_path / "a.ckpt"
    write_checkpoint(state(1), path)
    weights = {"weight": torch.zeros(100_000)}  # here, as torch's threads do not survive the fork

    def limited() -> str:
        import resource

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        try:
            write_checkpoint(weights, path)
        except OSError as error:
            return str(error)
        return "written"

    assert in_a_process(limited) == f"[Errno 27] File too large: '{path}'"
    assert verify(path) is None
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.ckpt", "a.ckpt.sha256"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="/dev/full is Linux's")
def test_a_device_that_is_full(tmp_path, monkeypatch):
    path = tmp_path / "a.ckpt"
    original = Path.open

    def opened(self: Path, *arguments: Any, **options: Any) -> Any:
        return original(Path("/dev/full") if self.suffix == ".tmp" else self, *arguments, **options)

    monkeypatch.setattr(Path, "open", opened)
    with pytest.raises(OSError, match=rf"No space left on device: '{path}'"):
        write_checkpoint(state(1), path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("process", ["999999999999999999999999", "1" * 30])
def test_a_leftover_that_no_process_can_have_written_stops_nothing(tmp_path, process):
    (tmp_path / f".a.{process}.tmp").touch()
    write_checkpoint(state(1), tmp_path / "a.ckpt")
    assert verify(tmp_path / "a.ckpt") is None


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss has another unit elsewhere")
def test_saving_needs_no_second_copy_in_memory(tmp_path):
    weights = {str(i): torch.ones(2_500_000) for i in range(20)}  # 200 MB

    def measured() -> float:
        import resource

        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        write_checkpoint(weights, tmp_path / "a.ckpt")
        return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024

    assert in_a_process(measured) < 60  # MB; Lightning's own way takes 200
