"""`gptpl report`: runs side by side, as a web page and as Markdown."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from gptpl.errors import InputError
from gptpl.records.run_record import RunError, RunRecord, find_runs, read_run
from gptpl.report.contents import contents
from gptpl.report.failures import Failure, find_failures
from gptpl.report.terminal import terminal_lines
from gptpl.report.write import write_contents, write_report

EXIT_DAMAGED = 1


@dataclass(frozen=True, kw_only=True)
class Found:
    """What the given folders hold."""

    records: list[RunRecord] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    seen: set[Path] = field(default_factory=set)
    """The folders of the runs, resolved."""


def run(arguments: list[str]) -> int:
    """Writes the report, prints the ranking and where it is.

    Returns the exit status: 0, or 1 where some of the runs could not be read, and the others are reported.
    """
    folders, output = _parsed(arguments)
    found = _found(folders)
    where = _output_folder(output, folders)
    report = contents(found.records, found.failures, title=_title(folders), problems=found.problems)
    page, markdown = write_contents(report, where)
    print("\n".join([*terminal_lines(report), "", f"page      {page}", f"markdown  {markdown}"]))
    return EXIT_DAMAGED if found.problems else 0


def report_sweep(folder: Path) -> Path | None:
    """Writes the report of a sweep into its folder; returns the page, or None where no trial has begun."""
    found = Found()
    if not _add(found, folder):
        return None
    page, _ = write_report(found.records, found.failures, folder, _title([folder]), problems=found.problems)
    return page


def _parsed(arguments: Sequence[str]) -> tuple[list[Path], str | None]:
    outputs = [each.removeprefix("output=") for each in arguments if each.startswith("output=")]
    others = [each for each in arguments if not each.startswith("output=")]
    if len(outputs) > 1 or outputs == [""]:
        raise InputError(f"output={','.join(outputs)} is no folder: give one")
    if not others:
        raise InputError("no run is given: gptpl report RUN..., a run's folder or one with runs in it")
    folders = []
    for given in others:
        folder = Path(given).expanduser()
        if not folder.exists() and given.startswith("-"):
            raise InputError(f"{given} is no option of gptpl report: see gptpl report --help")
        if not folder.is_dir():
            what = "is a file" if folder.exists() else "does not exist"
            raise InputError(f"{given} {what}: give a run's folder, or one with runs in it")
        folders.append(folder)
    return folders, outputs[0] if outputs else None


def _found(folders: Sequence[Path]) -> Found:
    """All runs and failed trials, each once. Raises InputError for a folder that has neither."""
    found = Found()
    for folder in folders:
        if not _add(found, folder):
            raise InputError(f"{folder} holds no run: give a run's folder, or one with runs in it")
    return found


def _add(found: Found, folder: Path) -> bool:
    """Adds what a folder holds and is not there yet; whether it holds anything."""
    runs = find_runs(folder)
    try:
        failures = find_failures(folder)
    except RunError as error:
        failures = []
        found.problems.append(str(error))
    for path in runs:
        if path.resolve() in found.seen:
            continue
        found.seen.add(path.resolve())
        try:
            found.records.append(read_run(path))
        except RunError as error:
            found.problems.append(str(error))
    known = {failure.folder.resolve() for failure in found.failures}
    found.failures.extend(each for each in failures if each.folder.resolve() not in known)
    return bool(runs or failures)


def _output_folder(given: str | None, folders: Sequence[Path]) -> Path:
    if given is None:
        return folders[0] if len(folders) == 1 else Path()
    folder = Path(given).expanduser()
    if folder.exists() and not folder.is_dir():
        raise InputError(f"output={given} is a file: give a folder")
    return folder


def _title(folders: Sequence[Path]) -> str:
    if len(folders) > 1:
        return f"{len(folders)} folders of runs compared"
    path = folders[0].resolve()
    return f"{path.parent.name}/{path.name}"
