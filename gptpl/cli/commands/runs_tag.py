"""Add tags to a run, or remove them.

usage: gptpl runs tag RUN [+TAG]... [-TAG]...

examples:
  gptpl runs tag latest +good                # then: gptpl runs list tag=good
  gptpl runs tag quick/latest +paper -draft  # add one, remove one
  gptpl runs tag latest                      # print them

gptpl train tags=[a,b] adds them from the start. Prints the run's tags.
"""

from gptpl.errors import InputError
from gptpl.files.run_record import change_tags
from gptpl.runs.listing import find_run
from gptpl.text import near, one_line


def run(arguments: list[str]) -> int:
    """Adds and removes tags, and prints the run's; returns the exit status."""
    add = [argument[1:] for argument in arguments if argument.startswith("+")]
    remove = [argument[1:] for argument in arguments if argument.startswith("-")]
    names = [argument for argument in arguments if argument[:1] not in ("+", "-")]
    if len(names) != 1:
        raise InputError(f"gptpl runs tag takes one run, got {len(names)}: give RUN +TAG, or RUN -TAG")
    folder = find_run(names[0])
    tags = change_tags(folder, add=add, remove=remove)
    print(one_line(f"{near(folder)}: {', '.join(tags) or 'no tags'}"))
    return 0
