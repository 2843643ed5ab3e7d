"""List the GPT-2 weights in the cache.

usage: gptpl weights list

examples:
  gptpl weights list                          # sizes, sources, bytes, folders
  gptpl weights list | grep complete          # what can be used without a network
  GPTPL_CACHE=/data/cache gptpl weights list  # in another cache folder

For each size and source: whether all files are there, how many bytes, and the folder.
"""

from gptpl.errors import InputError
from gptpl.text import table
from gptpl.weights.published import SERVERS, SIZES, cached_bytes, weights_folder


def run(arguments: list[str]) -> int:
    """Prints a line for each size and source; returns the exit status."""
    if arguments:
        raise InputError(f"gptpl weights list has no settings: leave {arguments[0]} out")
    rows = [["size", "source", "in the cache", "bytes", "folder"]]
    for source in SERVERS:
        for size in SIZES.values():
            found, complete = cached_bytes(size, source)
            state = "complete" if complete else "in part" if found else "-"
            folder = str(weights_folder(size, source)) if found else ""
            rows.append([size.name, source, state, f"{found:,}", folder])
    print("\n".join(table(rows, right=[3])))
    return 0
