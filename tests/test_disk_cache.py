"""The cache of compiled kernels: which folder is used, and what its files are worth."""

from __future__ import annotations

import os
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

import adagrad
from adagrad.kernels.runtime import cache_folder, numba_jit
from processes import finish, posix, run, start


@pytest.fixture
def no_variables(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """The environment without what the cache folder depends on; what is known of it is forgotten before and after."""
    for name in ("ADAGRAD_CACHE_DIR", "NUMBA_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    cache_folder.find.cache_clear()
    yield monkeypatch
    cache_folder.find.cache_clear()


def small_kernel() -> Any:
    """A kernel of its own each time, of the same name and code."""

    @numba_jit.jit()
    def add(a: Any, b: Any) -> Any:
        return a + b

    return add


def loaded_from_cache(kernel: Any) -> bool:
    assert kernel(1, 2) == 3
    assert kernel(0.5, 1.0) == 1.5
    hits, misses = sum(kernel.stats.cache_hits.values()), sum(kernel.stats.cache_misses.values())
    assert hits + misses in (0, 2)
    return hits == 2


# ----------------------------------------------------------------------------------------------------------- the folder


def found_folder(*, warns: bool) -> Path | None:
    """The folder, as it is looked up anew; whether that warns."""
    cache_folder.find.cache_clear()
    with pytest.warns(UserWarning, match="ADAGRAD_CACHE_DIR: .* no other user") if warns else nullcontext():
        return cache_folder.find()


def as_file(path: Path) -> Path:
    path.write_text("not a folder")
    return path


def read_only(path: Path) -> Path:
    path.mkdir(mode=0o500)
    return path


@posix
@pytest.mark.parametrize("variable", ["ADAGRAD_CACHE_DIR", "NUMBA_CACHE_DIR", "XDG_CACHE_HOME", "HOME"])
@pytest.mark.parametrize(
    ("make", "usable"),
    [
        (lambda path: path / "new" / "folders", True),
        (lambda path: as_file(path / "file"), False),
        (lambda path: as_file(path / "file") / "below", False),
        (lambda path: Path("/proc/self/nowhere"), False),
        (lambda path: Path("/dev/null"), False),
        (lambda path: read_only(path / "read-only"), os.getuid() == 0 if hasattr(os, "getuid") else None),
    ],
    ids=["missing", "a file", "below a file", "not to be made", "a device", "read-only"],
)
def test_any_folder_works(
    variable: str, make: Callable[[Path], Path], usable: bool, tmp_path: Path, no_variables: pytest.MonkeyPatch
) -> None:
    """Where there is no folder to be had, kernels are compiled, and forgotten with the process."""
    folder = make(tmp_path)
    no_variables.setenv(variable, str(folder))
    found = found_folder(warns=variable == "ADAGRAD_CACHE_DIR" and not usable)
    assert (found is not None) == usable
    first, second = loaded_from_cache(small_kernel()), loaded_from_cache(small_kernel())
    assert (first, second) == (False, usable)
    if found is not None:
        assert folder in found.parents
        assert found.stat().st_mode & 0o777 == 0o700


def test_the_order_of_the_variables(tmp_path: Path, no_variables: pytest.MonkeyPatch) -> None:
    for variable in ("HOME", "XDG_CACHE_HOME", "NUMBA_CACHE_DIR", "ADAGRAD_CACHE_DIR"):
        no_variables.setenv(variable, str(tmp_path / variable))
        cache_folder.find.cache_clear()
        folder = cache_folder.find()
        if sys.platform == "linux" or variable.endswith("_DIR"):
            assert folder is not None
            assert tmp_path / variable in folder.parents


def test_every_file_with_compiled_code_counts() -> None:
    """Code of an older version would be loaded where the new one differs in a helper alone."""
    sources = Path(adagrad.__file__).parent.rglob("*.py")
    compiled = {source for source in sources if "numba_jit import" in source.read_text()}
    assert {"dense.py", "layout.py", "row_lists.py", "threads.py"} <= {source.name for source in compiled}
    assert compiled <= set(cache_folder.sources())


@posix
@pytest.mark.parametrize("mode", [0o777, 0o770, 0o720, 0o702])
def test_a_folder_that_others_can_write_to_is_not_used(
    mode: int, tmp_path: Path, no_variables: pytest.MonkeyPatch
) -> None:
    """It holds pickles and machine code."""
    no_variables.setenv("ADAGRAD_CACHE_DIR", str(tmp_path))
    folder = cache_folder.find()
    assert folder is not None
    loaded_from_cache(small_kernel())
    before = sorted(folder.iterdir())
    assert before
    folder.chmod(mode)
    assert found_folder(warns=True) is None
    assert not loaded_from_cache(small_kernel())
    assert sorted(folder.iterdir()) == before
    folder.chmod(0o700)
    cache_folder.find.cache_clear()
    assert loaded_from_cache(small_kernel())


@posix
def test_a_folder_that_others_can_replace_is_not_used(tmp_path: Path, no_variables: pytest.MonkeyPatch) -> None:
    """Whoever can write to a folder above can put another in its place, unless that is sticky, as /tmp is."""
    no_variables.setenv("ADAGRAD_CACHE_DIR", str(tmp_path / "above" / "cache"))
    folder = cache_folder.find()
    assert folder is not None
    for mode, safe in [(0o777, False), (0o1777, True), (0o755, True), (0o707, False)]:
        (tmp_path / "above").chmod(mode)
        assert found_folder(warns=not safe) == (folder if safe else None)


as_root = pytest.mark.skipif(not hasattr(os, "getuid") or os.getuid() != 0, reason="only root can give a folder away")


@posix
@as_root
@pytest.mark.parametrize(("owner", "group", "mode", "safe"), [
    (0, 0, 0o775, True), (0, 12345, 0o775, False), (0, 12345, 0o755, True), (12345, 0, 0o1777, False),
    (12345, 0, 0o755, False), (0, 12345, 0o1775, True),
])  # fmt: skip
def test_a_folder_that_is_in_one_of_another_user_or_group(
    owner: int, group: int, mode: int, safe: bool, tmp_path: Path, no_variables: pytest.MonkeyPatch
) -> None:
    """Whose owner, sticky or not, and whose group, if it may write and is not one's own, can replace it."""
    no_variables.setenv("ADAGRAD_CACHE_DIR", str(tmp_path / "above" / "cache"))
    folder = cache_folder.find()
    assert folder is not None
    os.chown(tmp_path / "above", owner, group)
    (tmp_path / "above").chmod(mode)
    assert found_folder(warns=not safe) == (folder if safe else None)


@posix
@as_root
def test_a_folder_of_another_user_is_not_used(tmp_path: Path, no_variables: pytest.MonkeyPatch) -> None:
    no_variables.setenv("ADAGRAD_CACHE_DIR", str(tmp_path))
    folder = cache_folder.find()
    assert folder is not None
    os.chown(folder, 12345, 12345)
    no_variables.setattr(os, "getuid", lambda: 54321)
    assert found_folder(warns=True) is None


@posix
@pytest.mark.parametrize(("group", "name", "members", "is_private"), [
    (1002, "ann", [], True), (1002, "ann", ["ann"], True), (1002, "ann", ["bob"], False), (1002, "staff", [], False),
    (1002, None, [], False), (1001, "staff", ["bob"], True), (0, "root", [], True),
])  # fmt: skip
def test_what_a_private_group_is(
    group: int, name: str | None, members: list[str], is_private: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    grp, pwd = pytest.importorskip("grp"), pytest.importorskip("pwd")

    def found(number: int) -> Any:
        if name is None:
            raise KeyError(number)
        return grp.struct_group((name, "x", number, members))

    monkeypatch.setattr(os, "getuid", lambda: 1001)
    monkeypatch.setattr(grp, "getgrgid", found)
    monkeypatch.setattr(pwd, "getpwuid", lambda _: pwd.struct_passwd(("ann", "x", 1001, 1002, "", "/", "")))
    assert cache_folder._has_no_others(group) == is_private


@posix
def test_our_own_folders_are_private_whatever_the_umask(tmp_path: Path, no_variables: pytest.MonkeyPatch) -> None:
    no_variables.setenv("XDG_CACHE_HOME", str(tmp_path))
    no_variables.setattr(sys, "platform", "linux")
    before = os.umask(0o002)
    try:
        folder = cache_folder.find()
    finally:
        os.umask(before)
    assert folder is not None
    assert [each.stat().st_mode & 0o777 for each in (folder, folder.parent)] == [0o700, 0o700]
    assert folder.parent == tmp_path.resolve() / "adagrad"


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="access is not by user here")
def test_a_link_on_the_way_to_the_cache_is_followed_once(tmp_path: Path) -> None:
    """Another user who may turn the link elsewhere turns nothing."""
    private, open_to_all = tmp_path / "private", tmp_path / "open"
    private.mkdir(mode=0o700)
    open_to_all.mkdir()
    open_to_all.chmod(0o777)
    (open_to_all / "cache").symlink_to(private)
    code = "from adagrad.kernels.runtime import cache_folder; print(cache_folder.find())"
    assert run(code, ADAGRAD_CACHE_DIR=str(open_to_all / "cache")).startswith(str(private.resolve()))


# ------------------------------------------------------------------------------------------------------------ its files

DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda data: b"",
    "half": lambda data: data[: len(data) // 2],
    "one byte short": lambda data: data[:-1],
    "zeros": lambda data: bytes(len(data)),
    "zeros at the end": lambda data: data[: len(data) // 2] + bytes(len(data) - len(data) // 2),
    "text": lambda data: b"something else altogether",
    "another pickle": lambda data: b"\x80\x04N.\x80\x04N.",
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_damaged_files_cost_a_compilation(
    damage: Callable[[bytes], bytes], tmp_path: Path, no_variables: pytest.MonkeyPatch
) -> None:
    """And no more: the next process finds them repaired."""
    no_variables.setenv("ADAGRAD_CACHE_DIR", str(tmp_path))
    assert not loaded_from_cache(small_kernel())
    assert loaded_from_cache(small_kernel())
    folder = cache_folder.find()
    assert folder is not None
    damaged = list(folder.iterdir())
    assert len(damaged) == 2, "one for each signature"
    for path in damaged:
        path.write_bytes(damage(path.read_bytes()))
    assert not loaded_from_cache(small_kernel())
    assert loaded_from_cache(small_kernel())


def test_files_that_vanish(tmp_path: Path, no_variables: pytest.MonkeyPatch) -> None:
    no_variables.setenv("ADAGRAD_CACHE_DIR", str(tmp_path))
    loaded_from_cache(small_kernel())
    folder = cache_folder.find()
    assert folder is not None
    shutil.rmtree(folder)
    assert not loaded_from_cache(small_kernel())


STEP = """
    import numpy as np
    from adagrad import GroupAdaGrad  # whose dense kernel compiles fastest
    optimizer, weight = GroupAdaGrad(0.5, wd=0.1), np.linspace(-1, 1, 12, dtype=np.float32).reshape(4, 3)
    state = optimizer.create_state(0, weight)
    optimizer.update(0, weight, weight * 3, state)
    print(weight.tobytes().hex(), state.tobytes().hex())
"""


def written(folder: Path) -> dict[Path, int]:
    """The files of compiled code, and when they were written."""
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*.nbc")}


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A cache folder that one process has filled with what :data:`STEP` needs, and what that printed."""
    folder = tmp_path_factory.mktemp("compiled")
    return folder, run(STEP, ADAGRAD_CACHE_DIR=str(folder))


@pytest.fixture
def filled(compiled: tuple[Path, str], tmp_path: Path) -> tuple[dict[str, str], str]:
    """The variables for a copy of that folder, ``tmp_path``, and what was printed."""
    shutil.copytree(compiled[0], tmp_path, dirs_exist_ok=True)
    return {"ADAGRAD_CACHE_DIR": str(tmp_path)}, compiled[1]


def test_a_flipped_bit_in_a_cache_file_costs_a_compilation(tmp_path: Path, filled: tuple[dict[str, str], str]) -> None:
    variables, expected = filled
    files = sorted(tmp_path.rglob("*.nbc"))
    for path in files:
        data = bytearray(path.read_bytes())
        data[len(data) * 9 // 10] ^= 4  # in the machine code
        path.write_bytes(data)
    assert run(STEP, **variables) == expected


def test_code_that_calls_what_was_loaded(tmp_path: Path, filled: tuple[dict[str, str], str]) -> None:
    """One process compiles a kernel whose parallel driver it loads; the next loads both."""
    variables, expected = filled
    compiled_again = list(tmp_path.rglob("dense_lists._update*"))
    assert compiled_again
    for path in compiled_again:
        path.unlink()
    assert run(STEP, **variables) == expected
    assert run(STEP, **variables) == expected


def test_formats_that_were_compiled_by_different_processes(tmp_path: Path) -> None:
    """Their machine code has the same symbols, and one process loads them all."""
    code = STEP.replace("GroupAdaGrad", "AdaGrad").replace("np.float32", "dtype")
    formats = ["np.float32", "np.float16"]
    alone = [code.replace("dtype=dtype", f"dtype={dtype}") for dtype in formats]
    folders = [tmp_path / dtype for dtype in formats]
    processes = [start(one, ADAGRAD_CACHE_DIR=str(folder)) for one, folder in zip(alone, folders, strict=True)]
    expected = list(map(finish, processes))
    for folder in folders:
        shutil.copytree(folder, tmp_path / "all", dirs_exist_ok=True)
    for order in (formats, formats[::-1]):
        loop = f"import numpy as np\nfor dtype in {', '.join(order)}:\n{textwrap.indent(textwrap.dedent(code), '    ')}"
        got = run(loop, ADAGRAD_CACHE_DIR=str(tmp_path / "all")).splitlines()
        assert got == (expected if order is formats else expected[::-1])


NAMES = """
    from numba.core.registry import cpu_target
    from adagrad.kernels.cpu import dense as cpu_dense, rows as cpu_rows, row_groups, row_sums
    from adagrad.kernels.runtime import disk_cache

    names = []

    def worker(function):
        cache, codegen = disk_cache.Cache(function), cpu_target.target_context.codegen()
        names.append(cache._cache_file._file(cache._index_key("(word, word, word)", codegen)))
        return 0

    for module in (cpu_dense, cpu_rows, row_groups, row_sums):
        module.worker = worker
    for weight in ("float32", "float64", "float16", "bfloat16"):
        wide = "float64" if weight == "float64" else "float32"
        for form in {(weight, grad, wide, master) for grad in (weight, wide) for master in (None, wide)}:
            for flag in (False, True):
                cpu_dense.kernel(*form, flag)
                cpu_dense.row_part_kernel(*form, flag)
                for row_wise in (False, True):
                    cpu_rows.kernel(flag, *form, row_wise)
    for flag in (False, True):
        row_groups.checking(flag)
        row_sums.grouping(flag, "float32")
        row_sums.grouping(flag, "float64")
    print(*sorted(names))
"""


def test_every_process_finds_the_files_of_the_last(tmp_path: Path) -> None:
    """A kernel that closes over something of its process alone would be compiled, and saved, by each."""
    first, second = (run(NAMES, ADAGRAD_CACHE_DIR=str(tmp_path), PYTHONHASHSEED=seed).split() for seed in "12")
    assert first == second
    assert len(set(first)) == len(first) > 100


def test_a_second_process_compiles_nothing(tmp_path: Path, filled: tuple[dict[str, str], str]) -> None:
    """Nor a dense kernel that another program has compiled, nor a row-sparse one."""
    code = (
        STEP
        + """
    from adagrad import RowSparse
    optimizer.update(0, weight, RowSparse(weight[:3] * 2, np.array([2, 0, 2]), weight.shape), state)
    print(weight.tobytes().hex(), state.tobytes().hex())
    """
    )
    variables, _ = filled
    dense = written(tmp_path)
    expected = run(code, **variables)
    files = written(tmp_path)
    assert dense.items() < files.items()
    assert run(code, **variables) == expected
    assert written(tmp_path) == files


def test_four_processes_at_once_with_a_cold_cache(tmp_path: Path) -> None:
    """All compile, or wait, or load what another has written; all get the same bits. A fifth finds a warm cache."""
    processes = [start(STEP, ADAGRAD_CACHE_DIR=str(tmp_path)) for _ in range(4)]
    results = {finish(process) for process in processes}
    assert results == {run(STEP)}
    files = written(tmp_path)
    assert files
    assert run(STEP, ADAGRAD_CACHE_DIR=str(tmp_path)) in results
    assert written(tmp_path) == files, "nothing was compiled again"


def test_sources_that_cannot_be_read_are_the_reason(tmp_path: Path) -> None:
    """As in a zip file: nothing tells what is cached from another version's."""
    shutil.make_archive(str(tmp_path / "library"), "zip", Path(adagrad.__file__).parents[1], "adagrad")
    code = """
    import warnings
    from adagrad.kernels.runtime import cache_folder
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        print(cache_folder.find(), *(each.message for each in caught))
    """
    paths = {"PYTHONPATH": str(tmp_path / "library.zip"), "ADAGRAD_CACHE_DIR": str(tmp_path)}
    assert "None ADAGRAD_CACHE_DIR" in run(code, **paths)
    assert "is not used, because the source files of the kernels cannot be read" in run(code, **paths)
    assert run(code, **(paths | {"ADAGRAD_CACHE_DIR": None})) == "None"


@posix
def test_no_cache_at_all(tmp_path: Path) -> None:
    nowhere = str(as_file(tmp_path / "file"))
    variables = dict.fromkeys(("ADAGRAD_CACHE_DIR", "NUMBA_CACHE_DIR", "XDG_CACHE_HOME", "HOME"), nowhere)
    assert run(STEP, options=("-W", "ignore"), **variables) == run(STEP)


def test_a_folder_that_cannot_be_used_is_told_to_the_caller(tmp_path: Path) -> None:
    """By the first step, whose line the warning names; as an error, it changes nothing."""
    code = """
    import warnings
    import numpy as np
    import adagrad

    weight, optimizer = np.ones(4, np.float32), adagrad.AdaGrad()
    given = 0, weight, np.ones(4, np.float32), optimizer.create_state(0, weight)
    for _ in range(2):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            try:
                optimizer.update(*given)
            except UserWarning as error:
                print(str(error).split(":")[0], weight.tolist(), given[3].tolist(), optimizer.num_update)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        optimizer.update(*given)
        optimizer.update(*given)
    print([(each.filename, each.lineno) for each in seen], optimizer.num_update)
    """
    said = run(code, ADAGRAD_CACHE_DIR=str(as_file(tmp_path / "file"))).splitlines()
    assert said == ["ADAGRAD_CACHE_DIR [1.0, 1.0, 1.0, 1.0] [0.0, 0.0, 0.0, 0.0] 0"] * 2 + ["[('<string>', 17)] 2"]


def test_a_processor_without_instructions_for_float16() -> None:
    """There float16 is read and written by integer arithmetic, to the same bits."""
    code = STEP.replace("np.float32", "np.float16")
    assert run(code, NUMBA_CPU_NAME="generic") == run(code)
