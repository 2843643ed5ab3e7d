"""What a container may still use: the memory limits of Linux control groups (version 2, cgroups(7))."""

from pathlib import Path


def free_bytes(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> int | None:
    """Bytes that this process may still ask for by the tightest limit of the groups it is in.

    Files that the kernel keeps in memory, and would drop, count as free. None: there is no limit, or no
    version 2 of control groups to ask.

    Args:
        root: where the groups are mounted; in a container its own group.
        own: names the process's group.
    """
    if not own.exists():
        return None
    names = [line.removeprefix("0::/") for line in own.read_text().splitlines() if line.startswith("0::/")]
    if not names:
        return None
    group = root / names[0]
    above = [folder for folder in group.parents if folder == root or root in folder.parents]
    limits = [_free_in(folder) for folder in (group, *above)]
    return min((free for free in limits if free is not None), default=None)


def _free_in(group: Path) -> int | None:
    maximum, current = group / "memory.max", group / "memory.current"
    if not maximum.exists() or not current.exists():  # the group above all has no limit
        return None
    limit = maximum.read_text().strip()
    if limit == "max":
        return None
    statistics = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    used = int(current.read_text()) - int(statistics.get("inactive_file", 0))
    return max(0, int(limit) - used)
