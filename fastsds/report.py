"""What a comparison says: tables as text and as markdown, the picture, and where it all came from."""

import importlib.metadata
import os
import platform
import re
import subprocess
import textwrap
from pathlib import Path

import numpy as np

import fastsds
from fastsds.config import Recipe
from fastsds.evaluation.winoground import CHANCE

PACKAGES = ("torch", "open_clip_torch", "diffusers", "transformers", "numpy")
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


def provenance() -> dict:
    """Commit, versions and machine: what a number needs beside it."""
    root = Path(fastsds.__file__).resolve().parents[1]
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40"]
    git = None
    if (root / ".git").exists():  # not whatever repository an installed package happens to lie in
        try:
            git = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            git = None
    versions = {"fastsds": fastsds.__version__, "python": platform.python_version()}
    versions |= {name: importlib.metadata.version(name) for name in PACKAGES}
    return {"commit": git or "unknown", "versions": versions, "machine": machine()}


def machine() -> str:
    """One line: processor, cores this process may use, memory, system."""
    try:
        name = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
        gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
        memory = f", {gib:.0f} GiB"
    except (OSError, ValueError):
        name, memory = None, ""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{name[1].strip() if name else platform.machine()}, {cores} cores{memory}, {platform.system()}"


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


def as_text(header: list[str], rows: list[list[str]], widest: int = 12) -> str:
    """A table for the terminal: headings wrapped, words to the left, numbers to the right."""
    columns = range(len(header))
    body = [[row[c] for row in rows] for c in columns]
    widths = [max(map(len, [*body[c], *header[c].split()])) for c in columns]
    titles = [textwrap.wrap(header[c], max(widths[c], widest)) for c in columns]
    widths = [max(widths[c], *map(len, titles[c])) for c in columns]
    depth = max(map(len, titles))
    words = [any(re.search(r"[a-z]{2}", cell) for cell in body[c]) for c in columns]

    def line(cells):
        placed = (x.ljust(w) if word else x.rjust(w) for x, w, word in zip(cells, widths, words, strict=True))
        return "  ".join(placed).rstrip()

    head = [line([([""] * (depth - len(t)) + t)[k] for t in titles]) for k in range(depth)]
    return "\n".join([*head, "-" * (sum(widths) + 2 * (len(widths) - 1)), *map(line, rows)])


def as_markdown(header: list[str], rows: list[list[str]]) -> str:
    cells = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(row).replace("+-", "±") + " |" for row in cells)


# -- the picture -------------------------------------------------------------------------------------------------------


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
