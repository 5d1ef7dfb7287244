"""What `fastsds eval` prints of results, and of their differences from a baseline: a table, JSON, or CLIP_benchmark's shape."""

import json
from dataclasses import dataclass, field

from fastsds.evaluation.compare import Compared
from fastsds.evaluation.results import Result
from fastsds.evaluation.suite import Suite, clip_benchmark
from fastsds.tables import as_text


@dataclass
class Shown:
    """A suite's result, and beside it, of the same items, a baseline's. suite: where the data were at hand."""

    result: Result
    baseline: Result | None = None
    suite: Suite | None = None
    differences: dict[str, Compared] = field(default_factory=dict)


def ties(result: Result, metric: str) -> int | None:
    """Over how many of the items that a metric counts a comparison was of equal scores; None where the suite does not say.

    A suite's outcomes `tied`, `tied_NAME` and `tied/NAME` belong to the outcomes that begin with NAME.
    """
    of = result.measures[metric]
    names = [name for name in result.outcomes if name.startswith("tied") and of.outcome.startswith(name[5:])]
    return int(result.outcomes[max(names, key=len)][of.groups >= 0].sum()) if names else None


def table(shown: list[Shown], every: bool) -> str:
    """Tables for the terminal, a suite each, with what their columns mean for this reader."""
    parts = []
    for one in shown:
        result, baseline = one.result, one.baseline
        columns = ["metric", *(["model", "s.e.", "baseline", "s.e."] if baseline else ["value", "s.e."])]
        columns += ["n", "chance", "ties", *(["model - baseline", "Holm p"] if baseline else [])]
        rows = [_row(one, name) for name in (result.measures if every else result.headline)]
        title = f"{result.suite}: {_name(result)}" + (f" against {_name(baseline)}" if baseline else "")
        notes = dict.fromkeys([*result.about["notes"], *(baseline.about["notes"] if baseline else [])])
        parts.append("\n".join([title, "", as_text(columns, rows), *(f"note: {note}" for note in notes)]))
    family = [d for one in shown for d in one.differences.values() if d.p_holm is not None]
    if family:
        suites = ", ".join(dict.fromkeys(d.suite for d in family))
        parts.append(f"95 % intervals; Holm p: of the {len(family)} headline metrics of {suites} together")
    return "\n\n".join(parts)


def _row(one: Shown, name: str) -> list[str]:
    results = [result for result in (one.result, one.baseline) if result is not None]
    metric = one.result.measures[name]
    row = [name]
    for result in results:
        error = result.errors[name]
        row += [f"{result.metrics[name]:.2f}", "-" if error is None else f"{error:.1f}"]
    counts = ["-" if n is None else f"{n:,}" for n in (ties(result, name) for result in results)]
    row += [f"{metric.n:,}", f"{metric.chance:.1f}", " / ".join(counts)]
    if one.baseline is not None:
        d = one.differences[name]
        row += [str(d.difference), "" if d.p_holm is None else f"{d.p_holm:.2g}"]
    return row


def as_json(shown: list[Shown], every: bool) -> str:
    """All that is known but the items' own rows, for programs; metrics in percent, `every` one."""
    return json.dumps([_object(one) for one in shown], indent=1)


def _object(one: Shown) -> dict:
    whole = {"suite": one.result.suite, "fingerprint": one.result.about["fingerprint"], "headline": list(one.result.headline)}
    for side, result in (("model", one.result), ("baseline", one.baseline)):
        if result is not None:
            metrics = {
                name: {
                    "value": result.metrics[name], "standard_error": result.errors[name],
                    "n": metric.n, "chance": metric.chance, "ties": ties(result, name),
                }
                for name, metric in result.measures.items()
            }  # fmt: skip
            whole[side] = {"scorer": result.about["scorer"], "notes": result.about["notes"], "metrics": metrics}
    if one.baseline is not None:
        found = {name: {**d.difference._asdict(), "p_holm": d.p_holm} for name, d in one.differences.items()}
        whole["differences"] = {name: {**d, "text": str(one.differences[name].difference)} for name, d in found.items()}
    return whole


def as_clip_benchmark(shown: list[Shown], every: bool) -> str:
    """One object a line for each file that CLIP_benchmark would write, the model's and then the baseline's."""
    lines = []
    for one in shown:
        for result in (one.result, one.baseline):
            if result is not None:
                model, _, pretrained = _name(result).partition(":")
                lines += map(json.dumps, clip_benchmark(one.suite, result.metrics, model, pretrained))
    return "\n".join(lines)


def _name(result: Result) -> str:
    return result.about["scorer"]["name"]


FORMATS = {"table": table, "json": as_json, "clip_benchmark": as_clip_benchmark}
