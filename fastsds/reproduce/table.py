"""What an experiment says: scores over seeds, paired differences with intervals, what of zero-shot is kept; as tables and JSON.

    scores         mean and deviation over seeds
    differences    of an arm and those it is `against`, on the same seeds and items (evaluation/compare.py). The claims of all
                   comparisons are one family for Holm's correction
    zero-shot      an arm minus its own start. lost: the mean is below minus the bound; not excluded: the mean is not, but the
                   one-sided 95 % interval reaches below; else kept
"""

from functools import cached_property
from typing import NamedTuple

import numpy as np

from fastsds.evaluation.compare import Difference, difference, same_items
from fastsds.evaluation.results import Result
from fastsds.evaluation.statistics import holm, two_level_bootstrap
from fastsds.evaluation.winoground import CHANCE
from fastsds.progress import watched
from fastsds.report import SPLIT_NAMES, Key, Table, claims_table, intervals_table, means, scores_table
from fastsds.reproduce.experiment import readings
from fastsds.reproduce.file import ALL, START
from fastsds.reproduce.runs import Cell, Plan


class Line(NamedTuple):
    """The cells of all seeds: one row of the table."""

    backbone: str
    pairs: float | str
    arm: str


class Compared(NamedTuple):
    """One difference of two lines. p_holm: None outside the family."""

    line: Line
    other: Line
    key: Key
    difference: Difference
    p_holm: float | None


class Change(NamedTuple):
    """An arm minus its start in points; at_least: the low end of the one-sided 95 % interval."""

    points: float
    at_least: float
    bound: float

    @property
    def verdict(self) -> str:
        if self.points < -self.bound:
            return "lost"
        return "kept" if self.at_least >= -self.bound else "not excluded"

    def __str__(self) -> str:
        points, low = (round(x, 1) + 0.0 for x in self[:2])  # no -0.0
        return f"{points:+.1f} (95 % above {low:+.1f}): {self.verdict}"


class Findings:
    """All that a finished plan's folders say. Nothing but files is read, and no data."""

    def __init__(self, plan: Plan):
        self.plan, self.said, self.kept = plan, plan.experiment.said, {}
        self.firsts: dict[str, Result] = {}
        self.cells: dict[Line, list[Cell]] = {}
        for cell in [*dict.fromkeys(plan.starts.values()), *plan.runs]:
            self.cells.setdefault(Line(*cell[:3]), []).append(cell)

    @cached_property
    def lines(self) -> list[Line]:
        """In the file's order: of each backbone its starts, then by pairs and arm."""
        arms, pairs = list(self.said.arms), list(self.said.pairs)
        place = {name: k for k, name in enumerate(self.said.backbones)}

        def order(line: Line):
            trained = line.arm in arms
            return place[line.backbone], trained, pairs.index(line.pairs) if trained else 0, trained and arms.index(line.arm)

        return sorted(self.cells, key=order)

    @cached_property
    def headline(self) -> list[Key]:
        return [(suite, metric) for suite in self.said.evaluation for metric in self._columns(suite)]

    @cached_property
    def compared(self) -> list[Compared]:
        """Every line and those it is against, by every metric of the headline and the claims."""
        claims = [(suite, metric) for suite, asked in self.said.evaluation.items() for metric in asked.claims]
        keys = [key for key in dict.fromkeys([*self.headline, *claims]) if key[1] in self._any(key[0]).measures]
        asked = [
            (line, arm, key) for line in self.lines if line.arm in self.said.arms
            for arm in self.said.arms[line.arm].against for key in keys
        ]  # fmt: skip
        found = []
        for line, arm, key in watched(asked, "comparing"):
            of = [self.plan.starts[c] if arm == START else c._replace(arm=arm) for c in self.cells[line]]
            found.append(Compared(line, Line(*of[0][:3]), key, self._difference(self.cells[line], of, key), None))
        family = [k for k, one in enumerate(found) if one.key in claims]
        for k, adjusted in zip(family, holm([found[k].difference.p for k in family]), strict=True):
            found[k] = found[k]._replace(p_holm=adjusted)
        return found

    @cached_property
    def zero_shot(self) -> dict[tuple[Line, Key], Change]:
        """By trained line, and by metric that must not be lost."""
        keys = [(suite, metric) for suite, asked in self.said.evaluation.items() for metric in asked.zero_shot]
        trained = [line for line in self.lines if line.arm in self.said.arms]
        return {(line, key): self._change(self.cells[line], key) for line in trained for key in keys}

    def result(self, cell: Cell, suite: str) -> Result:
        """What was kept, its outcomes alone: the rows of a suite are held once, not of all students. Raises: ConfigError if
        they are of other items."""
        if (cell, suite) not in self.kept:
            found = self.kept[cell, suite] = self.plan.result(cell, suite)
            first = self.firsts.setdefault(suite, found)
            if found is not first:
                same_items(first, found)
                found.rows, found.measures = [], first.measures  # its outcomes were made of them when it was read
        return self.kept[cell, suite]

    def metrics(self, cell: Cell) -> dict[Key, float]:
        """All of a cell's metrics in percent, by suite and name."""
        jobs = {suite: self.plan.evaluations[cell, suite] for suite in self.said.evaluation}
        return {(suite, name): value for suite, job in jobs.items() for name, value in job.results["metrics"].items()}

    def label(self, line: Line) -> str:
        """What a table calls a line: an arm's label; of a start that one arm has to itself, whose it is."""
        arm, of = self.said.arms.get(line.arm), line.arm.removeprefix(f"{START}_")
        if arm is not None:
            return arm.label or line.arm
        return START if line.arm == START else f"{START} of {self.said.arms[of].label or of}"

    def whole(self, line: Line) -> str:
        return " ".join((*self._names(line), self.label(line)))

    # What is printed.

    def tables(self) -> list[Table]:
        """Scores and what of zero-shot is kept; differences; claims. One without rows is left out."""
        sizes = "examples" if self.plan.experiment.trains_tasks else "pairs"
        titles = (*["backbone"] * (len(self.said.backbones) > 1), *[sizes] * (len(self.said.pairs) > 1))
        kept = {key: (key[0], _zero_shot(key[1])) for _, key in self.zero_shot}
        scores = [
            (
                (*self._names(line), self.label(line)),
                means([self.metrics(cell) for cell in self.cells[line]])
                | {column: str(self.zero_shot[line, key]) for key, column in kept.items() if (line, key) in self.zero_shot},
            )
            for line in self.lines
        ]
        chance = {}
        for suite in self.said.evaluation:
            measures = self._any(suite).measures
            chance |= {(suite, name): of.chance for name, of in measures.items()}
            chance |= {(suite, name): CHANCE["text"] for name in readings(measures)}
        chance = {key: chance[key] for key in self.headline}
        found = [scores_table(scores, [*self.headline, *kept.values()], (*titles, "student"), chance)]
        matrix: dict[tuple, dict] = {}
        for one in self.compared:
            matrix.setdefault(self._of(one), {})[one.key] = one.difference
        tested = [(self._of(one), one.key, one.difference, one.p_holm) for one in self.compared if one.p_holm is not None]
        if matrix:
            columns = [key for key in self.headline if any(key in of for of in matrix.values())]
            found.append(intervals_table(list(matrix.items()), columns, (*titles, "difference")))
        if tested:
            found.append(claims_table(tested, (*titles, "claim")))
        return found

    def notes(self) -> list[str]:
        """What a reader of the tables must know, and what of zero-shot is not kept."""
        said, found = self.said, []
        seeds = {len(cells) for line, cells in self.cells.items() if line.arm in said.arms}
        found.append(
            f"{max(seeds)} seed(s): mean and deviation over seeds, in percent. Differences are paired, with 95 % intervals: "
            "two-level bootstrap (seeds, then items), widened for few seeds; with one seed over items alone. Holm's correction "
            "is over all claims."
        )
        if self.zero_shot:
            found.append(
                f"Zero-shot: an arm minus its own start; at most {said.zero_shot_bound:g} points may be lost, by the mean "
                "(else: lost) and by its one-sided 95 % interval (else: not excluded)."
            )
        for verdict in ("lost", "not excluded"):
            flagged = [(line, *key) for (line, key), change in self.zero_shot.items() if change.verdict == verdict]
            words = "; ".join(f"{self.whole(line)}, {suite} {metric}" for line, suite, metric in flagged)
            found += [f"Zero-shot, {verdict}: {words}."] * bool(flagged)
        trained = [line for line in self.lines if line.arm in said.arms]
        times = "; ".join(f"{self.whole(line)} {np.mean(self.seconds(line)):.0f}" for line in trained)
        found.append(f"Seconds of training, mean: {times}.")
        if self.plan.experiment.trains_tasks:
            runs = {line: [self.plan.runs[cell].results["seconds_in_all"] for cell in self.cells[line]] for line in trained}
            times = "; ".join(f"{self.whole(line)} {np.mean(of):.0f}" for line, of in runs.items())
            found.append(
                "Of whole runs, with their start, what CLIP is asked (targets that runs share: by the first of them) and its "
                f"adaptation: {times}."
            )
        if banks := self.plan.banks:
            times = ", ".join(f"{job.name} {job.results['seconds_in_all']:.0f}" for job in banks)
            found.append(f"Before that, once for all seeds, seconds to build, its start included: {times}.")
        return found

    def seconds(self, line: Line) -> list[float]:
        return [self.plan.runs[cell].results["seconds"] for cell in self.cells[line]]

    def plain(self) -> dict:
        """All of it as JSON's kinds."""
        lines = []
        for line in self.lines:
            seeds = []
            for cell in self.cells[line]:
                by_suite: dict[str, dict] = {}
                for (suite, name), value in self.metrics(cell).items():
                    by_suite.setdefault(suite, {})[name] = value
                run = self.plan.runs.get(cell)
                seeds.append({"seed": cell.seed, "metrics": by_suite, **({} if run is None else run.results)})
            kept = [
                {"suite": key[0], "metric": key[1], **change._asdict(), "verdict": change.verdict}
                for (of, key), change in self.zero_shot.items()
                if of == line
            ]
            lines.append({**line._asdict(), "label": self.label(line), "seeds": seeds, "zero_shot": kept})
        compared = [
            {
                **one.line._asdict(), "against": one.other.arm, "suite": one.key[0], "metric": one.key[1],
                **one.difference._asdict(), "p_holm": one.p_holm,
            }
            for one in self.compared
        ]  # fmt: skip
        banks = {job.name: job.results["seconds_in_all"] for job in self.plan.banks}
        return {"lines": lines, "differences": compared, "banks": banks}

    def curves(self) -> dict[str, dict[str, list[tuple[float, float, float]]]]:
        """Sample efficiency: "backbone metric" -> label -> (different pairs seen, mean, deviation), by pairs.

        A start has one point, at 0. The metrics are those claimed, or else each suite's first.
        """
        asked = {suite: of.claims or self._columns(suite)[:1] for suite, of in self.said.evaluation.items()}
        keys = [(suite, metric) for suite, metrics in asked.items() for metric in metrics]
        found: dict[str, dict] = {}
        for line in self.lines:
            seen = [self.plan.runs[c].results["pairs"] if c in self.plan.runs else 0 for c in self.cells[line]]
            for key in keys:
                values = [metrics[key] for metrics in map(self.metrics, self.cells[line]) if key in metrics]
                if not values:  # a start has no reading
                    continue
                names = [*[line.backbone] * (len(self.said.backbones) > 1), *[key[0]] * (len(asked) > 1), key[1]]
                panel = found.setdefault(" ".join(names), {})
                deviation = float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
                panel.setdefault(self.label(line), []).append((float(np.mean(seen)), float(np.mean(values)), deviation))
        return {panel: {label: sorted(points) for label, points in of.items()} for panel, of in found.items()}

    # How.

    def _any(self, suite: str) -> Result:
        return self.result(self.cells[self.lines[0]][0], suite)

    def _columns(self, suite: str) -> tuple[str, ...]:
        return self.said.evaluation[suite].headline or self._any(suite).headline

    def _names(self, line: Line) -> tuple[str, ...]:
        pairs = "-" if line.arm not in self.said.arms else line.pairs if line.pairs == ALL else f"{line.pairs:,}"
        if isinstance(line.pairs, float):
            pairs = f"{100 * line.pairs:g} %"
        return (*[line.backbone] * (len(self.said.backbones) > 1), *[pairs] * (len(self.said.pairs) > 1))

    def _of(self, one: Compared) -> tuple[str, ...]:
        return (*self._names(one.line), f"{self.label(one.line)} against {self.label(one.other)}")

    def _arms(self, a: list[Cell], b: list[Cell], suite: str) -> tuple[list[Result], list[Result]]:
        """Their results, a seed each."""
        return [self.result(cell, suite) for cell in a], [self.result(cell, suite) for cell in b]

    def _difference(self, a: list[Cell], b: list[Cell], key: Key) -> Difference:
        of, (left, right) = self._any(key[0]).measures[key[1]], self._arms(a, b, key[0])
        return difference([r.outcomes[of.outcome] for r in left], [r.outcomes[of.outcome] for r in right], of)

    def _change(self, cells: list[Cell], key: Key) -> Change:
        of, arms = self._any(key[0]).measures[key[1]], self._arms(cells, [self.plan.starts[cell] for cell in cells], key[0])
        counted = of.groups >= 0
        a, b = ([100 * np.asarray(result.outcomes[of.outcome], np.float64)[counted] for result in arm] for arm in arms)
        points, low, _ = two_level_bootstrap(a, b, level=1 - 2 * 0.05, weights=of.weights()[counted])
        return Change(points, low, self.said.zero_shot_bound)


def _zero_shot(metric: str) -> str:
    """The column's name, in the metric's split."""
    split, _, name = metric.partition("/")
    return f"{split}/zero-shot {name}" if split in SPLIT_NAMES else f"zero-shot {metric}"
