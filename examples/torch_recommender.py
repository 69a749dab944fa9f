"""Train a recommender with torch.optim.Adagrad and with adagrad.torch.Adagrad: the same model, one import changed.

    python examples/torch_recommender.py        # takes about a minute on two cores; needs ".[torch,examples]"

The model is a small DLRM (Naumov et al., 2019): a table of vectors for each of 8 categorical features, a network for
the numerical features, the inner products of all these vectors, and a network on top that predicts the odds of a click.

The clicks are generated, so the truth is known. Each category has a hidden vector; the log-odds of a click are the sum
of the inner products of the row's 8 hidden vectors, plus a linear function of the numbers, plus a constant. Categories
are distributed like words: a few occur often, most rarely. Clicks are drawn with these odds, so no model can have a
lower expected loss than the odds themselves: the line "the truth" in the picture.

Both optimizers start from the same weights and take turns on the same rows, so that other load on the computer affects
both equally. The picture shows that they learn the same, and how long a step of each takes.

Needs PyTorch, tqdm and matplotlib; from a clone:  pip install ".[torch,examples]"
"""

import argparse
import copy
import random
import time
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # draws into a file: no display needed
import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits as log_loss
from tqdm import tqdm

from adagrad.torch import Adagrad

FIELDS = 8  # categorical features
NUMBERS = 8  # numerical features
HIDDEN = 2  # numbers in a hidden vector
WIDTH = 32  # numbers in a vector of the model
BATCH = 2048
WARM_UP = 20  # untimed steps: kernels are compiled, memory is first used


class Truth:
    """The distribution of the clicks."""

    def __init__(self, rows: int, generator: torch.Generator) -> None:
        self.generator = generator
        self.hidden = torch.randn(FIELDS, rows, HIDDEN, generator=generator) * 0.6
        self.slope = torch.randn(NUMBERS, generator=generator) * 0.3
        self.frequency = torch.arange(1.0, rows + 1) ** -1.3

    def draw(self, count: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Draw rows: numbers, categories, the log-odds of a click, and whether there was one."""
        numbers = torch.randn(count, NUMBERS, generator=self.generator)
        drawn = torch.multinomial(self.frequency, count * FIELDS, replacement=True, generator=self.generator)
        categories = drawn.view(count, FIELDS)
        vectors = torch.stack([self.hidden[f, categories[:, f]] for f in range(FIELDS)])
        # The sum of the inner products of all pairs, from the square of the sum.
        pairs = (vectors.sum(0).square() - vectors.square().sum(0)).sum(-1) / 2
        odds = pairs + numbers @ self.slope - 1
        clicks = torch.rand(count, generator=self.generator) < odds.sigmoid()
        return numbers, categories, odds, clicks.float()


class Recommender(nn.Module):
    """A small DLRM. The tables' gradients are sparse: a batch uses few of their rows."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.EmbeddingBag(rows, WIDTH, mode="sum", sparse=True) for _ in range(FIELDS))
        for table in self.tables:
            nn.init.normal_(table.weight, std=0.1)
        self.bottom = nn.Sequential(nn.Linear(NUMBERS, 64), nn.ReLU(), nn.Linear(64, WIDTH))
        self.top = nn.Sequential(nn.Linear(WIDTH + FIELDS * (FIELDS + 1) // 2, 64), nn.ReLU(), nn.Linear(64, 1))
        self.register_buffer("pairs", torch.tril_indices(FIELDS + 1, FIELDS + 1, offset=-1))

    def forward(self, numbers: Tensor, categories: Tensor) -> Tensor:
        below = self.bottom(numbers)
        looked_up = [table(categories[:, f, None]) for f, table in enumerate(self.tables)]
        vectors = torch.stack([below, *looked_up], 1)
        products = (vectors @ vectors.transpose(1, 2))[:, self.pairs[0], self.pairs[1]]
        return self.top(torch.cat([below, products], 1)).squeeze(1)


class Run:
    """A model and its optimizer, with the losses so far and the time of each step."""

    def __init__(self, model: Recommender, optimizer: torch.optim.Optimizer) -> None:
        self.model, self.optimizer = model, optimizer
        self.losses: list[float] = []
        self.seconds: list[float] = []

    def step(self, numbers: Tensor, categories: Tensor, clicks: Tensor) -> None:
        self.optimizer.zero_grad()
        loss = log_loss(self.model(numbers, categories), clicks)
        loss.backward()
        start = time.perf_counter()
        self.optimizer.step()
        self.seconds.append(time.perf_counter() - start)
        self.losses.append(loss.item())


def train(rows: int, steps: int, rate: float, seed: int) -> tuple[dict[str, Run], list[float], list[float]]:
    """Return the runs by name and, for each batch, the loss of the truth and of always guessing the mean."""
    truth = Truth(rows, torch.Generator().manual_seed(seed))
    torch.manual_seed(seed)
    theirs = Recommender(rows)
    ours = copy.deepcopy(theirs)
    runs = {
        "torch.optim.Adagrad": Run(theirs, torch.optim.Adagrad(theirs.parameters(), lr=rate)),
        "adagrad.torch.Adagrad": Run(ours, Adagrad(ours.parameters(), lr=rate)),
    }
    best, guess = [], []
    shuffle = random.Random(seed)
    with tqdm(range(steps), unit="step", desc="training both", disable=None) as bar:
        for step in bar:
            numbers, categories, odds, clicks = truth.draw(BATCH)
            best.append(log_loss(odds, clicks).item())
            guess.append(log_loss(clicks.mean().logit().expand(BATCH), clicks).item())
            for run in shuffle.sample(list(runs.values()), len(runs)):
                run.step(numbers, categories, clicks)
            if step % 20 == 19:
                bar.set_postfix({name.split(".")[0]: f"{np.mean(run.losses[-20:]):.4f}" for name, run in runs.items()})
    return runs, best, guess


def draw(runs: dict[str, Run], best: list[float], guess: list[float], path: Path) -> None:
    """Plot the losses on the left, the time of a step on the right."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.6), width_ratios=[3, 2], layout="constrained")
    span = max(len(best) // 30, 1)

    def smooth(values: list[float]) -> np.ndarray:
        return np.convolve(values, np.ones(span) / span, mode="valid")

    x = np.arange(span, len(best) + 1)
    styles = {"torch.optim.Adagrad": ("tab:orange", 5.0), "adagrad.torch.Adagrad": ("tab:blue", 1.8)}
    left.plot(x, smooth(guess), color="grey", linestyle=":", label="always the mean")
    for name, run in runs.items():
        colour, width = styles[name]
        left.plot(x, smooth(run.losses), color=colour, linewidth=width, label=name)
    left.plot(x, smooth(best), color="black", linestyle="--", linewidth=1, label="the truth")
    left.set(xlabel=f"step (batches of {BATCH:,} rows)", ylabel=f"log loss, mean of {span} steps")
    left.set_title("They learn the same")
    left.legend(frameon=False)

    middle = {}
    for i, (name, run) in enumerate(runs.items()):
        low, middle[name], high = np.percentile(run.seconds[WARM_UP:], [10, 50, 90]) * 1000
        right.bar(i, middle[name], 0.6, color=styles[name][0])
        right.errorbar(i, middle[name], [[middle[name] - low], [high - middle[name]]], color="black", capsize=5)
        right.annotate(f"{middle[name]:.2f} ms", (i, high), (0, 5), textcoords="offset points", ha="center")
    slow, fast = middle.values()
    right.set_xticks(range(len(runs)), [name.replace(".Ada", ".\nAda") for name in runs])
    right.set(ylabel="time of optimizer.step(), ms", title=f"A step is {slow / fast:.1f} times as fast")
    right.margins(y=0.15)
    note = "median, and 10th to 90th percentile"
    right.text(0.98, 0.97, note, transform=right.transAxes, ha="right", va="top", color="grey")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    features = "categories of each of the 8 features (default: %(default)s)"
    parser.add_argument("--rows", type=int, default=50_000, help=features)
    parser.add_argument("--steps", type=int, default=600, help="batches to train on (default: %(default)s)")
    parser.add_argument("--rate", type=float, default=0.05, help="learning rate (default: %(default)s)")
    threads = "the default, %(default)s, varies least on a computer that is also used otherwise"
    parser.add_argument("--threads", type=int, default=1, help=threads)
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    picture = Path("torch_recommender.png")
    parser.add_argument("--picture", type=Path, default=picture, help="where to draw (default: %(default)s)")
    arguments = parser.parse_args()
    if arguments.steps <= WARM_UP:
        parser.error(f"--steps {arguments.steps}: must be more than {WARM_UP}, the steps that are not timed")
    if min(arguments.rows, arguments.threads) < 1 or not 0 <= arguments.rate < float("inf"):
        parser.error("--rows and --threads must be >= 1; --rate finite and >= 0")
    if not arguments.picture.parent.is_dir():  # found out before training
        parser.error(f"--picture {arguments.picture}: {arguments.picture.parent}: must be a folder")

    torch.set_num_threads(arguments.threads)
    # torch.optim.Adagrad makes sparse tensors; PyTorch warns unless told whether to check them.
    torch.sparse.check_sparse_tensor_invariants.disable()
    runs, best, guess = train(arguments.rows, arguments.steps, arguments.rate, arguments.seed)
    last = slice(-100, None)
    print(
        f"loss of the last 100 steps: the truth {np.mean(best[last]):.4f}, always the mean {np.mean(guess[last]):.4f}"
    )
    for name, run in runs.items():
        milliseconds = np.median(run.seconds[WARM_UP:]) * 1000
        print(f"{name:>22}: loss {np.mean(run.losses[last]):.4f}, a step takes {milliseconds:.2f} ms")
    draw(runs, best, guess, arguments.picture)
    print(f"drawn: {arguments.picture}")


if __name__ == "__main__":
    main()
