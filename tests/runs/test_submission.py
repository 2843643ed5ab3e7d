"""`gptpl submit`: the script, in front of stand-ins for SLURM's commands that set what SLURM sets."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from gptpl.errors import InputError
from gptpl.runs.submission import seconds_of, submit

ROOT = Path(__file__).parents[2]
SBATCH = """
printf '%s\\n' "$@" > "$SLURM_STAND_IN/sbatch"
[ -e "$SLURM_STAND_IN/refuses" ] && { echo 'invalid partition' >&2; exit 1; }
echo '4242;cluster'
"""
SCONTROL = 'echo "$@" >> "$SLURM_STAND_IN/scontrol"'
SRUN_ENDS = """
printf '%s\\0' "$@" > "$SLURM_STAND_IN/srun"
[ -z "$SAVES" ] || { mkdir -p r/checkpoints; touch "r/checkpoints/$SAVES"; }
exit "$STATUS"
"""
SRUN_STARTS_TWO_TASKS = """
while [[ $1 == --* ]]; do shift; done
export SLURM_NTASKS=2 SLURM_STEP_NUM_TASKS=2 SLURM_NNODES=2 SLURM_STEP_NUM_NODES=2 SLURM_LOCALID=0
export SLURM_STEP_TASKS_PER_NODE='1(x2)' SLURM_STEP_NODELIST=127.0.0.1
for number in 0 1; do
    SLURM_PROCID=$number SLURM_NODEID=$number GPTPL_CACHE=$SLURM_STAND_IN/cache_$number "$@" &
    tasks+=($!)
done
echo "${tasks[@]}" > "$SLURM_STAND_IN/tasks"
for task in "${tasks[@]}"; do
    wait "$task"
    ended=$?
    (( ended > status )) && status=$ended
done
exit "${status:-0}"
"""


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """`cluster(sbatch=..., srun=...)`: these commands; returns the folder of what they were given."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    monkeypatch.setenv("SLURM_STAND_IN", str(tmp_path))
    for name in [name for name in os.environ if name.startswith(("SLURM_JOB", "SLURM_RESTART", "MASTER_"))]:
        monkeypatch.delenv(name)

    def install(**commands: str) -> Path:
        for name, text in commands.items():
            path = tmp_path / "bin" / name
            path.write_text(f"#!/bin/bash\n{text}\n")
            path.chmod(0o755)
        return tmp_path

    return install


def started(script: Path, **variables: object) -> subprocess.Popen[str]:
    """The script as SLURM starts it, in another folder."""
    given = {"SLURM_JOB_ID": "4242"} | {name: str(each) for name, each in variables.items()}
    return subprocess.Popen(
        ["bash", str(script)],
        cwd="/",
        env=os.environ | given,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def options(script: str) -> list[str]:
    return [line.removeprefix("#SBATCH ") for line in script.splitlines() if line.startswith("#SBATCH ")]


SMALL = ("experiment=quick", "trainer=cpu")
OTHERS = (0, 1, 2, 130, 137, 138)
"""How a job ends that is not stopped by the signal: well, by an error, by other signals."""


# --- the script -----------------------------------------------------------------------------------------


def test_a_job_of_gpus(cluster):
    cluster()
    given = [
        *("submit.nodes=2", "submit.gpus_per_node=8", "submit.time=24:00:00", "submit.cpus_per_task=6"),
        *("submit.partition=gpu", "submit.account=lab", "submit.mem=0", "submit.dry_run=true"),
    ]
    found = submit("experiment=quick", *given, 'submit.options=["--constraint=h100"]', "run_dir=runs/web")
    run_dir = Path.cwd() / "runs/web"
    assert options(found.script) == [
        *("--job-name=web", "--account=lab", "--partition=gpu", "--nodes=2", "--ntasks-per-node=8"),
        *("--gpus-per-node=8", "--cpus-per-task=6", "--mem=0", "--time=24:00:00", "--signal=TERM@300"),
        *("--requeue", "--dependency=singleton", "--open-mode=append", f"--output={run_dir}/slurm-%j.out"),
        "--constraint=h100",
    ]
    assert found.script.startswith("#!/bin/bash\n")
    assert (found.path, found.job) == (run_dir / "submit.sh", None)
    assert "srun --kill-on-bad-exit=0 --wait=600 --cpus-per-task=6 " in found.script
    assert list(Path.cwd().iterdir()) == []


def test_a_node_of_cpus_has_one_task(cluster):
    cluster()
    found = options(submit(*SMALL, "submit.nodes=3", "run_dir=r", "submit.dry_run=true").script)
    assert {"--nodes=3", "--ntasks-per-node=1"} < set(found)
    assert not [each for each in found if each.startswith(("--gpus", "--time", "--cpus", "--mem", "--part"))]


def test_every_word_arrives_as_it_was_given(cluster, tmp_path):
    cluster(srun=SRUN_ENDS)
    run_dir = tmp_path / "it's $HOME; touch here"
    notes = "notes=a 'b' \"c\" $(touch owned) `touch owned` \\ & ; # \n *"
    setup = "submit.setup=greeting='a, b'; echo \"$greeting\""
    found = submit(*SMALL, notes, f"run_dir={run_dir}", setup, "resume=auto", "submit.dry_run=true")
    script = tmp_path / "script.sh"
    script.write_text(found.script)
    assert subprocess.run(["bash", "-n", str(script)], check=True, capture_output=True).stderr == b""
    job = started(script, STATUS=0)
    assert job.communicate(timeout=20) == ("a, b\n", "")
    given = (tmp_path / "srun").read_text().split("\0")[:-1]
    of_run = ["gptpl", "train", *SMALL, notes, f"run_dir={run_dir}", "resume=auto"]
    assert given == ["--kill-on-bad-exit=0", "--wait=600", *of_run]
    assert list(Path.cwd().iterdir()) == []  # where the script goes: nothing was touched
    assert f'--output="{run_dir}/slurm-%j.out"' in options(found.script)


def test_a_job_that_saved_nothing_new_is_not_put_back(cluster):
    """It would begin at the same step again, as often as it is put back."""
    folder = cluster(sbatch=SBATCH, srun=SRUN_ENDS, scontrol=SCONTROL)
    path = submit(*SMALL, "run_dir=r").path
    for saves in ("", "step-00000004.ckpt", "best.ckpt"):
        if saves:
            (Path("r") / "checkpoints").mkdir(exist_ok=True)
            (Path("r") / "checkpoints/step-00000004.ckpt").touch()
        job = started(path, STATUS=143, SAVES=saves)
        assert "the run has saved no step since it started" in job.communicate(timeout=20)[1], saves
        assert job.returncode == 143
        assert not (folder / "scontrol").exists()


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (("callbacks=none",), "the run keeps no checkpoint to resume from"),
        (("trainer=gpu",), "trainer.accelerator=gpu needs submit.gpus_per_node: it is 0"),
        (("trainer=cpu", "submit.gpus_per_node=4"), "leaves submit.gpus_per_node=4 idle"),
        (("trainer.sharded_checkpoints=true", "submit.nodes=2"), "needs trainer.strategy=fsdp or hsdp"),
        (("on_nonfinite=rollback", "submit.nodes=2"), "on_nonfinite=rollback restarts the training"),
        (("submit.time=7",), "or a minute earlier"),
        (('submit.options=["--signal=B:TERM@60"]',), "would change what the script relies on"),
        (('submit.options=["--array=0-3"]',), "would change what the script relies on"),
    ],
)
def test_what_the_run_or_its_script_would_refuse_is_refused_now(cluster, overrides, words):
    cluster()
    with pytest.raises(InputError, match=re.escape(words)):
        submit("experiment=quick", "run_dir=r", "submit.dry_run=true", *overrides)


def test_only_a_stop_by_the_signal_is_put_back_into_the_queue(cluster):
    folder = cluster(sbatch=SBATCH, srun=SRUN_ENDS, scontrol=SCONTROL)
    path = submit(*SMALL, "run_dir=r", "submit.max_requeues=2").path
    (Path("r") / "checkpoints").mkdir()
    (Path("r") / "checkpoints/step-00000004.ckpt").touch()
    ends = [(143, None, True), (143, 1, True), (143, 2, False), *((status, 0, False) for status in OTHERS)]
    for status, restarts, requeued in ends:
        count = {} if restarts is None else {"SLURM_RESTART_COUNT": restarts}
        job = started(path, STATUS=status, SAVES="step-00000012.ckpt", **count)
        said = job.communicate(timeout=20)
        assert job.returncode == status, said
        asked = folder / "scontrol"
        found = asked.read_text() if asked.exists() else ""
        assert found == ("requeue 4242\n" if requeued else ""), (status, restarts)
        asked.unlink(missing_ok=True)
        (Path("r") / "checkpoints/step-00000012.ckpt").unlink()


# --- submitting -----------------------------------------------------------------------------------------


def test_it_is_written_and_submitted(cluster):
    folder = cluster(sbatch=SBATCH)
    found = submit(*SMALL, "run_dir=r")
    assert found.job == "4242"
    assert found.path.read_text() == found.script
    assert (folder / "sbatch").read_text().splitlines() == ["--parsable", str(found.path)]
    assert submit(*SMALL, "run_dir=r").script == found.script  # the same once more
    with pytest.raises(InputError, match=r"submit\.sh exists, with another content: remove it, or give"):
        submit(*SMALL, "run_dir=r", "submit.nodes=2")
    assert found.path.read_text() == found.script
    other = submit(*SMALL, "run_dir=r", "submit.nodes=2", "submit.file=jobs/two.sh")
    assert other.path == Path.cwd() / "jobs/two.sh"


def test_without_sbatch_it_says_where_the_script_is(cluster):
    cluster()
    with pytest.raises(InputError, match=rf"no sbatch here: the script is {Path.cwd()}/r/submit.sh"):
        submit(*SMALL, "run_dir=r")
    assert Path("r/submit.sh").is_file()


def test_what_sbatch_says_is_said(cluster):
    (cluster(sbatch=SBATCH) / "refuses").touch()
    with pytest.raises(InputError, match=r"sbatch refuses .*/r/submit\.sh: invalid partition"):
        submit(*SMALL, "run_dir=r")


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ([], r"^run_dir is not set: give run_dir=FOLDER, which all nodes"),
        (["run_dir=r", "resume=latest"], r"^resume=latest: give run_dir=FOLDER of that run instead"),
        (["run_dir=r", "optimizer.lrr=1"], r"did you mean optimizer\.lr"),
        (["run_dir=r", "model.n_heads=7"], r"emb_dim must be a multiple of n_heads"),
        (["run_dir=r", "trainer.timeout=1h"], r"trainer\.timeout must be DD:HH:MM:SS"),
        (["run_dir=r", "trainer.devices=4"], r"trainer\.devices=4, but there are 1 node x 1 process"),
        (["run_dir=r", "submit.node=2"], r"submit\.node.*nodes"),
        (["run_dir=r", "submit.nodes=0"], r"submit\.nodes=0"),
        (["run_dir=r", "submit.time=soon"], r"submit\.time=soon: give minutes, HH:MM:SS"),
        (["run_dir=r", "submit.time=5"], r"submit\.time=5 is 300 s, and the run would be stopped"),
        (["run_dir=r", "submit.signal_seconds=0"], r"submit\.signal_seconds must be 1 to 65535, got 0"),
        (["run_dir=r", "submit.partition=a b"], r"submit\.partition='a b': sbatch takes no blanks"),
        (["run_dir=r", "submit.job_name='a\n#SBATCH --uid=0'"], r"submit\.job_name='a\\n#SBATCH"),
        (["run_dir=r", "submit.options=[constraint]"], r"submit\.options: 'constraint' must begin with -"),
        (["run_dir=r%j"], r"run_dir=.*r%j: SLURM cannot write its log there"),
    ],
)  # fmt: skip
def test_what_would_wait_in_the_queue_is_refused_before(cluster, overrides, words):
    folder = cluster(sbatch=SBATCH)
    with pytest.raises(InputError, match=words):
        submit(*SMALL, *overrides)
    assert list(Path.cwd().iterdir()) == []
    assert not (folder / "sbatch").exists()


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        *(("30", 1_800), ("30:15", 1_815), ("24:00:00", 86_400)),
        *(("2-0", 172_800), ("1-2:30", 95_400), ("1-0:0:9", 86_409)),
    ],
)
def test_time_limits_are_read_as_sbatch_reads_them(text, seconds):
    assert seconds_of(text) == seconds


# --- a run ----------------------------------------------------------------------------------------------


@pytest.mark.hosts
def test_a_job_is_stopped_put_back_and_finishes(cluster, tmp_path):
    """Two tasks on two nodes; SLURM's signal comes to both of them in the middle."""
    folder = cluster(sbatch=SBATCH, srun=SRUN_STARTS_TWO_TASKS, scontrol=SCONTROL)
    run_dir, notes = tmp_path / "my run", 'notes=it\'s "quoted", $(and) odd'
    overrides = [
        *(*SMALL, notes, "trainer.max_steps=10", "scheduler.warmup_steps=2", "eval_every_n_steps=5"),
        *("~callbacks.sample_text", "callbacks.checkpoint_last.every_n_steps=1"),
        "+callbacks.slow._target_=tests.training.test_launchers.Slow",
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "gptpl", "submit", "submit.nodes=2", f"run_dir={run_dir}", *overrides],
        env=environment, text=True, capture_output=True, timeout=100, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    script = run_dir / "submit.sh"
    assert done.stdout == f"script  {script}\njob     4242\nlog     {run_dir}/slurm-4242.out\n"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        variables = {"PYTHONPATH": ROOT, "OMP_NUM_THREADS": 1, "MASTER_PORT": free.getsockname()[1]}

    job = started(script, **variables)
    deadline = time.monotonic() + 100
    while not (run_dir / "checkpoints/step-00000003.ckpt").exists():
        assert time.monotonic() < deadline
        assert job.poll() is None, job.communicate()
        time.sleep(0.02)
    for task in (folder / "tasks").read_text().split():
        os.kill(int(task), signal.SIGTERM)
    said = job.communicate(timeout=60)
    assert job.returncode == 143, said
    assert (folder / "scontrol").read_text() == "requeue 4242\n"
    record = json.loads((run_dir / "run.json").read_text())
    assert record["stopped"]["reason"] == "SIGTERM"
    assert 3 <= record["stopped"]["step"] < 10
    assert notes in record["overrides"]

    job = started(script, SLURM_RESTART_COUNT=1, **variables)
    said = job.communicate(timeout=100)
    assert job.returncode == 0, said
    assert (folder / "scontrol").read_text() == "requeue 4242\n"  # not once more
    record = json.loads((run_dir / "run.json").read_text())
    assert record["steps"] == 10
    assert len(record["resumed"]) == 1
    assert record["resumed"][0]["step"] >= 3


@pytest.mark.hosts
def test_a_job_that_fails_is_not_put_back(cluster, tmp_path):
    folder = cluster(sbatch=SBATCH, srun=SRUN_STARTS_TWO_TASKS, scontrol=SCONTROL)
    data = ("data=text_file", f"data.path={tmp_path / 'none'}")
    path = submit(*SMALL, *data, "submit.nodes=2", "run_dir=r").path
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        job = started(path, PYTHONPATH=ROOT, OMP_NUM_THREADS=1, MASTER_PORT=free.getsockname()[1])
    said = job.communicate(timeout=100)
    assert job.returncode == 2, said
    assert re.search(r"gptpl: error: .*none", said[1])
    assert not (folder / "scontrol").exists()
