"""Train GloVe word vectors with row-sparse AdaGrad, on Python's documentation or on your own text.

    python examples/word_vectors.py                     # the reference manual that comes with every Python
    python examples/word_vectors.py my_text.txt         # any UTF-8 text, of 50,000 words or more

GloVe (Pennington, Socher and Manning, 2014) fits vectors whose inner products are the logarithms of the co-occurrence
counts X. Its loss is a weighted least-squares loss over the pairs of words that occur near each other:

    f(X_ij) / 2 * (w_i . c_j + b_i + d_j - log X_ij)^2      with f(x) = min(1, (x / x_max)^0.75)

A batch of pairs uses a few rows of the tables w, c, b and d, so their gradients are row-sparse. Frequent words get a
gradient in every batch and rare words hardly ever: AdaGrad adapts the step size of each number to this.

Needs tqdm and matplotlib; from a clone:  pip install ".[examples]"
"""

import argparse
import re
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # draws into a file: no display needed
import matplotlib.pyplot as plt
import numpy as np
from tqdm import tqdm

import adagrad

WORD = re.compile(r"[^\W\d]\w*(?:['’](?!s\b)\w+)?")  # words and identifiers: method, don't, __init__, float64
PYTHON_WORDS = ["class", "exception", "function", "string", "list", "dictionary", "float", "import", "method", "async"]
X_MAX = 10.0  # the paper uses 100, for billions of words
BATCH = 4096  # pairs
COLOURS = [*(f"C{i}" for i in (0, 1, 2, 3, 4, 5, 6, 8, 9)), "navy"]  # C7 is grey


@dataclass
class Corpus:
    """The words by decreasing count, their counts, and the text as word numbers."""

    words: list[str]
    counts: np.ndarray
    ids: np.ndarray


@dataclass
class Pairs:
    """The nonzeros of the co-occurrence matrix: X[row[k], column[k]] = count[k]."""

    row: np.ndarray
    column: np.ndarray
    count: np.ndarray


def read_text(path: Path | None) -> str:
    """Return the text of the file, or by default the manual pages behind Python's `help("topics")`."""
    if path is not None:
        return path.read_text(encoding="utf-8")
    from pydoc_data.topics import topics

    return "\n".join(topics.values())


def build_corpus(text: str, min_count: int) -> Corpus:
    """Split a text into words and number those that occur at least `min_count` times; the others are dropped."""
    tokens = WORD.findall(text.lower())
    kept = [(word, n) for word, n in Counter(tokens).most_common() if n >= min_count]
    number = {word: i for i, (word, _) in enumerate(kept)}
    ids = np.array([number[token] for token in tokens if token in number], dtype=np.int64)
    return Corpus([word for word, _ in kept], np.array([n for _, n in kept], dtype=np.int64), ids)


def count_pairs(corpus: Corpus, window: int) -> Pairs:
    """Count each pair of words at most `window` apart, in both orders; at distance d it counts 1 / d."""
    size = len(corpus.words)
    codes, counts = np.empty(0, np.int64), np.empty(0)
    for distance in range(1, window + 1):
        left, right = corpus.ids[:-distance], corpus.ids[distance:]
        found = np.concatenate([left * size + right, right * size + left])  # each pair as one number
        amounts = np.concatenate([counts, np.full(len(found), 1.0 / distance)])
        codes, position = np.unique(np.concatenate([codes, found]), return_inverse=True)
        counts = np.bincount(position, amounts)
    return Pairs(codes // size, codes % size, counts)


def train(
    pairs: Pairs, size: int, dimensions: int, epochs: int, rng: np.random.Generator
) -> tuple[np.ndarray, list[float]]:
    """Minimise GloVe's loss; return a vector for each word and the mean loss of each epoch."""
    w, c = ((rng.random((size, dimensions), np.float32) - 0.5) / dimensions for _ in range(2))
    b, d = np.zeros(size, np.float32), np.zeros(size, np.float32)

    # The initial history is 1, as in the authors' program: the first steps are proportional to the gradients, not
    # lr * sign. Weight decay keeps rare words from overfitting; it applies to the rows of the batch only: cheap.
    optimizer = adagrad.AdaGrad(learning_rate=0.2, wd=0.03, initial_accumulator_value=1.0)
    optimizer.set_wd_mult({2: 0.0, 3: 0.0})  # no decay for the biases b and d
    updater = adagrad.get_updater(optimizer)

    target = np.log(pairs.count).astype(np.float32)
    weight = np.minimum(1.0, (pairs.count / X_MAX) ** 0.75).astype(np.float32)
    starts = range(0, len(target), BATCH)
    losses: list[float] = []
    with tqdm(total=epochs * len(starts), unit="batch", desc="training", disable=None) as bar:
        for _ in range(epochs):
            total = 0.0
            order = rng.permutation(len(target))
            for start in starts:
                batch = order[start : start + BATCH]
                i, j = pairs.row[batch], pairs.column[batch]
                w_i, c_j = w[i], c[j]
                error = np.einsum("kd,kd->k", w_i, c_j) + b[i] + d[j] - target[batch]
                slope = weight[batch] * error
                total += 0.5 * float(slope @ error)

                # A word is in many pairs of a batch. RowSparse may contain duplicate rows: their values are summed.
                gradients = [
                    adagrad.RowSparse(slope[:, None] * c_j, i, w.shape),
                    adagrad.RowSparse(slope[:, None] * w_i, j, c.shape),
                    adagrad.RowSparse(slope, i, b.shape),
                    adagrad.RowSparse(slope, j, d.shape),
                ]
                updater([0, 1, 2, 3], gradients, [w, c, b, d])
                bar.update()
            losses.append(total / len(target))
            bar.set_postfix(loss=f"{losses[-1]:.4f}")
    return w + c, losses  # the paper adds the two: less noise


def directions(vectors: np.ndarray) -> np.ndarray:
    """Return unit vectors without the mean and main direction, which all words share (Mu and Viswanath, 2018)."""
    centred = vectors - vectors.mean(axis=0)
    main = np.linalg.svd(centred, full_matrices=False)[2][0]
    centred -= np.outer(centred @ main, main)
    return centred / np.maximum(np.linalg.norm(centred, axis=1, keepdims=True), 1e-12)


def telling_words(corpus: Corpus) -> np.ndarray:
    """Return True for words that have a topic; False for single letters and words found everywhere (the, of, is).

    In any language topic words come in bursts and function words evenly. Over 200 parts of the text, the counts of an
    even word follow a Poisson distribution, with the variance near the mean; bursts add (mean * burstiness)^2.
    """
    size, parts = len(corpus.words), 200
    part = np.arange(len(corpus.ids)) * parts // len(corpus.ids)
    counts = np.bincount(part * size + corpus.ids, minlength=parts * size).reshape(parts, size)
    mean = counts.mean(axis=0)
    bursty = (counts.var(axis=0) - mean) / mean**2 > 1.2
    long_enough = np.array([len(word) > 1 for word in corpus.words])
    telling = long_enough & (bursty | (corpus.counts < 50))  # below 50 the variance is not informative
    return telling if telling.sum() >= 10 else np.ones(size, bool)


def choose_words(corpus: Corpus, telling: np.ndarray, wanted: list[str]) -> list[int]:
    """Return the words to show: those wanted or, if most are missing, the most frequent words that have a topic."""
    present = [corpus.words.index(word) for word in wanted if word in corpus.words]
    return present if len(present) >= 5 else [int(i) for i in np.flatnonzero(telling)[:10]]


def nearest(unit: np.ndarray, word: int, allowed: np.ndarray, n: int = 7) -> list[int]:
    """Return the allowed words whose directions have the largest cosines with the word's, best first."""
    cosine = unit @ unit[word]
    order = np.argsort(-cosine, kind="stable")
    return [int(i) for i in order if allowed[i] and i != word][:n]


def spread(centre: np.ndarray, extent: np.ndarray) -> np.ndarray:
    """Move boxes, given by centres and sizes, apart in small steps until they hardly overlap."""
    for _ in range(300):
        gap = centre[:, None] - centre
        overlap = np.maximum((extent[:, None] + extent) / 2 - np.abs(gap), 0.0)
        x, y = overlap[..., 0], overlap[..., 1]
        push = np.stack([np.where(x < y, x, 0.0), np.where(y <= x, y, 0.0)], axis=2)  # along the axis of less overlap
        push[(x == 0) | (y == 0)] = 0.0  # no overlap
        centre = centre + 0.25 * (push * np.sign(gap)).sum(axis=1)
    return centre


def draw(
    path: Path, corpus: Corpus, unit: np.ndarray, telling: np.ndarray, shown: list[int], losses: list[float]
) -> None:
    """Draw the loss curve and a map (PCA) of frequent words, coloured like the nearest of the shown words."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(17, 10), width_ratios=[1, 3.6], layout="constrained", dpi=110)
    figure.suptitle("Word vectors by GloVe and AdaGrad", fontsize=18)
    left.plot(range(1, len(losses) + 1), losses, linewidth=2, marker="o" if len(losses) == 1 else None)
    left.set_title("Loss", fontsize=14)
    left.set(xlabel="epoch", ylabel="mean weighted squared error / 2", ylim=(0, None))
    left.grid(alpha=0.3)

    some = np.union1d(np.flatnonzero(telling)[:120], shown)
    centred = unit[some] - unit[some].mean(axis=0)
    places = centred @ np.linalg.svd(centred, full_matrices=False)[2][:2].T
    right.set(xlabel="first principal component", ylabel="second principal component")
    right.set_title("Frequent words, each in the colour of the nearest large word (grey: none is near)", fontsize=14)
    right.margins(x=0.08)  # room for the words at the sides
    right.plot(*places.T, linestyle="none")  # sets the limits
    figure.canvas.draw()  # fixes the layout: pixel positions do not change from here on

    cosine = unit[some] @ unit[shown].T
    labels = []
    for word, place, near in zip(some, places, cosine, strict=True):
        colour = COLOURS[near.argmax()] if near.max() > 0.25 else "grey"
        style = {"fontsize": 19, "weight": "bold"} if word in shown else {"fontsize": 12}
        labels.append(right.text(*place, corpus.words[word], color=colour, ha="center", va="center", **style))
    boxes = [label.get_window_extent() for label in labels]
    centre = np.array([[box.x0 + box.x1, box.y0 + box.y1] for box in boxes]) / 2
    centre = spread(centre, np.array([[box.width + 6, box.height + 2] for box in boxes]))
    for label, place in zip(labels, right.transData.inverted().transform(centre), strict=True):
        label.set_position(place)
    figure.savefig(path, bbox_inches="tight", pad_inches=0.2)
    plt.close(figure)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train GloVe word vectors with AdaGrad and show what they learned.")
    parser.add_argument("text", nargs="?", type=Path, help="a UTF-8 text file (default: the manual of Python)")
    parser.add_argument("--dimensions", type=int, default=50, help="dimension of the vectors (default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=60, help="passes over the pairs (default: %(default)s)")
    parser.add_argument("--window", type=int, default=10, help="context size, in words (default: %(default)s)")
    parser.add_argument("--min-count", type=int, default=5, help="drop rarer words (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("word_vectors_output"), help="folder (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same vectors")
    options = parser.parse_args()
    if options.dimensions < 3 or min(options.epochs, options.window, options.min_count) < 1 or options.seed < 0:
        parser.error("--dimensions must be >= 3; --epochs, --window and --min-count >= 1; --seed >= 0")
    return options


def main() -> None:
    options = parse_arguments()
    started = time.perf_counter()
    try:
        text = read_text(options.text)
        options.out.mkdir(parents=True, exist_ok=True)
    except UnicodeDecodeError as error:
        sys.exit(f"error: {options.text} is not a UTF-8 text: {error}")
    except (OSError, ImportError) as error:  # some systems ship Python without pydoc_data
        sys.exit(f"error: {error}")
    corpus = build_corpus(text, options.min_count)
    if len(corpus.words) < 20:
        sys.exit(
            f"error: the text is too small: {len(corpus.words)} words occur at least {options.min_count} times, "
            "20 are needed; take a longer text or a smaller --min-count"
        )
    pairs = count_pairs(corpus, options.window)
    print(f"{len(corpus.ids):,} words, {len(corpus.words):,} of them different; {len(pairs.count):,} pairs")
    rng = np.random.default_rng(options.seed)
    vectors, losses = train(pairs, len(corpus.words), options.dimensions, options.epochs, rng)

    unit, telling = directions(vectors), telling_words(corpus)
    shown = choose_words(corpus, telling, PYTHON_WORDS if options.text is None else [])
    allowed = telling & (corpus.counts >= 3 * options.min_count)  # vectors of rarer words are imprecise
    for word in shown:
        print(f"{corpus.words[word]:>14}: {', '.join(corpus.words[i] for i in nearest(unit, word, allowed))}")

    np.savez(options.out / "vectors.npz", words=np.array(corpus.words), vectors=vectors, counts=corpus.counts)
    draw(options.out / "vectors.png", corpus, unit, telling, shown, losses)
    print(f"loss {losses[-1]:.4f}; {time.perf_counter() - started:.0f} s; see {options.out / 'vectors.png'}")


if __name__ == "__main__":
    main()
