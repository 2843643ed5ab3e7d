"""Short examples side by side in rows of one length, so that little of a batch is padding."""

from collections.abc import Sequence

import numpy as np

from gptpl.data.instructions.rows import Row


def pack_rows(rows: Sequence[Row], *, max_length: int) -> list[Row]:
    """The examples in as few rows of at most `max_length` tokens as best fit finds; see `packed_places`.

    A text keeps its targets; its segment is its number in the new row, from 1.
    """
    packed = []
    for places in packed_places([len(row) for row in rows], capacity=max_length):
        parts = [rows[place] for place in places]
        numbers = [np.full(len(part), number, dtype=np.int64) for number, part in enumerate(parts, 1)]
        packed.append(
            Row(
                np.concatenate([part.inputs for part in parts]),
                np.concatenate([part.targets for part in parts]),
                np.concatenate(numbers),
            )
        )
    return packed


def packed_places(lengths: Sequence[int], *, capacity: int) -> list[list[int]]:
    """Which lengths go together: every one, by its place, in one group, and no group above the capacity.

    Best fit decreasing: from the longest to the shortest, each goes where it leaves the least room (Johnson
    1973: at most 11/9 of the fewest groups possible, and one more). Groups are in the order of their first
    places, and places ascend within a group: nothing depends on chance. No length may exceed the capacity.
    """
    groups: list[list[int]] = []
    with_room: list[list[int]] = [[] for _ in range(capacity + 1)]  # groups, by the room that they have left
    for place in sorted(range(len(lengths)), key=lambda place: (-lengths[place], place)):
        length = lengths[place]
        room = next((room for room in range(length, capacity + 1) if with_room[room]), None)
        if room is None:
            groups.append([])
            group, room = len(groups) - 1, capacity
        else:
            group = with_room[room].pop()
        groups[group].append(place)
        with_room[room - length].append(group)
    return sorted(sorted(group) for group in groups)
