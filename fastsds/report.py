"""What runs say: tables of a comparison as text and as markdown, and `fastsds report RUN...`, which draws runs."""

import argparse
from pathlib import Path

import numpy as np

from fastsds import figures
from fastsds.config import ConfigError, Recipe
from fastsds.evaluation.winoground import CHANCE
from fastsds.history import read_runs
from fastsds.tables import as_markdown as as_markdown
from fastsds.tables import as_text as as_text

PAPER = "arXiv 2307.09233, as far as its settings can be told from secondary sources"
SPLIT_NAMES = {"seen": "seen", "dev": "held out (dev)", "test": "held out"}
COLUMNS = ("text", "image", "group", "swap_object", "swap_colour", "swap_shape", "retrieval", "reading")
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
    gradient = {"sds": "without the UNet's Jacobian", "full": "through the UNet", "latents": "to the real latents"}
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


def percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def mean_and_deviation(values: list[float | None]) -> str:
    """ "61.2 +- 3.0" over seeds (the sample's deviation), "61.2" for one, "-" where there is none."""
    found = [v for v in values if v is not None]
    if not found:
        return "-"
    return percent(np.mean(found)) + (f" +- {np.std(found, ddof=1):.1f}" if len(found) > 1 else "")


def scores_table(arms: dict[str, list[dict]], splits: tuple[str, ...]) -> tuple[list[str], list[list[str]]]:
    """The main table: a row for each split and arm. arms: label -> the metrics of each of its seeds, in percent."""
    header = ["combinations", "student", *(TITLES.get(c, c) for c in COLUMNS)]
    rows = [
        [SPLIT_NAMES[split], label, *(mean_and_deviation([m.get(f"{split}/{c}") for m in seeds]) for c in COLUMNS)]
        for split in splits
        for label, seeds in arms.items()
    ]
    by_column = {"reading": CHANCE["text"], "retrieval": 1.0}
    chance = [percent(by_column.get(c, CHANCE.get(c.split("_")[0]))) for c in COLUMNS]
    return header, [*rows, ["chance", "", *chance]]


def differences_table(differences: list[dict]) -> tuple[list[str], list[list[str]]]:
    """Paired differences in points: {"of", "split", "metric", "difference", "low", "high", "p", "p_holm"}."""
    with_p = any(d.get("p") is not None for d in differences)
    header = ["difference", "combinations", "score", "points", "95 % interval", *(["McNemar p", "Holm p"] if with_p else [])]
    rows = []
    for d in differences:
        row = [d["of"], SPLIT_NAMES[d["split"]], TITLES.get(d["metric"], d["metric"]), f"{d['difference']:+.1f}"]
        row.append(f"[{d['low']:+.1f}, {d['high']:+.1f}]")
        rows.append(row + ([_p(d.get("p")), _p(d.get("p_holm"))] if with_p else []))
    return header, rows


def verdict(d: dict) -> str:
    """Whether a difference is above zero by more than its interval, in one sentence."""
    yes = "yes" if d["low"] > 0 else "no"
    what = f"{TITLES.get(d['metric'], d['metric'])}, {SPLIT_NAMES[d['split']]}"
    return f"{d['of']} above 0 on {what}: {yes}, {d['difference']:+.1f} [{d['low']:+.1f}, {d['high']:+.1f}]."


def _p(value: float | None) -> str:
    return "" if value is None else f"{value:.1e}" if value < 1e-3 else f"{value:.3f}"


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
