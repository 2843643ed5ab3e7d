"""The contract of `resume=`: which settings may change when a run goes on, and which make it another run."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

from gptpl.errors import InputError

Kind = Literal["free", "re-schedulable", "fatal"]
FREE: Kind = "free"
RESCHEDULABLE: Kind = "re-schedulable"
FATAL: Kind = "fatal"

ABSENT: Any = object()
"""In place of the value of a setting that there is none of."""

FREE_SETTINGS = (
    "name",
    "resume",
    "callbacks.*",
    "logger.*",
    "trainer.max_time",
    "trainer.stop_at_step",
    "trainer.log_every_n_steps",
    "trainer.recompute_activations",
    "trainer.keep_freed_memory",
    "data.num_workers",
    "data.pin_memory",
    "data.persistent_workers",
    # Where the text is; that it is the same text is checked by its hash.
    "data.path",
    "data.corpus.path",
    *("data.train_path", "data.corpus.train_path"),
    *("data.val_path", "data.corpus.val_path"),
    *("data.test_path", "data.corpus.test_path"),
    *("data.text_column", "data.corpus.text_column"),
    *("data.label_column", "data.corpus.label_column"),
    *("data.format", "data.corpus.format"),
    *("data.columns", "data.corpus.columns"),
)
"""They leave the weights as they would have been."""

INEXACT_SETTINGS = (
    "deterministic",
    "trainer.accelerator",
    "trainer.devices",
    "trainer.num_nodes",
    "trainer.strategy",
    "trainer.precision",
    "trainer.compile",
    "trainer.attention",
    "trainer.head",
    # Only together with the number of processes: the windows of a whole batch stay as many, which is checked.
    "data.batch_size",
)
"""Free as well: the same training, but by other kernels or in another order of additions."""

RESCHEDULABLE_SETTINGS = (
    "optimizer.lr",
    "optimizer.muon_lr",
    "optimizer.weight_decay",
    "optimizer.betas",
    "optimizer.eps",
    "optimizer.momentum",
    "scheduler.*",
    "trainer.max_epochs",
    "trainer.max_steps",
    "trainer.gradient_clip_val",
    "eval_every_n_steps",
    "eval_train_batches",
    "eval_val_batches",
    "model.drop_rate",
    "tune.dropout",
    "on_nonfinite",
    "skip_steps",
)
"""They change the training from the next step on, as asked."""

FATAL_SETTINGS = (
    "experiment",
    "run_dir",
    "init.*",
    "seed",
    "task.*",
    "tune._target_",
    "tune.rank",
    "tune.alpha",
    "tune.targets",
    "tokenizer.*",
    "model.vocab_size",
    "model.context_length",
    "model.emb_dim",
    "model.n_heads",
    "model.n_layers",
    "model.qkv_bias",
    "model.tie_weights",
    "model.init",
    "data.train_ratio",
    "data.train_share",
    "data.test_share",
    "data.shuffle",
    "data.duplicates",
    "data.template",
    "data.response_marker",
    "data.instruction_column",
    "data.input_column",
    "data.output_column",
    "data.mask_instruction",
    "data.too_long",
    "data.packing",
    "data.max_length",
    "data.stride",
    "data.global_batch_size",
    "data.pattern",
    "data._target_",
    "data.split_seed",
    "data.val_share",
    "data.stratified",
    "data.balance",
    "data.truncate",
    "data.padding",
    "data.corpus._target_",
    "data.corpus.member",
    "data.corpus.pattern",
    "data.corpus.name",
    "data.corpus.url",
    "data.corpus.sha256",
    "data.corpus.filename",
    "optimizer._target_",
    "optimizer._partial_",
    "optimizer.decay",
    "trainer.accumulate_grad_batches",
)
"""What the steps behind the run were made with. A setting that stands nowhere here is one of these."""


INEXACT = " (no longer bit-identical with the unbroken run)"


@dataclass(frozen=True, kw_only=True)
class Change:
    """A setting that differs from the one the checkpoint was made with; None stands for null and for none."""

    key: str
    old: Any
    new: Any
    kind: Kind
    notice: bool
    """Whether the run is from here on no longer bit-identical with the one that was never stopped."""

    def line(self, step: int) -> str:
        """In words, for a run that `step` optimizer steps are behind."""
        key, old, new = self.key, spelt(self.old), spelt(self.new)
        if key.endswith("._target_"):  # a class: the last of its names says enough
            key, old, new = key.removesuffix("._target_"), old.rpartition(".")[2], new.rpartition(".")[2]
        exact = self.kind == FREE and not self.notice
        when = " (from now on)" if exact else f", from step {step + 1}"
        return f"  {key}: {old} -> {new}{when}{INEXACT if self.notice else ''}"


def kind_of(key: str) -> Kind:
    """The class of a setting by its dotted key; one that no list names is fatal."""
    if _matches(key, (*FREE_SETTINGS, *INEXACT_SETTINGS)):
        return FREE
    return RESCHEDULABLE if _matches(key, RESCHEDULABLE_SETTINGS) else FATAL


def changes_between(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[Change]:
    """Every setting of two configurations of plain data that is not the same in both."""
    return [
        Change(key=key, old=before, new=after, kind=kind_of(key), notice=_matches(key, INEXACT_SETTINGS))
        for key, before, after in _differences(old, new, "")
    ]


def _differences(old: Any, new: Any, key: str) -> Iterator[tuple[str, Any, Any]]:
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for name in dict.fromkeys((*old, *new)):
            inner = f"{key}.{name}" if key else str(name)
            yield from _differences(old.get(name, ABSENT), new.get(name, ABSENT), inner)
        return
    before, after = (None if value is ABSENT else value for value in (old, new))
    # Python holds True and 1 for the same.
    if before != after or isinstance(before, bool) != isinstance(after, bool):
        yield key, before, after


def check_changes(changes: list[Change], given: Mapping[str, str], run_dir: Path) -> None:
    """Raises InputError for the first change that would make it another run.

    `given` are the overrides of the command line by key; a change that none of them asked for was made in the
    run's config.yaml.
    """
    fatal = [(change, _asked_by(change, given)) for change in changes if change.kind == FATAL]
    # First what was asked for: another setting may have followed it.
    for change, override in sorted(fatal, key=lambda pair: pair[1] is None):
        if override is None:
            raise InputError(
                f"{change.key}={spelt(change.old)} made the checkpoint, but {run_dir / 'config.yaml'} has"
                f" {spelt(change.new)}: restore it there, or start a new run"
            )
        raise InputError(
            f"{change.key} cannot change when a run is resumed: it was {spelt(change.old)}, asked for is"
            f" {spelt(change.new)}; leave {override} out, or start a new run with it"
        )


def _asked_by(change: Change, given: Mapping[str, str]) -> str | None:
    return next((given[key] for key in _with_parents(change.key) if key in given), None)


def _with_parents(key: str) -> Iterator[str]:
    """The key, then ever larger parts of the configuration that it belongs to."""
    while key:
        yield key
        key = key.rpartition(".")[0]


def spelt(value: Any) -> str:
    """A setting's value in a line of text, nearly as one would give it."""
    if isinstance(value, Mapping):
        return "{...}"
    if isinstance(value, list):
        return f"[{', '.join(spelt(item) for item in value)}]"
    if isinstance(value, bool):
        return str(value).lower()
    return "null" if value is None else str(value)


def _matches(key: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(key, pattern) for pattern in patterns)
