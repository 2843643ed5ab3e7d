"""A run as a SLURM job: a script that starts it, and has it continued after a time limit or a preemption.

SLURM sends SIGTERM to the tasks some time before the limit; gptpl then saves and ends with the status of that
signal, for which alone the script puts the job back into the queue, if the run has got further. There
`resume=auto` continues it. A preemption signals the script, too, and ends it: SLURM itself puts the job back
where the partition is set up to requeue, and the run saves what it can within the partition's GraceTime.
"""

import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gptpl.callbacks.stopping import duration
from gptpl.config.compose import Config, composed
from gptpl.config.groups import Folder
from gptpl.config.overrides import key_of
from gptpl.errors import SIGNAL_STATUS, InputError
from gptpl.files.durable import write_atomically
from gptpl.files.run_record import CHECKPOINT_FOLDER
from gptpl.runs import parts
from gptpl.runs.build import planned_config
from gptpl.runs.claims import AUTO
from gptpl.runs.fit import check_rollback
from gptpl.runs.trainer import build_strategy, check_strategy, launched
from gptpl.runs.verify import check_keeps_checkpoints
from gptpl.text import one_line
from gptpl.training.processes import Launcher

_STOPPED = SIGNAL_STATUS + signal.SIGTERM
_GIVEN_HERE = ("run_dir", "resume", "hydra.run.dir")
"""Settings of a run that its script gives itself."""
_MOST_SIGNAL_SECONDS = 65_535  # SLURM's own limit
_START_SECONDS = 120  # SLURM signals up to a minute early, and the run has to start
_MOST_MINUTES = 60_000  # YAML takes 24:00:00 for 86,400
_NOT_OPTIONS = (
    *("--signal", "--array", "--nodes", "--ntasks", "--output", "--no-requeue", "--dependency"),
    *("--gpus-per-task", "--gpu-bind", "--open-mode"),
)
"""Options of sbatch on which the script relies."""


@dataclass(frozen=True, kw_only=True)
class Submission:
    """A SLURM job.

    Attributes:
        script: the text of its script.
        path: the script's file.
        log: the file of its output, with SLURM's %j for the job's number.
        job: the number; None where nothing was submitted.
    """

    script: str
    path: Path
    log: str
    job: str | None = None


def submit(*overrides: str, config_dir: Folder | None = None) -> Submission:
    """Write the script of a run, and submit it: `submit("submit.nodes=2", "experiment=quick", "run_dir=F")`.

    The overrides are those of the run and of the node `submit`, see conf/submit.yaml; `submit.dry_run=true`
    writes nothing. The run's folder must be visible to all nodes. Raises InputError, before anything is
    written, for settings that the run would refuse, and for a script with another content; afterwards where
    there is no sbatch, or it refuses the job.
    """
    cfg = composed(overrides, "submit", config_dir=config_dir).cfg
    if cfg.run_dir is None:
        raise InputError(
            "run_dir is not set: give run_dir=FOLDER, which all nodes must see; a job that is put back into"
            " the queue continues there"
        )
    if cfg.resume not in (None, "auto"):
        raise InputError(
            f"resume={cfg.resume}: give run_dir=FOLDER of that run instead, a job continues what is there"
        )
    own, run_dir = cfg.submit, Path(cfg.run_dir).expanduser().absolute()
    of_run = [each for each in overrides if key_of(each).partition(".")[0] != "submit"]
    of_run = [each for each in of_run if key_of(each) not in _GIVEN_HERE] + [f"run_dir={run_dir}"]
    tasks = max(1, own.gpus_per_node)
    _check_run(of_run, config_dir, own, tasks)
    log = f"{run_dir}/slurm-%j.out"
    if re.search(r'["\\\n%]', str(run_dir)):
        raise InputError(f'run_dir={run_dir}: SLURM cannot write its log there, for one of " \\ %')
    folder = [] if config_dir is None else ["--config-dir", str(Path(config_dir).expanduser().absolute())]
    program = [sys.executable, "-m", "gptpl"] if own.setup is None else ["gptpl"]
    command = [*program, "train", *folder, *of_run, "resume=auto"]
    script = _script(_options(own, tasks, run_dir=run_dir, log=log), command, own, run_dir)
    path = run_dir / "submit.sh" if own.file is None else Path(own.file).expanduser().absolute()
    job = None
    if not own.dry_run:
        _write(path, script)
        run_dir.mkdir(parents=True, exist_ok=True)  # for the log: SLURM makes no folder
        job = _submitted(path)
    return Submission(script=script, path=path, log=log, job=job)


def _check_run(overrides: Sequence[str], config_dir: Folder | None, own: Config, tasks: int) -> None:
    """Refuse what the run would refuse, as far as can be told without its data and devices."""
    nodes = own.nodes
    cfg: Config = planned_config([*overrides, f"resume={AUTO}"], config_dir=config_dir)[0]
    timeout = duration(cfg.trainer.timeout, "trainer.timeout")
    check_strategy(cfg)
    accelerator = str(cfg.trainer.accelerator)
    if accelerator in ("gpu", "cuda") and not own.gpus_per_node:
        raise InputError(f"trainer.accelerator={accelerator} needs submit.gpus_per_node: it is 0")
    if accelerator == "cpu" and own.gpus_per_node:
        raise InputError(
            f"trainer.accelerator=cpu leaves submit.gpus_per_node={own.gpus_per_node} idle: leave one out"
        )
    check_keeps_checkpoints(cfg)
    if parts.is_gpt(cfg):
        parts.model_config(cfg)
    launcher = Launcher(
        name="SLURM",
        rank=0,
        world_size=nodes * tasks,
        local_rank=0,
        local_world_size=tasks,
        node_rank=0,
        address="",
        port=0,
    )
    found = {**cfg.trainer, **launched(cfg.trainer, launcher)}
    build_strategy(found["strategy"], timeout, sharded_checkpoints=cfg.trainer.sharded_checkpoints)
    check_rollback(cfg, nodes * tasks)


# --- the script -----------------------------------------------------------------------------------------


def _options(own: Config, tasks: int, *, run_dir: Path, log: str) -> list[str]:
    """Of sbatch."""
    if not 0 < own.signal_seconds <= _MOST_SIGNAL_SECONDS:
        raise InputError(
            f"submit.signal_seconds must be 1 to {_MOST_SIGNAL_SECONDS}, got {own.signal_seconds}"
        )
    if isinstance(own.time, int) and own.time >= _MOST_MINUTES:
        raise InputError(f'submit.time={own.time} would be minutes: quote it, as in submit.time: "24:00:00"')
    if own.time is not None and (limit := seconds_of(str(own.time))) <= own.signal_seconds + _START_SECONDS:
        raise InputError(
            f"submit.time={own.time} is {limit} s, and the run would be stopped submit.signal_seconds="
            f"{own.signal_seconds} before, or a minute earlier: give more time, or fewer seconds"
        )
    given: Mapping[str, Any] = {
        "job_name": own.job_name or re.sub(r"[^\w.-]", "_", run_dir.name, flags=re.ASCII) or "gptpl",
        "account": own.account,
        "partition": own.partition,
        "nodes": own.nodes,
        "ntasks_per_node": tasks,
        "gpus_per_node": own.gpus_per_node or None,
        "cpus_per_task": own.cpus_per_task,
        "mem": own.mem,
        "time": own.time,
    }
    for name, value in given.items():
        if value is not None and not re.fullmatch(r"[^\s\"'\\#]+", str(value)):
            raise InputError(f"submit.{name}={value!r}: sbatch takes no blanks, quotes, # or \\ in it")
    for option in own.options:
        if not re.fullmatch(r"-[^\s\"'\\#]+", str(option)):
            raise InputError(f"submit.options: {option!r} must begin with -, without blanks, quotes, # or \\")
        if str(option).startswith(_NOT_OPTIONS):
            raise InputError(f"submit.options: {option} would change what the script relies on: leave it out")
    return [
        *(f"--{name.replace('_', '-')}={value}" for name, value in given.items() if value is not None),
        f"--signal=TERM@{own.signal_seconds}",  # without B: to the tasks, not to the script
        "--requeue",
        "--dependency=singleton",  # a second job of this name waits for the first
        "--open-mode=append",
        f"--output={log}" if re.fullmatch(r"[\w./%+@:=,-]+", log) else f'--output="{log}"',
        *own.options,
    ]


def seconds_of(time: str) -> int:
    """A time limit of sbatch's: minutes, M:S, H:M:S, D-H, D-H:M or D-H:M:S. Raises InputError for another."""
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", time)
    if match is None:
        raise InputError(f"submit.time={time}: give minutes, HH:MM:SS or DAYS-HH:MM:SS, such as 24:00:00")
    days, *rest = match.groups()
    numbers = [int(each) for each in rest if each is not None]
    if days is None and len(numbers) < 3:
        numbers.insert(0, 0)  # minutes first
    hours, minutes, seconds = [*numbers, 0, 0][:3]
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds


_LAST_SECONDS = 600
"""How long the other tasks may go on when one has ended."""


def _script(options: Sequence[str], command: Sequence[str], own: Config, run_dir: Path) -> str:
    # Else SLURM sends SIGTERM itself, after another task's error; and the tasks that are left end.
    srun = ["srun", "--kill-on-bad-exit=0", f"--wait={_LAST_SECONDS}"]
    if own.cpus_per_task is not None:
        srun.append(f"--cpus-per-task={own.cpus_per_task}")  # which srun no longer takes from sbatch
    lines = "\n".join(f"#SBATCH {option}" for option in options)
    setup = "" if own.setup is None else f"{own.setup}\n"
    folder = shlex.quote(str(run_dir / CHECKPOINT_FOLDER))
    newest = f"ls {folder} 2>/dev/null | grep '^step-.*ckpt$' | sort | tail -n 1"
    return f"""\
#!/bin/bash
# Written by gptpl submit. It begins the run, or continues it.
{lines}

cd {shlex.quote(str(Path.cwd()))} || exit 1
unset RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE NODE_RANK MASTER_ADDR MASTER_PORT GPTPL_RUN_DIR
{setup}newest() {{ {newest}; }}
before=$(newest)
status=0
{shlex.join([*srun, *command])} || status=$?
if [ "$status" -eq {_STOPPED} ]; then  # stopped by SIGTERM
    if [ "$(newest)" = "$before" ]; then
        echo "not put back into the queue: the run has saved no step since it started" >&2
    elif [ "${{SLURM_RESTART_COUNT:-0}}" -lt {own.max_requeues} ]; then
        scontrol requeue "$SLURM_JOB_ID"
    else
        echo "not put back into the queue: submit.max_requeues={own.max_requeues}" >&2
    fi
fi
exit "$status"
"""


def _write(path: Path, script: str) -> None:
    if path.exists():
        if not path.is_file() or path.read_text(encoding="utf-8", errors="replace") != script:
            raise InputError(f"{path} exists, with another content: remove it, or give submit.file=FILE")
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, script)


def _submitted(path: Path) -> str:
    """The number of the job."""
    if shutil.which("sbatch") is None:
        raise InputError(f"there is no sbatch here: the script is {path}, for sbatch on the cluster")
    done = subprocess.run(
        ["sbatch", "--parsable", str(path)], capture_output=True, text=True, errors="replace", check=False
    )
    if done.returncode:
        said = one_line((done.stderr or done.stdout).strip()) or f"status {done.returncode}"
        raise InputError(f"sbatch refuses {path}: {said}")
    return done.stdout.strip().partition(";")[0]  # JOB;CLUSTER
