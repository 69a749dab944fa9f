"""How compiled kernels are kept for the next process: Numba's cache, in files of our own; where: cache_folder.py."""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numba
from numba.core.caching import CompileResultCacheImpl, FunctionCache, IndexDataCacheFile, _CacheLocator

from adagrad.kernels.runtime import cache_folder


class _Locator(_CacheLocator):  # type: ignore[misc]
    """Where a kernel's machine code is kept: one folder for each state of all source files of the CPU kernels.

    Numba's own cache checks only the file of the decorated function, so it would miss an edit in a helper's file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def get_cache_path(self) -> str:
        return str(self._path)

    def get_source_stamp(self) -> str:
        return ""  # it is in the folder's name

    def get_disambiguator(self) -> str:
        return ""

    @classmethod
    def from_function(cls, py_func: Callable[..., Any], py_file: str) -> _Locator | None:
        path = cache_folder.find()
        return None if path is None else cls(path)


class _CacheImpl(CompileResultCacheImpl):  # type: ignore[misc]
    _locator_classes = (_Locator,)

    def rebuild(self, target_context: Any, payload: Any) -> Any:
        # Cached code may call the threading layer without Numba knowing, and would crash if run before it is loaded;
        # get_num_threads() loads it.
        numba.get_num_threads()
        return super().rebuild(target_context, payload)


class _Files(IndexDataCacheFile):  # type: ignore[misc]
    """One file for each signature of a function and version of Numba, named after all three.

    Numba numbers the files and keeps an index, which two processes that save two signatures at once can corrupt: if
    both take the same number, the index leads one signature to the code of the other.
    """

    def __init__(self, folder: str, function: str) -> None:
        super().__init__(folder, function, "")
        self._function = function

    def _file(self, key: object) -> str:
        digest = hashlib.sha256(repr((numba.__version__, key)).encode()).hexdigest()
        return f"{self._function}.{digest[:16]}.nbc"

    def save(self, key: object, data: object) -> None:
        code = self._dump(data)
        self._save_data(self._file(key), (hashlib.sha256(code).digest(), code))

    def load(self, key: object) -> Any:
        """What was saved; ValueError for a damaged file, because machine code is run unchecked."""
        digest, code = self._load_data(self._file(key))
        if hashlib.sha256(code).digest() != digest:
            raise ValueError(f"{self._file(key)}: damaged")
        return pickle.loads(code)

    def flush(self) -> None:
        """There is no index to empty."""


class Cache(FunctionCache):  # type: ignore[misc]
    """Numba's disk cache; whatever goes wrong with it (a full disk, a damaged file) costs only a compilation."""

    _impl_class = _CacheImpl

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__(function)
        self._cache_file = _Files(self._cache_path, self._impl.filename_base)

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        try:
            return super().load_overload(sig, target_context)
        except Exception:  # usually a missing file
            return None

    def save_overload(self, sig: Any, data: Any) -> None:
        with suppress(Exception):
            super().save_overload(sig, data)
