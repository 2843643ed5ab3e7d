"""The exception for mistakes in the input, and remedies for the system's own errors."""

import errno
import os

from gptpl.text import one_line


class InputError(ValueError):
    """A mistake in the user's input.

    The message is one line that names the value and the remedy; the commands print it alone, without a
    traceback, and exit with status 2.
    """


class ProcessError(RuntimeError):
    """Another process that trains the same run has failed, or cannot be reached; the message is one line."""


SIGNAL_STATUS = 128
"""A shell's exit status for a process that a signal ended, without the signal's number."""

_REMEDIES = {
    "make room there": ("ENOSPC", "EDQUOT"),
    "use a file system that takes larger files": ("EFBIG",),
    "check the permissions": ("EACCES", "EPERM"),
    "it is read-only: give a folder elsewhere": ("EROFS",),
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
"""Remedies by the names of the system's error numbers; not every system has all of them."""


def os_error_text(error: OSError) -> str:
    """The system's message, the file concerned, and the remedy, in one line."""
    where = f" ({os.fsdecode(error.filename)})" if isinstance(error.filename, str | bytes) else ""
    name = errno.errorcode.get(error.errno or 0, "")
    remedies = (remedy for remedy, names in _REMEDIES.items() if name in names)
    remedy = next(remedies, "check that file or device")
    return one_line(f"{error.strerror or error}{where}: {remedy}, then run the command again")
