"""Files that are either the old one or the new one, complete, whenever the process is killed or the machine crashes."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import stat
from collections.abc import Iterator
from typing import IO


def save(path: str | os.PathLike[str], data: bytes) -> None:
    """Write ``data`` to ``path``, see :func:`replacing`."""
    with replacing(path) as file:
        file.write(data)


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
    """Open a file that replaces ``path`` such that a crash leaves either the old file or the new one, complete.

    What is written goes to a temporary file in the same folder, ``.adagrad-*.tmp``, which is synced to disk and renamed
    at the end. A failure removes it; only a killed process or machine leaves it behind. The new file keeps the mode of
    the old one. If ``path`` is a symbolic link, the file that it points to is replaced.
    """
    target = os.path.realpath(os.fsdecode(path))
    mode: int | None = None
    with contextlib.suppress(FileNotFoundError):
        mode = os.stat(target).st_mode
    if mode is not None and not stat.S_ISREG(mode):
        raise ValueError(f"path={os.fsdecode(path)!r}: must be a regular file")
    folder = os.path.dirname(target)
    temporary = os.path.join(folder, f".adagrad-{secrets.token_hex(8)}.tmp")
    if not os.path.isdir(folder):
        raise FileNotFoundError(errno.ENOENT, "No such folder", folder)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
    bits = 0o666 if mode is None else stat.S_IMODE(mode) & 0o777  # not set-user-id: the owner may be another
    descriptor = os.open(temporary, flags, bits)
    try:
        with open(descriptor, "wb") as file:
            if mode is not None and hasattr(os, "fchmod"):
                os.fchmod(descriptor, bits)  # restores mode bits that the umask removed
            yield file
            file.flush()
            os.fsync(descriptor)
        os.replace(temporary, target)
    except BaseException:
        with contextlib.suppress(OSError):
            os.chmod(temporary, 0o600)  # Windows removes no file that is read-only
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    with contextlib.suppress(OSError):  # makes the rename durable; Windows cannot open folders
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
