"""Time this and other libraries on the CPU in one run, and write CSV, a table and plots.

    python benchmarks/cpu.py [--quick] [--rounds N] [--only TEXT] [--threads N] [--out FOLDER]

Each round takes the cases, and the contenders of a case, in a new random order: a fixed order gave ratios that were
wrong by a factor of 1.5. A contender makes a few calls in a row, each timed; the figures are percentiles over all
rounds. PyTorch and FBGEMM run on one thread where that is faster for them than all.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import datetime
import gc
import os
import platform
import random
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import numba
import numpy as np
from llvmlite import binding as llvm
from tqdm import tqdm

from cases import CASES, SCALING, SEED, Case
from contenders import NOT_RESTRICTED, Data, contenders, versions

BLOCK_SECONDS = 0.08
"""Duration of a contender's calls in one round."""


def block(contender: Any, seconds: float) -> list[float]:
    """Return the times of calls in a row: at least two; those in the first half warm the caches and are not counted.

    A contender with its own tables fills large caches with them: the next one takes up to ten calls to settle.
    """
    times: list[float] = []
    begin = time.perf_counter()
    warm = 1
    prepare = getattr(contender, "prepare", None)
    while len(times) < warm + 2 or (time.perf_counter() - begin < seconds and len(times) < warm + 300):
        if prepare is not None:
            prepare()
        start = time.perf_counter()
        contender()
        times.append(time.perf_counter() - start)
        if start - begin < seconds / 2:
            warm = len(times)
    return times[warm:]


def choose_threads(contender: Any, threads: int) -> int:
    """Return the number of threads with which a contender runs: all, or one if that is faster and it can be set."""
    if threads == 1 or not getattr(contender, "may_prefer_one_thread", False):
        return threads
    medians = {}
    for count in (threads, 1):
        use_threads(count)
        medians[count] = float(np.median(block(contender, BLOCK_SECONDS / 4)))
    return min(medians, key=medians.__getitem__)


def use_threads(count: int) -> None:
    """Let PyTorch, if it is there, use so many threads."""
    with contextlib.suppress(ImportError):
        import torch

        torch.set_num_threads(count)


def measure(
    cases: list[Case], rounds: int, threads: int, names: tuple[str, ...] = ()
) -> tuple[dict[tuple[str, str], list[float]], dict[tuple[str, str], int], set[str]]:
    """Return all samples and the numbers of threads by (case, contender), and notes on contenders left out.

    Of the contenders named, or of all.
    """
    rng = random.Random(SEED)
    chosen: dict[tuple[str, str], int] = {}
    samples: dict[tuple[str, str], list[float]] = defaultdict(list)
    notes: set[str] = set()
    with tqdm(total=rounds * len(cases), unit="case") as bar:
        for _ in range(rounds):
            for case in rng.sample(cases, len(cases)):
                bar.set_description(case.name)
                try:
                    data = Data.of(case)
                except ImportError as error:
                    notes.add(f"{case.name}: left out: {error}")
                    bar.update()
                    continue
                found = contenders(case, data, threads, notes, names)
                for contender in found.values():
                    block(contender, 0)  # compiles, allocates
                for name, contender in found.items():
                    if (case.name, name) not in chosen:
                        chosen[case.name, name] = choose_threads(contender, threads)
                for name in rng.sample(sorted(found), len(found)) * 2:
                    use_threads(chosen[case.name, name])
                    samples[case.name, name] += block(found[name], BLOCK_SECONDS)
                use_threads(threads)
                del found, data
                gc.collect()
                bar.update()
    return samples, chosen, notes


def write_csv(
    path: Path, samples: dict[tuple[str, str], list[float]], threads: dict[tuple[str, str], int]
) -> list[dict[str, Any]]:
    """Write and return a row for each case and contender; times in microseconds."""
    about = {
        "machine": f"{_processor()}, {os.cpu_count()} cores",
        "date": datetime.date.today().isoformat(),
        "versions": " ".join(f"{name}={version}" for name, version in versions().items()),
    }
    rows = []
    for (case, name), times in samples.items():
        p20, p50, p80 = (round(float(p) * 1e6, 2) for p in np.percentile(times, [20, 50, 80]))
        rows.append(
            {
                "case": case,
                "peer": name,
                "p20_us": p20,
                "p50_us": p50,
                "p80_us": p80,
                "calls": len(times),
                "threads": threads[case, name],
                **about,
            }
        )
    order = {case.name: i for i, case in enumerate(CASES)}
    rows.sort(key=lambda row: (order.get(row["case"], len(order)), row["peer"]))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return rows


def _processor() -> str:
    """The processor's name and, because virtual machines call several generations alike, LLVM's name for its kind."""
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return f"{name} ({llvm.get_host_cpu_name()})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="no case of 64M, no scaling")
    parser.add_argument("--rounds", type=int, default=5, help="how often to time each case (default: %(default)s)")
    parser.add_argument("--only", default="", help="only cases whose name contains this text")
    most = numba.config.NUMBA_NUM_THREADS
    parser.add_argument("--threads", type=int, default=most, help="of every library (default: all, %(default)s here)")
    where = "folder to write to (default: benchmarks/results, and partial in it with --quick or --only)"
    parser.add_argument("--out", type=Path, help=where)
    arguments = parser.parse_args()
    cases = [case for case in CASES if arguments.only in case.name and not (arguments.quick and "64M" in case.name)]
    if not cases:
        parser.error(f"--only {arguments.only!r}: must be part of one of: {'; '.join(case.name for case in CASES)}")
    if arguments.rounds < 1:
        parser.error(f"--rounds {arguments.rounds}: must be >= 1")
    if not 1 <= arguments.threads <= most:
        parser.error(f"--threads {arguments.threads}: must be from 1 to {most}, the threads that Numba may use here")
    partial = arguments.quick or bool(arguments.only)
    try:
        from report import folder, plot_ratios, plot_scaling, table

        out = folder(arguments.out, partial)
        (out / "cpu.csv").open("a").close()
    except (ImportError, OSError) as error:  # now, not after measuring
        parser.error(str(error))
    numba.set_num_threads(arguments.threads)
    use_threads(arguments.threads)

    samples, chosen, notes = measure(cases, arguments.rounds, arguments.threads)
    if not samples:
        parser.error("; ".join(sorted(notes)))
    if arguments.threads < (os.cpu_count() or 1):
        notes.update(f"{name}: on all cores" for name in NOT_RESTRICTED if any(name == peer for _, peer in samples))
    rows = write_csv(out / "cpu.csv", samples, chosen)
    (out / "cpu.md").write_text(table(rows, notes))
    plot_ratios(out / "cpu.png", rows)
    if not partial:
        named = ("adagrad", "torch sparse", "torch fused")
        scaling, chosen, _ = measure(SCALING, arguments.rounds, arguments.threads, named)
        scaled = write_csv(out / "scaling.csv", scaling, chosen)
        plot_scaling(out / "scaling.png", scaled)
    print((out / "cpu.md").read_text())


if __name__ == "__main__":
    main()
