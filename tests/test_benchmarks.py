"""The benchmarks' cases in small: every contender runs, and the library's result is the rule's."""

from __future__ import annotations

import csv
import math
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from adagrad import rule

FOLDER = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture(scope="module")
def modules() -> Any:
    sys.path.insert(0, str(FOLDER))
    try:
        import cases
        import contenders as peers
        import report

        yield cases, peers, report
    finally:
        sys.path.remove(str(FOLDER))


def small(case: Any, cases: Any) -> Any:
    if isinstance(case, cases.Dense):
        shapes = tuple(tuple(min(size, 40) for size in shape) for shape in case.shapes)
        return replace(case, shapes=shapes[:9])
    return replace(case, rows=min(case.rows, 500), lookups=min(case.lookups, 3000))


def test_every_case_computes_the_rule(modules: Any) -> None:
    cases, peers, _ = modules
    for original in (*cases.CASES, *cases.SCALING):
        case = small(original, cases)
        data = peers.Data.of(case)
        weights, histories = [w.copy() for w in data.weights], [h.copy() for h in data.histories]
        options = rule.Rule()
        if isinstance(case, cases.Dense):
            for w, g, h in zip(weights, data.grads, histories, strict=True):
                rule.step(w, g, h, None, 0.01, 0.0, options)
        else:
            rule.step_rows(weights[0], data.indices, data.values, histories[0], None, 0.01, 0.0, options)
        peers.Adagrad(case, data, 1)()
        for found, expected in zip(data.weights + data.histories, weights + histories, strict=True):
            assert np.array_equal(found.view(np.uint8), expected.view(np.uint8)), case.name


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")  # torch's own optimizer makes sparse tensors
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of peers
def test_contenders_run_and_are_reported(modules: Any, tmp_path: Path) -> None:
    cases, peers, report = modules
    notes: set[str] = set()
    rows = []
    for original in (cases.DENSE[0], cases.DENSE[4], cases.ROWS[0], cases.ROWS[1]):
        case = small(original, cases)
        data = peers.Data.of(case)
        found = peers.contenders(case, data, 1, notes)
        assert {"adagrad", "limit"} <= set(found)
        for name, contender in [*found.items()] * 3:
            if hasattr(contender, "prepare"):
                contender.prepare()
            contender()
            # The next one gets what this one leaves; PyTorch's root of numbers < 0 takes ten times as long.
            assert all(np.isfinite(a).all() for a in data.weights)
            assert all((h >= 0.5).all() for h in data.histories), name
            rows.append({"case": case.name, "peer": name, "p50_us": 1.0 + len(name)})
    for row in rows:
        row |= {"machine": "m", "threads": 1, "date": "d", "versions": "v"}
    assert rows[0]["case"] in report.table(rows, notes)
    report.plot_ratios(tmp_path / "plot.png", rows)
    report.plot_scaling(
        tmp_path / "scaling.png", [{"case": c.name, "peer": "adagrad", "p50_us": 1} for c in cases.SCALING]
    )
    assert all((tmp_path / name).stat().st_size > 1000 for name in ("plot.png", "scaling.png"))


def test_row_ids_are_as_named(modules: Any) -> None:
    cases, _, _ = modules
    for case in cases.ROWS:
        ids = case.indices()
        assert ids.min() >= 0
        assert ids.max() < case.rows
        assert (len(np.unique(ids)) == len(ids)) == case.distinct
        assert math.isclose(case.columns * case.rows, 2**26, rel_tol=0.7)


def test_a_partial_run_keeps_the_complete_results(
    modules: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import numba
    import torch

    import cpu
    import report

    def measure(cases: list[Any], *_: Any) -> Any:
        samples = {(case.name, peer): [1.0] for case in cases for peer in ("adagrad", "limit")}
        return samples, dict.fromkeys(samples, 2), set()

    monkeypatch.setattr(report, "RESULTS", tmp_path)
    monkeypatch.setattr(cpu, "measure", measure)
    for module in (numba, torch):
        monkeypatch.setattr(module, "set_num_threads", lambda count: None)
    for partial in (["--only", "1K"], ["--quick"]):
        monkeypatch.setattr(sys, "argv", ["cpu.py", *partial])
        cpu.main()
        assert [path.name for path in tmp_path.iterdir()] == ["partial"]
    monkeypatch.setattr(sys, "argv", ["cpu.py", "--only", "nothing of the kind"])
    with pytest.raises(SystemExit):
        cpu.main()


def test_a_library_runs_on_one_thread_where_that_is_faster(modules: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    cases, _, _ = modules
    import cpu

    seen: dict[str, set[int]] = {"stalls": set(), "scales": set(), "adagrad": set()}
    now = 0.0

    class Contender:
        def __init__(self, name: str) -> None:
            self.name = name
            self.may_prefer_one_thread = name != "adagrad"

        def __call__(self) -> None:
            nonlocal now
            is_slow = torch.get_num_threads() == (2 if self.name == "stalls" else 1)
            now += 2e-3 if is_slow and self.may_prefer_one_thread else 2e-4
            seen[self.name].add(torch.get_num_threads())

    monkeypatch.setattr(cpu, "contenders", lambda *_: {name: Contender(name) for name in seen})
    monkeypatch.setattr(cpu, "BLOCK_SECONDS", 0.02)
    monkeypatch.setattr(cpu, "time", SimpleNamespace(perf_counter=lambda: now))  # a busy machine must not matter
    before = torch.get_num_threads()
    try:
        samples, chosen, _ = cpu.measure([small(cases.DENSE[3], cases)], 2, 2)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert {name: count for (_, name), count in chosen.items()} == {"stalls": 1, "scales": 2, "adagrad": 2}
    assert all(np.median(times) == pytest.approx(2e-4) for times in samples.values())
    assert seen["adagrad"] == {2}


class Event:
    """In place of CUDA's."""

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.at = time.perf_counter()

    def elapsed_time(self, other: Event) -> float:
        return 1e3 * (other.at - self.at)


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of PyTorch's compiler, which is imported to be reset
def test_the_gpu_benchmark_runs(
    modules: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All but the device: on CPU tensors, with a peer and a case that fail."""
    pytest.importorskip("triton")
    torch = pytest.importorskip("torch")
    cases, _, _ = modules
    import gpu

    def compiled(step: Any, **options: Any) -> Any:
        def fail() -> None:
            raise RuntimeError("no compiler here")

        return fail

    monkeypatch.setattr(gpu, "DEVICE", "cpu")
    for name, value in {
        "Event": Event, "is_available": lambda: True, "get_device_name": lambda device: "no device",
        "synchronize": lambda device: None, "empty_cache": lambda: None,
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch, "compile", compiled)

    def smaller(case: Any) -> Any:
        if isinstance(case, gpu.Fresh):
            return gpu.Fresh(smaller(case.case))
        if isinstance(case, gpu.Tables):
            return replace(case, each=tuple(small(each, cases) for each in case.each[:3]))
        return small(case, cases)

    tables = [smaller(case) for case in gpu.CASES]
    fails = gpu.Tables("a case that fails", ())
    monkeypatch.setattr(gpu, "CASES", [fails, *tables])
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--quick", "--out", str(tmp_path)])
    gpu.main()
    with (tmp_path / "gpu.csv").open() as file:
        rows = list(csv.DictReader(file))
    for case in tables:
        peers = {row["peer"] for row in rows if row["case"] == case.name}
        expected = {"torch foreach", "torch loop", "torch fused"}
        if not isinstance(case.case if isinstance(case, gpu.Fresh) else case, cases.Dense):
            expected = {"adagrad.torch row-wise", "torch sparse"}
        assert peers == {"adagrad.torch", "limit"} | expected, case.name
        assert f"| {case.name} |" in (tmp_path / "gpu.md").read_text()
    assert (tmp_path / "gpu.png").stat().st_size > 10_000
    assert fails.name not in {row["case"] for row in rows}
    assert f"{fails.name} is left out: ValueError" in capsys.readouterr().out
    monkeypatch.setattr(gpu, "CASES", [fails])
    with pytest.raises(SystemExit):
        gpu.main()
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--only", "nothing of the kind"])
    with pytest.raises(SystemExit):
        gpu.main()


def test_the_limit_is_that_of_the_faster_way(modules: Any) -> None:
    _, _, report = modules
    times = {"limit": 8.0, "limit graph": 3.0, "adagrad.torch": 12.0, "adagrad.torch graph": 4.0}
    about = {"case": "x", "machine": "m", "date": "d", "versions": "v", "threads": 1}
    rows = [{"peer": name, "p50_us": time} | about for name, time in times.items()]
    line = report.table(rows, set(), own="adagrad.torch").splitlines()[4]
    assert line == "| x | 3.0 µs | 12.0 µs | 0.75 | 4.0 µs | 3.0 µs (0.2x) |"
