"""Report benchmark results as a Markdown table and plots."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

OWN = ("adagrad", "adagrad.torch", "adagrad.torch graph", "adagrad.torch row-wise")
LIMITS = ("limit", "limit graph", "exact loop in L1")
COLORS = {
    "adagrad": "#1b6ca8",
    "adagrad.torch": "#6fb1de",
    "adagrad.torch graph": "#3d8fc4",
    "adagrad.torch row-wise": "#a9d2ee",
    "torch fused": "#d1495b",
    "torch foreach": "#e0672f",
    "torch.compile": "#b56576",
    "torch loop": "#b8864b",
    "torch sparse": "#d1495b",
    "optax": "#6a994e",
    "JAX": "#6a994e",
    "TensorFlow": "#d9a404",
    "FBGEMM exact": "#8d6a9f",
    "limit graph": "#999999",
}
MARKERS = dict.fromkeys(OWN, "D") | {
    "limit graph": "|",
    "torch foreach": "s",
    "torch.compile": "P",
    "torch loop": "v",
    "optax": "^",
    "JAX": "^",
    "TensorFlow": "p",
    "FBGEMM exact": "X",
}


RESULTS = Path(__file__).parent / "results"


def folder(given: Path | None, partial: bool) -> Path:
    """Return the folder to write to: by default that of the results, or for a partial run another one within."""
    found = given or (RESULTS / "partial" if partial else RESULTS)
    found.mkdir(parents=True, exist_ok=True)
    return found


def medians(rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Return median microseconds by case and contender."""
    found: dict[str, dict[str, float]] = defaultdict(dict)
    for row in rows:
        found[row["case"]][row["peer"]] = float(row["p50_us"])
    return found


def bound(times: dict[str, float]) -> float:
    """Return the limit of a case: its bytes, moved in the faster way, or its arithmetic, whichever takes longer."""
    return max(_fastest(times, "limit"), times.get("exact loop in L1", 0.0))


def _fastest(times: dict[str, float], name: str) -> float:
    """Return the time of a step, or of its replay in a CUDA graph if that is shorter."""
    return min(times[name], times.get(f"{name} graph", times[name]))


def _time(us: float) -> str:
    return f"{us:.1f} µs" if us < 1000 else f"{us / 1000:.2f} ms"


def table(rows: list[dict[str, Any]], notes: set[str], own: str = "adagrad") -> str:
    """Return a table of medians; for other libraries also as a multiple of those of ``own``, this library."""
    found = medians(rows)
    peers = [name for name in COLORS if name not in OWN and any(name in times for times in found.values())]
    others = [name for name in OWN if name != own and any(name in times for times in found.values())]
    head = ["case", "limit", own, "of the limit", *others, *peers]
    threads = max(int(row["threads"]) for row in rows)
    lines = [f"{rows[0]['machine']}, {threads} threads, {rows[0]['date']}; {rows[0]['versions']}", ""]
    lines += ["| " + " | ".join(head) + " |", "|" + "|".join("---" for _ in head) + "|"]
    for case, times in found.items():
        base = times[own]
        cells = [case, _time(bound(times)), _time(base), f"{bound(times) / _fastest(times, own):.2f}"]
        cells += [_time(times[name]) if name in times else "" for name in others]
        cells += [f"{_time(times[p])} ({times[p] / base:.1f}x)" if p in times else "" for p in peers]
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", *(f"- {note}" for note in sorted(notes))]
    return "\n".join(lines) + "\n"


def plot_ratios(path: Path, rows: list[dict[str, Any]], own: str = "adagrad") -> None:
    """Plot the time of each contender as a multiple of the limit, case by case; the largest mark is ``own``."""
    found = medians(rows)
    height = 2.2 + 0.4 * len(found)
    figure, axes = plt.subplots(figsize=(9, height), layout="constrained")
    for y, (_, times) in enumerate(found.items()):
        base = bound(times)
        others = [times[p] / base for p in times if p not in LIMITS and p not in OWN]
        if others:
            axes.plot([times[own] / base, max(others)], [y, y], color="#dddddd", lw=1, zorder=1)
        for peer, color in COLORS.items():
            if peer in times:
                size = 80 if peer == own else 30  # what another of ours covers shows around it
                axes.scatter(times[peer] / base, y, color=color, s=size, marker=MARKERS.get(peer, "o"),
                             zorder=3 if peer in OWN else 2)  # fmt: skip
    axes.axvline(1, color="black", lw=1)
    axes.set_xscale("log")
    axes.set_yticks(range(len(found)), list(found))
    axes.invert_yaxis()
    axes.set_xlabel("time of a step / limit")
    axes.grid(axis="x", which="both", color="#eeeeee")
    axes.set_axisbelow(True)
    used = {peer for times in found.values() for peer in times}
    shown = dict.fromkeys(color for peer, color in COLORS.items() if peer in used)
    for color in shown:
        names = [peer for peer, c in COLORS.items() if c == color and peer in used]
        axes.scatter([], [], color=color, marker=MARKERS.get(names[0], "o"), label=", ".join(names))
    figure.legend(loc="outside lower center", ncols=4, frameon=False)
    axes.set_title(f"AdaGrad step on {rows[0]['machine']} ({rows[0]['date']})", fontsize=10)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def plot_scaling(path: Path, rows: list[dict[str, Any]]) -> None:
    """Plot the time against the number of rows, the number of lookups and the size of a dense weight."""
    series: dict[str, dict[str, list[tuple[float, float]]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        what, x = row["case"].split()
        series[what][row["peer"]].append((float(x), float(row["p50_us"])))
    titles = {
        "height": ("4,096 rows of 4 columns, each once", "rows of the table"),
        "lookups": ("a table of 1M x 64", "lookups"),
        "size": ("one dense weight", "elements"),
    }
    figure, panels = plt.subplots(1, 3, figsize=(12, 3.8), layout="constrained")
    for axes, (what, (title, label)) in zip(panels, titles.items(), strict=True):
        for peer, points in series[what].items():
            x, y = np.array(sorted(points)).T
            axes.loglog(x, y, "o-", color=COLORS[peer], label=peer, ms=4)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel(label)
        axes.set_ylabel("time of a step, µs")
        axes.grid(which="major", color="#e8e8e8")
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=130)
    plt.close(figure)
