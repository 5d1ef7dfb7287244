"""What stopping early trades: UNet passes saved against choices changed, at several risks; and draws against accuracy.

    python -m fastsds.evaluation.stopping FOLDER --teacher world --suite world_test --items 167

asks all draws of every pair of a suite's items once for each number of draws, and replays `elimination.py` on what was
answered, which is what `DiffusionScorer` does with `stop`. Writes FOLDER/rows.jsonl and FOLDER/table.md.
"""

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from fastsds.config import ConfigError
from fastsds.evaluation.diffusion_score import DiffusionScorer, distinct
from fastsds.evaluation.elimination import BOTH, FEWEST, Race, run, stages
from fastsds.evaluation.suite import Composed, Item, Suite, load_suite
from fastsds.progress import watched
from fastsds.provenance import provenance

STEPS = (1, 2, 4, 8, 16, 32)
CORRECTED = 8  # draws at which the correction is tried as well
FIELDS = ("draws", "rule", "value", "chosen", "passes", "choices", "changed", "saved")
RISKS = (0.5, 0.2, 0.1, 0.05, 0.02, 0.01, 0.001)
CHUNK = 32  # items a line of progress


def replay(
    items: Sequence[Item], terms: Sequence[np.ndarray], risk: float | None, chosen: Sequence[str] = BOTH
) -> tuple[list[np.ndarray], int]:
    """Race over terms that are there already, equal candidates once. Args: chosen: which of an item's choices count.

    Shapes: terms [draws, captions, images] each. Returns: scores, [captions, images] each; and passes.
    """
    found, passes = [], 0
    for item, x in zip(items, terms, strict=True):
        (_, c), (_, i) = distinct(item.captions), distinct(item.images)
        own = np.ix_(range(len(x)), [c.index(k) for k in range(max(c) + 1)], [i.index(k) for k in range(max(i) + 1)])
        x = x[own]
        race = Race(*x.shape[1:], len(x), tuple(of for of in item.chosen if of in chosen), risk)
        run([race], lambda first, last, race=race, x=x: race.x.__setitem__(slice(first, last), x[first:last]))
        found.append(race.scores()[c][:, i])
        passes += int(race.made.sum())
    return found, passes


def changed(items: Sequence[Item], found: Sequence[np.ndarray], full: Sequence[np.ndarray], chosen=BOTH) -> tuple[int, int]:
    """How many choices end otherwise in found than in full, and how many there are. Shapes: [captions, images] each."""
    differ = choices = 0
    for item, a, b in zip(items, found, full, strict=True):
        for axis, of in enumerate(BOTH):
            if of in item.chosen and of in chosen and a.shape[axis] > 1:
                first = a == a.max(axis=axis, keepdims=True), b == b.max(axis=axis, keepdims=True)
                differ += int((first[0] != first[1]).any(axis=axis).sum())
                choices += a.shape[1 - axis]
    return differ, choices


def accuracy(suite: Suite, scores: list[np.ndarray]) -> dict[str, float]:
    """A suite's headline, of its items, in percent."""
    outcomes, start = {}, 0
    for part in _parts(suite):
        outcomes |= part.outcomes(scores[start : start + len(part.items)])
        start += len(part.items)
    measures = {name: suite.measures[name] for name in suite.headline}
    return {name: metric.value(outcomes[metric.outcome]) for name, metric in measures.items() if metric.outcome in outcomes}


def rows_of(suite: Suite, items: Sequence[Item], terms: Sequence[np.ndarray]) -> list[dict]:
    """All draws, the first few for everyone, and elimination: what each pays, and what it changes."""
    draws, rows = len(terms[0]), []
    full, most = replay(items, terms, None)
    kinds = [BOTH] + [(of,) for of in BOTH if any(len(item.chosen) == 2 for item in items)]
    rules = [("all", None)] + [("first", n) for n in stages(draws)[:-1]] + [("stop", risk) for risk in RISKS] * (draws > FEWEST)
    for chosen in kinds:
        for rule, value in rules:
            found, passes = full, most
            if rule == "stop":
                found, passes = replay(items, terms, value, chosen)
            elif rule == "first":
                found, passes = [x[:value].mean(axis=0) for x in terms], most * value // draws
            differ, choices = changed(items, found, full, chosen)
            row = dict(zip(FIELDS, (draws, rule, value, chosen, passes, choices, differ, 1 - passes / most), strict=True))
            rows.append(row | (accuracy(suite, found) if chosen == BOTH else {}))
    return rows


def table(rows: list[dict], about: str) -> str:
    """A page of Markdown."""
    names = [name for name in rows[0] if name not in FIELDS]
    own = [row for row in rows if tuple(row["chosen"]) == BOTH]
    text = f"{about}\n\n| draws | passes | {' | '.join(names)} |\n|{'---|' * (2 + len(names))}\n"
    for row in own:
        if row["rule"] in ("all", "corrected"):
            draws = f"{row['draws']}" + ", less the error without a caption" * (row["rule"] == "corrected")
            text += f"| {draws} | {row['passes']:,} | {' | '.join(f'{row[name]:.2f}' for name in names)} |\n"
    kinds = list(dict.fromkeys(tuple(row["chosen"]) for row in rows))
    heads = ["all choices", *(f"{of} alone" for (of,) in kinds[1:])]
    text += "\n| draws | rule |" + "".join(f" {of}: passes saved | changed |" for of in heads)
    text += f" {' | '.join(names)} |\n|{'---|' * (2 + 2 * len(kinds) + len(names))}\n"
    for row in own:
        if row["rule"] in ("all", "corrected"):
            base = row
            continue
        rule = f"stop {row['value']:g}" if row["rule"] == "stop" else f"the first {row['value']} for all"
        cells = [f"{row['draws']}", rule]
        for kind in kinds:
            of = next(r for r in rows if tuple(r["chosen"]) == kind and all(r[k] == row[k] for k in ("draws", "rule", "value")))
            cells += [f"{100 * of['saved']:.1f} %", f"{of['changed']} of {of['choices']:,}"]
        cells += [f"{row[name] - base[name]:+.2f}" for name in names]
        text += f"| {' | '.join(cells)} |\n"
    return text


def measure(folder: Path, teacher, suite: Suite, command: str) -> list[dict]:
    """Ask, replay and write, anew after each number of draws. Raises: ConfigError for a suite without items."""
    items = [item for part in _parts(suite) for item in part.items]
    if not items:
        raise ConfigError(f"suite {suite.name}: a gallery, of which nothing is dropped; expected one of items")
    rows, source = [], provenance()
    folder.mkdir(parents=True, exist_ok=True)
    for steps in STEPS:
        scorer = DiffusionScorer(teacher, steps=steps)
        terms = _terms(scorer, items)
        if steps == CORRECTED:
            rows.append(_corrected(teacher, suite, items, terms))
        rows += rows_of(suite, items, terms)
        settings = {name: value for name, value in scorer.settings.items() if name != "steps"}
        about = (
            f"`{command}`, commit {source['commit']}, torch {source['versions']['torch']}, {source['machine']}; {len(items):,} "
            f"items of {suite.name}; settings {json.dumps(settings)}."
        )
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        (folder / "table.md").write_text(table(rows, about), encoding="utf-8")
        print(f"{steps} draws: {scorer.passes:,} passes", flush=True)
    return rows


def _terms(scorer: DiffusionScorer, items: list[Item]) -> list[np.ndarray]:
    parts = [items[k : k + CHUNK] for k in range(0, len(items), CHUNK)]
    return [x for part in watched(parts, f"{scorer.steps} draws, {CHUNK} items each") for x in scorer.terms(part)]


def _corrected(teacher, suite: Suite, items: list[Item], terms: list[np.ndarray]) -> dict:
    """A row of the same draws, less the error without a caption: what `correction="unconditional"` scores."""
    scorer = DiffusionScorer(teacher, steps=len(terms[0]))
    bare = _terms(scorer, [replace(item, captions=("",)) for item in items])
    found = [(x - y).mean(axis=0) for x, y in zip(terms, bare, strict=True)]
    full, most = replay(items, terms, None)
    differ, choices = changed(items, found, full)
    values = len(terms[0]), "corrected", None, BOTH, most + scorer.passes, choices, differ, -scorer.passes / most
    return dict(zip(FIELDS, values, strict=True)) | accuracy(suite, found)


def _parts(suite: Suite) -> list[Suite]:
    return [part for part in (suite.parts if isinstance(suite, Composed) else [suite]) if not part.gallery]


def main(argv: list[str]) -> int:
    """`python -m fastsds.evaluation.stopping FOLDER`."""
    parser = argparse.ArgumentParser(prog="python -m fastsds.evaluation.stopping", description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--teacher", default="world", help="as teacher.path of a recipe (default %(default)s)")
    parser.add_argument("--suite", default="world_test", help="default %(default)s")
    parser.add_argument("--data", help="where the suite lies")
    parser.add_argument("--items", type=int, help="its first ones alone, of each kind")
    asked = parser.parse_args(argv)
    from fastsds.engine import device
    from fastsds.teacher import Teacher

    try:
        suite = load_suite(asked.suite, asked.data, asked.items)
        measure(asked.folder, Teacher.load(asked.teacher, device()), suite, f"{parser.prog} {shlex.join(argv)}")
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
