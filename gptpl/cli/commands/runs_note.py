"""Write a note on a run, or read it.

usage: gptpl runs note RUN [TEXT]

examples:
  gptpl runs note latest 'warm-up too short'  # replaces an earlier note
  gptpl runs note quick/latest                # print it; gptpl runs show prints it, too
  gptpl runs note latest ''                   # remove it

gptpl train notes=TEXT writes one from the start.
"""

from gptpl.errors import InputError
from gptpl.files.run_record import read_run, write_run_json
from gptpl.runs.listing import find_run
from gptpl.text import near, one_line


def run(arguments: list[str]) -> int:
    """Writes the note, if one is given, and prints it; returns the exit status."""
    if len(arguments) not in (1, 2):
        raise InputError("gptpl runs note takes a run and a text, as in gptpl runs note latest 'too slow'")
    folder = find_run(arguments[0])
    record = read_run(folder)
    if len(arguments) == 2:
        write_run_json(folder, notes=arguments[1])
        record = read_run(folder)
    print(one_line(f"{near(folder)}: {record.notes or 'no note'}"))
    return 0
