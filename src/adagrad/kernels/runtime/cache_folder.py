"""Where compiled kernels are kept for the next process, see disk_cache.py.

Found out without Numba: the first caller of a kernel, whom a warning may concern, is not the one who imports that.
"""

from __future__ import annotations

import functools
import hashlib
import os
import stat
import sys
import warnings
from contextlib import suppress
from pathlib import Path

from adagrad import checks

_PACKAGE = Path(checks.__file__).parent


@functools.cache
def _source_hash() -> str:
    digest = hashlib.sha256(sys.version.encode())
    for source in sources():
        digest.update(source.relative_to(_PACKAGE).as_posix().encode() + source.read_bytes())
    return digest.hexdigest()[:16]


def sources() -> list[Path]:
    """The files that compiled code may come from, without those of CUDA kernels: Triton has a cache of its own."""
    kernels = sorted((_PACKAGE / "kernels").rglob("*.py"))
    return [*(source for source in kernels if source.parent.name != "cuda"), _PACKAGE / "rule.py"]


@functools.cache
def find() -> Path | None:
    """The folder of the compiled kernels, or None if there is none that can be used.

    ``ADAGRAD_CACHE_DIR``, else Numba's ``NUMBA_CACHE_DIR``, else the user's cache folder. It holds pickles and machine
    code, so one that another user could write to is not used. A UserWarning tells whoever named one for this library.
    """
    ours, rule = os.environ.get("ADAGRAD_CACHE_DIR"), "must be a folder that no other user can write to"
    try:
        found = _usable(ours or os.environ.get("NUMBA_CACHE_DIR"), _source_hash())
    except OSError:  # in a zip file, or frozen: what is cached could not be told from another version's
        found, rule = None, "is not used, because the source files of the kernels cannot be read"
    if ours and found is None:
        message = f"ADAGRAD_CACHE_DIR: {ours!r}: {rule}; each process compiles its kernels"
        warnings.warn(message, UserWarning, stacklevel=checks.caller())
    return found


def _usable(chosen: str | None, version: str) -> Path | None:
    """The folder in ``chosen``, or in the user's cache folder, made if need be; None if it cannot be used."""
    try:
        root = Path(chosen) if chosen else _user_cache() / "adagrad"
        path = root.absolute() / f"kernels-{version}"
        with suppress(OSError):
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)  # a mode says nothing about parents
            path.mkdir(mode=0o700, exist_ok=True)
        path = path.resolve()  # what is checked must be what is used: a link could be redirected in between
        return path if path.is_dir() and _private(path) else None
    except (OSError, RuntimeError):
        return None


def _user_cache() -> Path:
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")


def _has_no_others(group: int) -> bool:
    """Whether a group is root's or this user's private one, which by convention has the user's name or number.

    A group such as "users" or "staff" has all users.
    """
    import grp
    import pwd

    if group in (0, os.getuid()):
        return True
    try:
        named = grp.getgrgid(group)
        return named.gr_name == pwd.getpwuid(os.getuid()).pw_name and set(named.gr_mem) <= {named.gr_name}
    except KeyError:  # a container may know neither
        return False


def _private(path: Path) -> bool:
    """Whether only this user, its private group or root can replace files in ``path``, or a folder above it."""
    if not hasattr(os, "getuid"):
        return True

    def can_change(status: os.stat_result) -> bool:
        by_group = status.st_mode & stat.S_IWGRP and not _has_no_others(status.st_gid)
        return bool(by_group or status.st_mode & stat.S_IWOTH)

    here, above = path.stat(), [folder.stat() for folder in path.parents]
    if here.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return False
    if any(status.st_uid not in (os.getuid(), 0) for status in (here, *above)):
        return False
    # In a sticky folder, such as /tmp, only its owner can replace a folder.
    return all(status.st_mode & stat.S_ISVTX or not can_change(status) for status in above)
