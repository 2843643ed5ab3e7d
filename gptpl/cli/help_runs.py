"""What `--help` prints of the commands about runs on disk."""

RUNS_HELP = {
    "runs list": """\
gptpl runs list: which runs are on disk, with their losses and sizes

usage: gptpl runs list [FOLDER] ... [sort=date|loss|size] [--json]

examples:
  gptpl runs list                         # all below runs/, the newest first, sweeps together
  gptpl runs list runs/sweeps sort=loss   # the best first
  gptpl runs list sort=size               # what to remove when the disk is full
  gptpl runs list --json | jq .run        # a JSON object a line

`state` is finished, stopped (from outside, or by the settings), failed, unfinished (still running, or ended
without a word) or damaged; `steps` are those made of those planned, `val loss` is the lowest, in nats per
token, `size` that of all files, `checkpoints` their part in it.""",
    "runs show": """\
gptpl runs show: one run at a glance

usage: gptpl runs show RUN [--json]

examples:
  gptpl runs show runs/tale/2026-11-21_14-51-09
  gptpl runs show RUN --json    # with run.json whole

State, command, data, model, first weights, steps, time, memory, losses, resumptions, the last sample,
files with their sizes, and the commands that go on or generate.""",
    "runs diff": """\
gptpl runs diff: in what runs differ, and what came of it

usage: gptpl runs diff RUN1 RUN2 [RUN3] ...

examples:
  gptpl runs diff runs/quick/2026-11-21_14-51-09 runs/quick/2026-11-21_15-02-10
  gptpl runs diff runs/sweeps/2026-11-21_20-12-49/*/

Side by side: the settings that differ; what differs beside them (the data's hash, versions, git commit,
first weights, hardware); the results. Exit status 0 with and without differences.""",
    "runs rm": """\
gptpl runs rm: remove runs, or only their checkpoints, after asking

usage: gptpl runs rm RUN ... [--checkpoints] [--yes]

examples:
  gptpl runs rm runs/quick/2026-11-21_14-51-09
  gptpl runs rm runs/sweeps/2026-11-21_20-12-49 --yes   # a whole sweep, without a question
  gptpl runs rm RUN --checkpoints                       # keep best.ckpt, and with it the model

settings:
  --checkpoints   remove what the run needs to be resumed, most of its size; best.ckpt and all else stay
  --yes, -y       do not ask; needed where there is no terminal

RUN is a run's folder or a sweep's; nothing else is removed. Before the question come the sizes, and warnings:
files that gptpl did not write, other runs that began with these weights, a run that may be running. Links are
removed, not what they point at. A removal that was interrupted is finished by the same command.""",
}
