"""Which GPT-2 weights are in the cache.

usage: gptpl weights list

examples:
  gptpl weights list                          # sizes, sources, bytes, folders
  gptpl weights list | grep complete          # what can be used without a network
  GPTPL_CACHE=/data/cache gptpl weights list  # in another cache folder

For each size and source: whether all its files are there, how many bytes, and the folder. It has no settings.
"""

from gptpl.errors import InputError
from gptpl.weights.published import SERVERS, SIZES, cached_bytes, weights_folder


def run(arguments: list[str]) -> int:
    """Prints a line for each size and source; returns the exit status."""
    if arguments:
        raise InputError(f"{arguments[0]}: gptpl weights list has no settings, leave it out")
    print(f"{'size':<6} {'source':<7} {'in the cache':<12} {'bytes':>15}  folder")
    for source in SERVERS:
        for size in SIZES.values():
            found, complete = cached_bytes(size, source)
            state = "complete" if complete else "in part" if found else "-"
            folder = weights_folder(size, source) if found else ""
            print(f"{size.name:<6} {source:<7} {state:<12} {found:>15,}  {folder}".rstrip())
    return 0
