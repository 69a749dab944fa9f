"""More than one process: DDP, FSDP2, tensor parallelism, checkpoints and ZeRO, and the example of row-sharded tables.

Processes are started by hand and have a time limit, so that one that fails or hangs takes nothing with it. One start
serves many checks: see distributed_workers.py, where they are.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch.distributed as dist

import distributed_workers
from adagrad.torch import Adagrad
from distributed_workers import CHECKS, Model, load_and_go_on
from processes import SOURCES
from torch_versions import has_fsdp2_on_cpu

pytestmark = [
    pytest.mark.skipif(not dist.is_gloo_available(), reason="PyTorch was built without gloo"),
    has_fsdp2_on_cpu,
]

WORKERS = str(Path(distributed_workers.__file__))
EXAMPLE = Path(__file__).parents[1] / "examples" / "distributed_embeddings.py"
LIMIT = 240
"""Seconds that a set of processes has: a few times what they need where kernels compile on a busy machine."""


def environment() -> dict[str, str]:
    # One thread each: the processes share the processors of one machine.
    return {**os.environ, "PYTHONPATH": SOURCES, "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}


class Run:
    """Processes that go through a set of checks."""

    def __init__(
        self, name: str, world: int, folder: Path, limit: float = LIMIT, program: tuple[str, ...] = (WORKERS,)
    ) -> None:
        self.world = world
        logs = [folder / f"{name}-{rank}-of-{world}.log" for rank in range(world)]
        began = time.monotonic()
        processes = []
        for rank, log in enumerate(logs):
            with log.open("w") as out:
                command = [sys.executable, *program, str(rank), str(world), str(folder), name]
                processes.append(subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=environment()))
        try:
            end = began + limit
            while any(process.poll() is None for process in processes) and time.monotonic() < end:
                if any(process.poll() for process in processes):
                    end = min(end, time.monotonic() + 2)  # for the others to fail in their own words
                time.sleep(0.05)
        finally:
            self.killed = [rank for rank, process in enumerate(processes) if process.poll() is None]
            for process in processes:
                process.kill()
                process.wait()
        self.seconds = time.monotonic() - began
        self.codes = [process.returncode for process in processes]
        self.logs = [log.read_text() for log in logs]

    def check(self, name: str) -> None:
        """Fails, with what they printed, unless every process passed the check of that name."""
        passed = sum(bool(re.search(rf"^PASSED {name} ", log, re.MULTILINE)) for log in self.logs)
        if passed == self.world:
            return
        what = f"passed by {passed} of {self.world} processes; exit codes {self.codes}, killed: {self.killed}"
        logs = "\n".join(f"--- process {rank}\n{log[-5000:]}" for rank, log in enumerate(self.logs))
        pytest.fail(f"{name}: {what} after {self.seconds:.0f} s\n{logs}", pytrace=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the processes meet, and leave their checkpoints for others."""
    return tmp_path_factory.mktemp("distributed")


@pytest.fixture(scope="module")
def two(folder: Path) -> Run:
    return Run("two", 2, folder)


@pytest.fixture(scope="module")
def four(folder: Path, two: Run) -> Run:
    two.check("save")
    return Run("four", 4, folder)


@pytest.mark.parametrize("name", [check.__name__ for check in CHECKS["two"]])
def test_two_processes(name: str, two: Run) -> None:
    two.check(name)


@pytest.mark.parametrize("name", [check.__name__ for check in CHECKS["four"]])
def test_four_processes(name: str, four: Run) -> None:
    four.check(name)


@pytest.mark.parametrize("world", [2, 4])
def test_one_process_goes_on_where_several_stopped(world: int, folder: Path, request: pytest.FixtureRequest) -> None:
    request.getfixturevalue({2: "two", 4: "four"}[world]).check("save")
    model = Model()
    optimizer = Adagrad(model.parameters(), **distributed_workers.CHECKPOINT_OPTIONS)
    with warnings.catch_warnings():
        # torch.distributed.checkpoint remarks that there is no process group: that is the point.
        warnings.filterwarnings(
            "ignore", message="torch.distributed is .*assuming the intent is to", category=UserWarning
        )
        load_and_go_on(folder, world, model, optimizer)


def test_processes_that_wait_for_a_failed_one_are_killed(tmp_path: Path) -> None:
    code = "import sys, time; time.sleep(1000) if sys.argv[1] == '0' else sys.exit('this process fails')"
    run = Run("fail", 2, tmp_path, program=("-c", code))
    assert run.seconds < LIMIT / 2
    assert run.killed == [0]
    assert run.codes[1] == 1
    with pytest.raises(pytest.fail.Exception, match="this process fails"):
        run.check("anything")


def test_processes_that_hang_are_killed(tmp_path: Path) -> None:
    code = "import time; print('PASSED one 0.0', flush=True); time.sleep(1000)"
    run = Run("hang", 2, tmp_path, limit=3, program=("-c", code))
    assert run.killed == [0, 1]
    run.check("one")
    with pytest.raises(pytest.fail.Exception, match="another: passed by 0 of 2 processes"):
        run.check("another")


def test_example() -> None:
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(EXAMPLE),
        "--rows", "2000", "--steps", "40",
    ]  # fmt: skip
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(), start_new_session=True
    )
    try:
        out, err = process.communicate(timeout=LIMIT)
    except subprocess.TimeoutExpired:
        process.terminate()  # torchrun ends its processes, which a kill would leave behind
        try:
            out, err = process.communicate(timeout=40)
        except subprocess.TimeoutExpired:
            process.kill()
            out, err = "", "torchrun did not end when asked to"
        pytest.fail(f"still running after {LIMIT} s\n{out}\n{err}")
    assert process.returncode == 0, f"{out}\n{err}"
    assert "equal to one process, bit for bit" in out
    sent, predicted = (int(n.replace(",", "")) for n in re.search(r"sent ([\d,]+) .* predicts ([\d,]+)", out).groups())  # type: ignore[union-attr]
    assert abs(sent / predicted - 1) < 0.05
