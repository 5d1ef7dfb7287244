"""`fastsds reproduce FILE.yaml`: everything that a table takes, from one file, and the table: docs/reproduce.md.

What is finished is not run again, what was cut off goes on: the same command, until it prints the table. A run that fails
leaves the others running; the end of its log is shown last.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path

from fastsds import figures, jobs, tables
from fastsds.engine import device
from fastsds.jobs import Job
from fastsds.progress import clock
from fastsds.provenance import provenance
from fastsds.reproduce import experiment as files
from fastsds.reproduce.runs import Cell, Plan, plan
from fastsds.reproduce.table import Findings


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="fastsds reproduce", description=__doc__.split("\n")[0], allow_abbrev=False)
    shipped = ", ".join(sorted(path.stem for path in files.SHIPPED.glob("*.yaml")))
    parser.add_argument("file", metavar="FILE", help=f"what to run (YAML), or a shipped one: {shipped}")
    parser.add_argument("--output", type=Path, metavar="DIR", help="in place of the file's")
    parser.add_argument("--seeds", type=int, metavar="N", help="in place of the file's; more of them later go on from these")
    parser.add_argument("--only", type=lambda text: text.split(","), default=[], metavar="NAMES", help="these arms, backbones")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a recipe value, all runs")
    parser.add_argument("--dry-run", action="store_true", help="check everything, print all jobs and what is done; run nothing")
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    asked, began = parse(argv), time.monotonic()
    experiment = files.load(files.find(asked.file), asked.output, asked.set, asked.seeds, asked.only)
    made = plan(experiment)
    look(made)
    if asked.dry_run:
        print("\n".join(overview(made)))
    if any(job.results is None for job in made.jobs):
        files.check_data(experiment)
    if asked.dry_run:
        return 0
    import torch

    torch.set_num_threads(1)  # the runs have the cores
    try:
        with jobs.claim(experiment.output, "fastsds reproduce") as lock:
            jobs.run(made.jobs, places(), keep_going=True, lock=lock)
    except jobs.Failed as error:
        print(f"error: {error}\n\nthe same command goes on with what is not finished", file=sys.stderr)
        return 2 if error.code == 2 else 1
    except KeyboardInterrupt:
        print("stopped: nothing is left running; the same command goes on with what is not finished", file=sys.stderr)
        return 130
    written = write(made, ["fastsds reproduce", *argv])
    print(f"\n{clock(time.monotonic() - began)} in all. Written:\n" + "\n".join(f"  {path}" for path in written))
    return 0


def places() -> list[dict[str, str]]:
    """Where commands run at a time: one on each GPU, or two on the CPU, a thread each."""
    import torch

    if device().type == "cpu":
        return list(jobs.PLACES)
    seen = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    names = [name for name in seen.split(",") if name] or [str(k) for k in range(torch.cuda.device_count())]
    return [{"CUDA_VISIBLE_DEVICES": name} for name in names]


def look(made: Plan) -> None:
    """Read what is finished, before anything is run. Raises: ConfigError where that is of other settings, or has not a metric
    that the file names."""
    for job in made.jobs:
        if all(need.results is not None for need in job.needs):
            job.finished()
    kept = {suite: cell for (cell, suite), job in made.evaluations.items() if job.results is not None}
    for suite, cell in kept.items():
        files.check_metrics(made.experiment, suite, made.result(cell, suite).measures)


def overview(made: Plan) -> list[str]:
    """All that is to run, what is done, and how long the rest takes, by what those of its kind took."""
    asked: dict[Cell, list[Job]] = {}
    for (cell, _), job in made.evaluations.items():
        asked.setdefault(cell, []).append(job)
    of_run = {job: asked[cell] for cell, job in made.runs.items()}
    evaluations = {job for of in asked.values() for job in of}
    lines = []
    for job in made.jobs:
        if job not in evaluations:
            done = f"; asked {sum(j.results is not None for j in of_run[job])} of {len(of_run[job])}" if job in of_run else ""
            lines.append(f"{_state(job):<8} {job.name}{done}")
    lines += [f"{_state(job):<8} {job.name}" for cell, of in asked.items() if cell not in made.runs for job in of]
    kinds = {"bank": set(made.banks), "run": set(of_run), "evaluation": evaluations}
    kinds = {"pretraining": set(made.jobs).difference(*kinds.values()), **kinds}
    total, unknown, at_a_time = 0.0, [], len(places())
    for kind, of in kinds.items():
        done = [job.results["seconds_in_all"] for job in of if job.results is not None]
        left = len(of) - len(done)
        lines += [f"{kind}: {len(of)}, {len(done)} done" + (f", {sum(done) / len(done):.0f} s each" if done else "")] * bool(of)
        total += left * sum(done) / len(done) if done else 0.0
        unknown += [kind] * (left > 0 and not done)
    rest = _unmeasured(made, unknown) if unknown else f"about {clock(total / at_a_time)}, {at_a_time} at a time"
    return [*lines, f"left: {rest}"]


def _state(job: Job) -> str:
    return "done" if job.results is not None else "cut off" if (job.folder / "job.json").is_file() else "to do"


def _unmeasured(made: Plan, unknown: list[str]) -> str:
    images = sum(int(job.key["recipe"]["steps"]) * _images(job) for job in made.runs.values() if job.results is None)
    return (
        f"training on {images:,} images in all. How long that takes is known when one of each kind ({', '.join(unknown)}) has "
        "finished; `fastsds plan` says what a step costs"
    )


def _images(job: Job) -> int:
    data = job.key["recipe"]["data"]
    return data["batch"] * data["accumulation"]


def write(made: Plan, command: list[str], more: tuple[str, ...] = (), heading: tuple[str, ...] = ()) -> list[Path]:
    """Print the tables; write them as markdown, everything as JSON, and the curves where there are several data sizes.

    Args: command: what was typed. more: notes. heading: above the tables in markdown.
    """
    found, experiment = Findings(made), made.experiment
    all_tables, notes = found.tables(), [*found.notes(), *more]
    for table in all_tables:
        print("\n" + tables.as_text(*table))
    print("\n" + "\n".join(notes))
    source = {"command": " ".join(command), **provenance()}
    versions = ", ".join(f"{name} {version}" for name, version in source["versions"].items())
    stamp = f"`{source['command']}`, commit {source['commit']}; {versions}; {source['machine']}."
    parts = [*heading, *(tables.as_markdown(*table) for table in all_tables), *notes, stamp]
    written = [experiment.output / name for name in ("table.md", "results.json")]
    written[0].write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    everything = {**source, "file": files.plain(experiment.said), "set": experiment.overrides, "notes": notes, **found.plain()}
    written[1].write_text(json.dumps(everything, indent=1) + "\n", encoding="utf-8")
    if len(experiment.said.pairs) > 1:
        written.append(figures.sample_efficiency(experiment.output / "sample_efficiency.png", found.curves()))
    return written
