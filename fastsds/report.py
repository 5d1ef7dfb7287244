"""What runs say: the tables of comparisons, and `fastsds report RUN...`, which draws runs."""

import argparse
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from fastsds import figures
from fastsds.config import ConfigError, Recipe
from fastsds.data.tasks import LOADERS as TASKS
from fastsds.evaluation.compare import Difference, shown
from fastsds.history import read_runs

PAPER = "arXiv 2307.09233, as far as its settings can be told from secondary sources"
SPLIT_NAMES = {"seen": "seen", "dev": "held out (dev)", "test": "held out"}
TITLES = {
    "swap": "swap", "swap_object": "object swap", "swap_colour": "colour swap", "swap_shape": "shape swap",
    "reading": "teacher's reading of h_w(f(x))",
}  # fmt: skip


# -- words -------------------------------------------------------------------------------------------------------------


def settings_line(recipe: Recipe, latent: tuple[int, int, int], image_size: int, teacher: str) -> str:
    """One line: which settings differ from the paper's, ours first, the paper's in brackets."""
    loss, data, elements = recipe.loss, recipe.data, latent[0] * latent[1] * latent[2]
    span = f"t in [{loss.t[0]:g}, {loss.t[1]:g}] T" if loss.t else f"log SNR in {list(loss.log_snr)}"
    weight = (
        "lambda set by the gradients' ratio" if loss.lambda_ == "auto"
        else f"lambda {loss.lambda_:g} of the element mean = {loss.lambda_ / elements:.3g} of the summed norm"
    )  # fmt: skip
    gradient = {
        "sds": "without the UNet's Jacobian", "amortised": "to a bank's targets", "full": "through the UNet",
        "latents": "to the real latents",
    }  # fmt: skip
    facts = (
        (recipe.student.tune != "layernorm", "all parameters train (LayerNorm's and h_w)"),
        (
            (loss.gradient, loss.weighting) != ("full", "uniform"),
            f"gradient {gradient[loss.gradient]}, weight {loss.weighting} (through the UNet, uniform)",
        ),
        (loss.t != (0.0, 1.0), f"{span} (all t)"),
        (True, f"{weight} (0.001)"),
        (True, f"{data.accumulation} x {data.batch} pairs a step, lr {recipe.optimizer.lr:g} (32, 5e-05)"),
        (True, f"images {image_size}x{image_size}, latents {latent[0]}x{latent[1]}x{latent[2]} (224x224, 4x64x64)"),
        (True, f"teacher {teacher} (Stable Diffusion v1), data {data.source} (MS-COCO)"),
    )
    return f"Not the paper's settings ({PAPER}; in brackets): " + "; ".join(text for differs, text in facts if differs)


# -- tables ------------------------------------------------------------------------------------------------------------

Key = tuple[str, str]  # suite, metric
Table = tuple[list[str], list[list[str]]]


def percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def mean_and_deviation(values: list[float | None]) -> str:
    """ "61.2 +- 3.0" over seeds (the sample's deviation), "61.2" for one, "-" where there is none."""
    found = [v for v in values if v is not None]
    if not found:
        return "-"
    return percent(np.mean(found)) + (f" +- {np.std(found, ddof=1):.1f}" if len(found) > 1 else "")


class Grid:
    """Metrics as columns: those of the world's splits are one column, and each split has rows of its own.

    Args: headline: what is shown, in order. names: headings of what stands before the metrics in a row.
    """

    def __init__(self, headline: Sequence[Key], names: tuple[str, ...]):
        places = {key: _split(key) for key in headline}
        self.keys = {(split, key[0], name): key for key, (split, name) in places.items()}
        self.splits = list(dict.fromkeys(split for split, _, _ in self.keys))
        self.columns = list(dict.fromkeys((suite, name) for _, suite, name in self.keys))
        several = len({suite for suite, _ in self.columns}) > 1
        titles = [f"{suite} {TITLES.get(name, name)}" if several else TITLES.get(name, name) for suite, name in self.columns]
        self.header = [*[_splits_title(headline)] * (self.splits != [""]), *names, *titles]

    def rows(self, lines: Iterable[tuple[tuple[str, ...], Mapping[Key, str]]]) -> list[list[str]]:
        """A row for each split and line: its names, then what it has of each column."""
        lines, found = list(lines), []
        for split in self.splits:
            for names, cells in lines:
                row = [cells.get(self.keys.get((split, *column)), "-") for column in self.columns]
                if set(row) != {"-"}:
                    found.append([*[self._called(split)] * (self.splits != [""]), *names, *row])
        return found

    def _called(self, split: str) -> str:
        return _split_name(split, next(suite for of, suite, _ in self.keys if of == split))


def means(seeds: Sequence[Mapping[Key, float]]) -> dict[Key, str]:
    """The cells of a line: mean and deviation over its seeds."""
    keys = dict.fromkeys(key for metrics in seeds for key in metrics)
    return {key: mean_and_deviation([metrics.get(key) for metrics in seeds]) for key in keys}


def scores_table(
    lines: Sequence[tuple[tuple[str, ...], Mapping[Key, str]]], headline: Sequence[Key], names: tuple[str, ...],
    chance: Mapping[Key, float],
) -> Table:  # fmt: skip
    """The main table, of cells as `means` gives them; its last row is what random scores reach, in percent."""
    grid = Grid(headline, names)
    by_column = {(key[0], _split(key)[1]): percent(value) for key, value in chance.items()}
    row = [*["chance"], *[""] * (len(grid.header) - len(grid.columns) - 1), *(by_column.get(c, "-") for c in grid.columns)]
    return grid.header, [*grid.rows(lines), row]


def intervals_table(
    lines: Sequence[tuple[tuple[str, ...], Mapping[Key, Difference]]], headline: Sequence[Key], names: tuple[str, ...]
) -> Table:
    """Paired differences in points with their 95 % intervals: "+1.5 (-2.1 to +5.0)"."""
    grid = Grid(headline, names)
    return grid.header, grid.rows((of, {key: interval(d) for key, d in found.items()}) for of, found in lines)


def claims_table(
    lines: Sequence[tuple[tuple[str, ...], Key, Difference, float]], names: tuple[str, ...]
) -> Table:
    """What is tested, one a row: the difference with its 95 % interval and p, and Holm's p over all rows."""
    suites, splits = ({place(key) for _, key, _, _ in lines} for place in (lambda k: k[0], lambda k: _split(k)[0]))
    rows = []
    for of, key, difference, adjusted in lines:
        split, name = _split(key)
        where = [*[key[0]] * (len(suites) > 1), *[_split_name(split, key[0])] * (splits != {""})]
        rows.append([*of, *where, TITLES.get(name, name), str(difference), shown(adjusted).removeprefix("= ")])
    where = [*["suite"] * (len(suites) > 1), *[_splits_title([key for _, key, _, _ in lines])] * (splits != {""})]
    return [*names, *where, "score", "points", "Holm p"], rows


def interval(d: Difference) -> str:
    """ "+1.5 (-2.1 to +5.0)"."""
    points, low, high = (round(x, 1) + 0.0 for x in (d.points, d.low, d.high))  # no -0.0
    return f"{points:+.1f} ({low:+.1f} to {high:+.1f})"


def _split(key: Key) -> tuple[str, str]:
    """A metric's split, of a task or of the world's suites ("" elsewhere), and its name there."""
    split, _, name = key[1].partition("/")
    return (split, name) if split in SPLIT_NAMES or key[0] in TASKS else ("", key[1])


def _split_name(split: str, suite: str) -> str:
    return split if suite in TASKS else SPLIT_NAMES.get(split, "")


def _splits_title(keys: Iterable[Key]) -> str:
    return "split" if any(suite in TASKS for suite, _ in keys) else "combinations"


# -- runs --------------------------------------------------------------------------------------------------------------


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="fastsds report", description="Draw runs: curves, residuals, evaluations.")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="the output folder of a run; several are drawn together")
    parser.add_argument("--out", default="report", metavar="DIR", help="where the PNG files go (default: report)")
    args = parser.parse_args(argv)
    runs, out = read_runs(args.runs), Path(args.out)
    if not any(run.train or run.evaluations for run in runs):
        raise ConfigError(f"{', '.join(args.runs)}: nothing to draw yet")
    try:
        out.mkdir(parents=True, exist_ok=True)
        written = [path for name, draw in figures.OF_RUNS.items() if (path := draw(out / name, runs))]
    except OSError as error:
        raise ConfigError(f"--out: {error}") from error
    print("\n".join(map(str, written)))
    return 0
