"""Time this and other implementations on a CUDA device, and write CSV, a table and a plot.

    python benchmarks/gpu.py [--quick] [--only TEXT] [--out FOLDER]

Times are those of CUDA events around one step, in rounds that take the contenders in a new random order; the figures
are percentiles over all rounds. The limit is a device copy of the same bytes; for row-sparse cases a sort of the row
ids plus a copy of the bytes of the rows. The bytes assume a float32 history value for each element; row-wise histories
have fewer, and so has torch.optim.Adagrad for 16-bit parameters, whose histories have 16 bits there.

Steps follow each other without a pause, so the time of a small one is that of the host. "graph" means a step captured
in a CUDA graph and replayed, which takes the host a few microseconds: what is left is the time of the device. "of the
limit" compares the faster way to run the copy with the faster way to run the step.

What fails, an implementation or a whole case, is left out with a note. All files are written after each case.

(Not cuda.py: PyTorch would import that in place of NVIDIA's package of this name.)
"""

from __future__ import annotations

import argparse
import csv
import datetime
import gc
import importlib.metadata
import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from cases import SEED, Dense, Rows
from contenders import LEARNING_RATE, versions
from report import folder, plot_ratios, table as markdown

DEVICE = "cuda"
ROUND_SECONDS = 0.05
"""The longest that a contender is timed in a round, unless one step takes longer."""


@dataclass(frozen=True)
class Tables:
    """Several tables, as in a recommender, with a row-sparse gradient for each."""

    name: str
    each: tuple[Rows, ...]


@dataclass(frozen=True)
class Fresh:
    """New gradients and a new learning rate at each step, as in training: nothing can be reused from the last step."""

    case: Dense | Tables

    @property
    def name(self) -> str:
        return f"{self.case.name}, new gradients and lr"


Case = Dense | Rows | Tables | Fresh

_TABLES = Tables(
    "26 x (100k x 64, 4,096) zipf",
    tuple(Rows("100k x 64, 4,096 zipf", 100_000, 64, 4_096, "zipf", False, seed=SEED + i) for i in range(26)),
)
_SMALL = Dense("300 x 1,000", ((1000,),) * 300)
CASES: list[Case] = [
    Rows(f"{name} {ids}", rows, columns, lookups, ids, False)
    for name, rows, columns, lookups in (
        ("10M x 128, 262,144", 10 << 20, 128, 262_144),
        ("10M x 64, 1M", 10 << 20, 64, 1 << 20),
        ("1M x 64, 8,192", 1 << 20, 64, 8_192),
    )
    for ids in ("zipf", "uniform")
]
CASES += [
    _TABLES,
    Fresh(_TABLES),
    _SMALL,
    Fresh(_SMALL),
    Dense("1 x 16M", ((16 << 20,),)),
    Dense("1 x 256M", ((256 << 20,),)),
    Dense("1 x 256M bfloat16", ((256 << 20,),), "bfloat16"),
    Dense("12 x (4096, 4096*4096, 4096*11008)", ((4096,), (4096, 4096), (4096, 11008)) * 12),
]


class Copy:
    """A device copy of the bytes that a step reads and writes; for rows, after a sort of the ids."""

    def __init__(self, case: Dense | Rows | Tables, device: torch.device) -> None:
        self.ids = None
        if isinstance(case, Dense):
            size = case.bytes
        else:
            ids = [table.indices() for table in tables_of(case)]
            self.ids = torch.from_numpy(np.concatenate(ids)).to(device, torch.int32)
            size = sum(
                4 * table.columns * (4 * len(np.unique(some)) + len(some))
                for table, some in zip(tables_of(case), ids, strict=True)
            )
        self.source = torch.zeros(size // 8, device=device)
        self.target = torch.empty_like(self.source)

    def by_driver(self) -> None:
        self._sort()
        self.target.copy_(self.source)

    def by_kernel(self) -> None:
        """For graphs, which replay the driver's copies more slowly than it carries them out otherwise."""
        self._sort()
        torch.neg(self.source, out=self.target)

    def _sort(self) -> None:
        if self.ids is not None:
            torch.sort(self.ids)


def tables_of(case: Rows | Tables) -> tuple[Rows, ...]:
    return case.each if isinstance(case, Tables) else (case,)


def parameters(case: Dense | Rows | Tables, device: torch.device) -> list[torch.nn.Parameter]:
    """Return parameters on the device."""
    if isinstance(case, Dense):
        shapes, dtype = case.shapes, getattr(torch, case.dtype)
    else:
        shapes, dtype = tuple((table.rows, table.columns) for table in tables_of(case)), torch.float32
    return [torch.nn.Parameter(torch.rand(shape, dtype=dtype, device=device)) for shape in shapes]


def gradients(case: Dense | Rows | Tables, params: list[torch.nn.Parameter], seed: int) -> list[torch.Tensor]:
    """Return a gradient for each parameter, in new memory; row ids depend on ``seed``."""
    if isinstance(case, Dense):
        return [torch.rand_like(param) for param in params]
    found = []
    for table, param in zip(tables_of(case), params, strict=True):
        ids = torch.from_numpy(replace(table, seed=table.seed + seed).indices()).to(param.device)
        values = torch.rand(len(ids), table.columns, device=param.device)
        found.append(torch.sparse_coo_tensor(ids[None], values, param.shape, check_invariants=False))
    return found


def step_of(optimizer: torch.optim.Optimizer, case: Case) -> Callable[[], Any]:
    """Return a step of the optimizer; for a :class:`Fresh` case with the changes before it."""
    if not isinstance(case, Fresh):
        return optimizer.step
    (group,) = optimizer.param_groups
    params = group["params"]
    sets = [gradients(case.case, params, 100 * i) for i in range(20)]  # more than any cache keeps
    turn = itertools.count()

    def changed() -> None:
        for param, grad in zip(params, sets[next(turn) % len(sets)], strict=True):
            param.grad = grad
        group["lr"] *= 0.9999
        optimizer.step()

    return changed


def captured(step: Callable[[], Any], device: torch.device) -> Callable[[], Any]:
    """Return the replay of a step, captured in a CUDA graph."""
    stream = torch.cuda.Stream(device)
    with torch.cuda.stream(stream):
        for _ in range(3):  # what is compiled or allocated at first use is there before the capture
            step()
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        step()
    return graph.replay


def contenders(case: Case, device: torch.device) -> dict[str, Callable[[], Any]]:
    """Return this library's and torch's steps and the copy; all optimizers share the same parameters.

    Sparse gradients take torch's loop, also with ``foreach=True``; ``fused=True`` refuses them. ``torch.compile``
    leaves them to that loop, too, and compiles anew for new gradients.
    """
    from adagrad.torch import Adagrad

    what = case.case if isinstance(case, Fresh) else case
    params = parameters(what, device)
    for param, grad in zip(params, gradients(what, params, 0), strict=True):
        param.grad = grad
    ours = Adagrad(params, lr=LEARNING_RATE)
    limit = Copy(what, device)
    found: dict[str, Callable[[], Any]] = {"adagrad.torch": step_of(ours, case), "limit": limit.by_driver}
    if not isinstance(case, Fresh):
        for name, step in (("adagrad.torch graph", ours.step), ("limit graph", limit.by_kernel)):
            replay = attempt(name, partial(captured, step, device))
            if replay is not None:
                found[name] = replay
    options: dict[str, dict[str, bool]] = {"torch sparse": {}}
    if isinstance(what, Dense):
        options = {
            "torch foreach": {"foreach": True},
            "torch loop": {"foreach": False},
            "torch fused": {"fused": True},
        }
    else:
        found["adagrad.torch row-wise"] = step_of(Adagrad(params, lr=LEARNING_RATE, row_wise=True), case)
    for name, arguments in options.items():
        optimizer = attempt(name, partial(torch.optim.Adagrad, params, lr=LEARNING_RATE, **arguments))
        if optimizer is not None:
            found[name] = step_of(optimizer, case)
    if isinstance(case, Dense):
        compiled = torch.optim.Adagrad(params, lr=torch.tensor(LEARNING_RATE), foreach=True)
        found["torch.compile"] = torch.compile(compiled.step, fullgraph=False)
    return found


def attempt(name: str, what: Callable[[], Any]) -> Any:
    """Return its result; None, with a note, if this version has no such implementation or memory is short."""
    try:
        return what()
    except Exception as error:
        tqdm.write(f"{name} is left out: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
        return None


def runs(step: Callable[[], Any], device: torch.device) -> bool:
    """Run three steps, which compile whatever is needed, and return True."""
    for _ in range(3):
        step()
    torch.cuda.synchronize(device)
    return True


def measure(case: Case, rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Return the seconds of single steps by contender."""
    torch.compiler.reset()  # what was compiled for the last case keeps its parameters alive
    gc.collect()
    torch.cuda.empty_cache()
    rng = random.Random(SEED)
    found = contenders(case, device)
    for name in sorted(found):
        if not attempt(name, partial(runs, found[name], device)):
            if name in ("adagrad.torch", "limit"):
                raise RuntimeError(f"{case.name}: {name} must run")
            del found[name]
    samples: dict[str, list[float]] = {name: steps(found[name], 1, device) for name in found}
    for _ in range(rounds):
        for name in rng.sample(sorted(found), len(found)):
            fit = int(ROUND_SECONDS / samples[name][0])
            samples[name] += steps(found[name], min(max(fit, 1), 10), device)
    return {name: times[1:] for name, times in samples.items()}


def steps(step: Callable[[], Any], n: int, device: torch.device) -> list[float]:
    """Return the seconds of each of ``n`` steps, after one that is not timed."""
    events = [torch.cuda.Event(enable_timing=True) for _ in range(n + 1)]
    step()
    events[0].record()
    for event in events[1:]:
        step()
        event.record()
    torch.cuda.synchronize(device)
    return [a.elapsed_time(b) / 1e3 for a, b in itertools.pairwise(events)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="three rounds instead of fifteen")
    parser.add_argument("--only", default="", help="only cases whose name contains this text")
    where = "folder to write to (default: benchmarks/results, and partial in it with --quick or --only)"
    parser.add_argument("--out", type=Path, help=where)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.exit(1, "no CUDA device here\n")
    device = torch.device(DEVICE)
    cases = [case for case in CASES if arguments.only in case.name]
    if not cases:
        parser.error(f"--only {arguments.only!r}: must be part of one of: {'; '.join(case.name for case in CASES)}")
    out = folder(arguments.out, arguments.quick or bool(arguments.only))
    found = {**versions(), "triton": importlib.metadata.version("triton"), "cuda": torch.version.cuda}
    about = {
        "threads": 1,
        "machine": torch.cuda.get_device_name(device),
        "date": datetime.date.today().isoformat(),
        "versions": " ".join(f"{name}={version}" for name, version in found.items()),
    }
    rows: list[dict[str, Any]] = []
    for case in tqdm(cases, unit="case"):
        samples = attempt(case.name, partial(measure, case, 3 if arguments.quick else 15, device))
        if samples is None:
            continue
        for name, times in samples.items():
            p20, p50, p80 = (round(float(p) * 1e6, 2) for p in np.percentile(times, [20, 50, 80]))
            row = {"case": case.name, "peer": name, "p20_us": p20, "p50_us": p50, "p80_us": p80, "calls": len(times)}
            rows.append(row | about)
        with (out / "gpu.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
        (out / "gpu.md").write_text(markdown(rows, set(), own="adagrad.torch"))
        plot_ratios(out / "gpu.png", rows, own="adagrad.torch")
    if not rows:
        parser.exit(1, "no case was measured\n")
    print((out / "gpu.md").read_text())


if __name__ == "__main__":
    main()
