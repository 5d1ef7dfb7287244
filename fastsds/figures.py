"""Everything that is drawn, as PNG files: the demo's picture, and the runs that `fastsds report` reads.

A function of runs returns the path it wrote, or None where no run has what it draws.
"""

import math
import textwrap
from pathlib import Path

import numpy as np

from fastsds.evaluation.winoground import CHANCE
from fastsds.history import Run

KEYS = (
    "loss", "clip", "sds", "rho", "cosine", "task", "text", "visual", "p_student", "p_teacher", "weight", "grad_norm", "lr",
    "images_per_s",
)  # fmt: skip
WIDE = ("rho", "grad_norm")  # over orders of magnitude
COLUMNS = 4
RESAMPLES = 2000  # of an interval that is drawn


# -- runs --------------------------------------------------------------------------------------------------------------


def curves(path: Path, runs: list[Run]) -> Path | None:
    """What a run logged, by step."""
    keys = [key for key in KEYS if any(run.curve(key)[0] for run in runs)]
    if not keys:
        return None
    figure, panels = _grid(len(keys))
    for key, axes in zip(keys, panels, strict=True):
        for number, run in enumerate(runs):
            steps, values = run.curve(key)
            axes.plot(steps, values, color=f"C{number}", label=run.name, linewidth=1)
        axes.set(title=key, xlabel="step", yscale="log" if key in WIDE else "linear")
    return _save(figure, panels, path)


def residuals(path: Path, runs: list[Run]) -> Path | None:
    """The residual by noise band, in the first and in the last log interval that has it."""
    if not any(run.bands() for run in runs):
        return None
    figure, panels = _grid(2)
    for what, axes in zip(("residual", "weighted"), panels, strict=True):
        for number, run in enumerate(runs):
            for style, row in zip(("--", "-"), [run.bands()[0], run.bands()[-1]] if run.bands() else (), strict=False):
                bands = sorted((edges, values[what]) for edges, values in row["bands"].items())
                centres = [(low + high) / 2 for (low, high), _ in bands]
                name = f"{run.name}, step {row['step']}"
                axes.plot(centres, [v for _, v in bands], style, marker=".", color=f"C{number}", label=name, linewidth=1)
    panels[0].set(title="mean (eps_hat - eps)^2", xlabel="log SNR")
    panels[1].set(title="the same times its weight: L_SDS", xlabel="log SNR")
    return _save(figure, panels, path)


def evaluations(path: Path, runs: list[Run]) -> Path | None:
    """Each metric by step, with 95 % bootstrap intervals where its items were kept; splits beside each other."""
    scores = [{row["step"]: run.scores(row, resamples=RESAMPLES) for row in run.evaluations} for run in runs]
    found = dict.fromkeys(key for of in scores for row in of.values() for key in row)
    metrics, splits = (list(dict.fromkeys(key.rpartition("/")[k] for key in found)) for k in (2, 0))
    if not metrics:
        return None
    figure, panels = _grid(len(metrics))
    for metric, axes in zip(metrics, panels, strict=True):
        for number, (run, of) in enumerate(zip(runs, scores, strict=True)):
            for split, style in zip(splits, ("-", ":", "--", "-."), strict=False):
                points = [(step, row[key]) for step, row in of.items() if (key := f"{split}/{metric}") in row]
                if not points:
                    continue
                steps, values = zip(*points, strict=True)
                means = np.array([score.value for score in values])
                low, high = (
                    np.array([s.value if s.low is None else getattr(s, end) for s in values]) for end in ("low", "high")
                )
                label = f"{run.name}, {split}"
                axes.plot(steps, means, linestyle=style, marker=".", color=f"C{number}", label=label, linewidth=1)
                axes.fill_between(steps, low, high, color=f"C{number}", alpha=0.12, linewidth=0)
        known = {s.chance for of in scores for row in of.values() for key, s in row.items() if key.rpartition("/")[2] == metric}
        for chance in known - {None}:
            axes.axhline(chance, color="0.7", linewidth=0.8)
        axes.set(title=metric, xlabel="step", ylabel="%")
    return _save(figure, panels, path)


OF_RUNS = {"curves.png": curves, "residuals.png": residuals, "evaluations.png": evaluations}


def _grid(count: int):
    """A figure of so many panels, and the panels."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(COLUMNS, count)
    rows = math.ceil(count / columns)
    figure = Figure(figsize=(3.6 * columns, 2.9 * rows + 0.6), layout="constrained")
    FigureCanvasAgg(figure)
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes in panels[count:]:
        axes.remove()
    return figure, panels[:count]


def _save(figure, panels, path: Path) -> Path:
    labels = {}
    for axes in panels:
        axes.grid(alpha=0.3)
        labels |= {label: handle for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(labels.values(), labels.keys(), loc="outside lower center", ncols=3, fontsize=8)
    figure.savefig(path, dpi=110)
    return path


# -- experiments -------------------------------------------------------------------------------------------------------


def sample_efficiency(path: Path, panels: dict[str, dict[str, list[tuple[float, float, float]]]]) -> Path:
    """A metric by how many different pairs were seen, a panel each; an arm's start, at 0, is a line.

    Args: panels: title -> label -> [(pairs, mean, deviation over seeds)].
    """
    figure, axes_of = _grid(len(panels))
    labels = list(dict.fromkeys(label for lines in panels.values() for label in lines))
    for (title, lines), axes in zip(panels.items(), axes_of, strict=True):
        for label, points in lines.items():
            pairs, means, deviations = zip(*points, strict=True)
            colour = f"C{labels.index(label)}"
            if pairs == (0,):
                axes.axhline(means[0], color=colour, linewidth=1, linestyle=":", label=label)
            else:
                axes.errorbar(pairs, means, deviations, marker=".", linewidth=1, capsize=2, color=colour, label=label)
        axes.set(title=title, xlabel="different pairs seen", ylabel="%", xscale="log")
    return _save(figure, axes_of, path)


# -- the demo ----------------------------------------------------------------------------------------------------------


def picture(path: Path, shown: list[dict], curves: dict[str, dict], title: str) -> None:
    """Swap items with what each student chose, what h_w(f(x)) decodes to, and the curves.

    Args:
        shown: items: {"kind", "images" uint8 [2, 3, S, S], "decoded" the same or None, "captions" [2],
            "choices" {arm: (bool, bool)}: whether it gave image i its own caption}.
        curves: arm -> {"loss": [(step, L_CLIP)], "<split> ...": [(step, percent)]}.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    decoded = any(item["decoded"] is not None for item in shown)
    rows = [(name, i) for i in range(2) for name in (("images", "decoded") if decoded else ("images",))]
    figure = Figure(figsize=(2.1 * len(shown), 2.3 * len(rows) + 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    top, bottom = figure.subfigures(2, 1, height_ratios=(2.2 * len(rows), 3.4))
    figure.suptitle(title, fontsize=10)
    grid = top.subplots(len(rows), len(shown), squeeze=False)
    for column, item in enumerate(shown):
        for row, (name, i) in enumerate(rows):
            axes = grid[row, column]
            axes.set_xticks([])
            axes.set_yticks([])
            if column == 0:
                axes.set_ylabel({"images": f"image {i}", "decoded": "h_w(f(x)), decoded"}[name], fontsize=8)
            if item[name] is None:
                axes.axis("off")
                continue
            axes.imshow(np.asarray(item[name][i]).transpose(1, 2, 0))
            if name == "images":
                kind = f"{item['kind']} swap\n" if row == 0 else ""
                axes.set_title(kind + "\n".join(textwrap.wrap(item["captions"][i], 26)), fontsize=7)
                for line, (arm, right) in enumerate(item["choices"].items()):
                    mark, colour = ("✓", "tab:green") if right[i] else ("✗", "tab:red")
                    place = {"ha": "center", "va": "top", "transform": axes.transAxes, "fontsize": 7, "color": colour}
                    axes.text(0.5, -0.03 - 0.08 * line, f"{arm} {mark}", **place)
    left, right = bottom.subplots(1, 2)
    for number, (arm, lines) in enumerate(curves.items()):
        for name, points in lines.items():
            held_out = not name.startswith("seen")
            axes, style = (left, "-") if name == "loss" else (right, "-" if held_out else ":")
            steps, values = zip(*points, strict=True) if points else ((), ())
            axes.plot(steps, values, style, color=f"C{number}", label=arm if name == "loss" else f"{arm}, {name}")
    left.set(title="training: contrastive loss", xlabel="step", ylabel="L_CLIP")
    right.set(title="development items: object-swap accuracy", xlabel="step", ylabel="%", ylim=(0, 102))
    right.axhline(CHANCE["swap"], color="0.7", linewidth=0.8)
    for axes in (left, right):
        axes.legend(fontsize=7)
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
