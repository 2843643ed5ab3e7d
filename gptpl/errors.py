"""The one exception that means "the user can mend this", and what to say of the system's own errors."""

import errno
import os

from gptpl import text


class InputError(ValueError):
    """A mistake in what the user gave.

    The message is one line that names the value and the remedy; the commands print it alone, without a
    traceback, and exit with status 2.
    """


_MOST_CHARACTERS = 2_000


def one_line(message: str) -> str:
    """A message as a terminal may be given it: one line, no control characters, and not without end.

    Messages quote names out of files that anybody may have made.
    """
    shown = text.one_line(message)
    return shown if len(shown) <= _MOST_CHARACTERS else f"{shown[:_MOST_CHARACTERS]} ..."


_REMEDIES = {
    "make room there": ("ENOSPC", "EDQUOT"),
    "give a folder that takes larger files": ("EFBIG",),
    "check the permissions": ("EACCES", "EPERM"),
    "it can only be read: give a folder elsewhere": ("EROFS",),
    "check the path": ("ENOENT", "ENOTDIR", "ELOOP", "ENAMETOOLONG", "EINVAL"),
    "give a file, not a folder": ("EISDIR",),
    "remove it, or give another name": ("EEXIST", "ENOTEMPTY"),
    "raise the limit of open files (ulimit -n 4096)": ("EMFILE", "ENFILE"),
    "end other programs, or use a smaller model or batch": ("ENOMEM", "EAGAIN"),
    "end the program that uses it": ("EBUSY", "ETXTBSY"),
    "the device reports errors: check it, and keep a copy elsewhere": ("EIO", "ENXIO", "ENODEV"),
    "check the network": (
        *("ESTALE", "ETIMEDOUT", "EHOSTUNREACH", "ENETUNREACH", "ENETDOWN"),
        *("ECONNREFUSED", "ECONNRESET", "ECONNABORTED", "EHOSTDOWN", "ENOTCONN"),
    ),
    "another program has the port: give another one": ("EADDRINUSE",),
}
"""What helps, by the names of the system's error numbers, not all of which every system has."""
_BY_NUMBER = {
    getattr(errno, name): remedy
    for remedy, names in _REMEDIES.items()
    for name in names
    if hasattr(errno, name)
}


def os_error_text(error: OSError) -> str:
    """What the system says, the file that it says it of, and what helps, in one line."""
    where = f" ({os.fsdecode(error.filename)})" if isinstance(error.filename, str | bytes) else ""
    remedy = _BY_NUMBER.get(error.errno or 0, "check that file or device")
    return one_line(f"{error.strerror or error}{where}: {remedy}, then run the command again")
