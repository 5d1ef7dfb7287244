"""The main job in one command: does the teacher teach? `fastsds demo`; over seeds, with controls: `fastsds reproduce spine`.

Two arms, each a run of the real trainer on one thread, start from the shipped student and see the same batches. Settings were
chosen on development items; every figure here is on test items, which nothing else looks at. With a recipe of CLIP-TD: its
five arms, with few of the task's examples and with all (`fastsds reproduce clip_td`, one seed).
"""

import argparse
import sys
import time
from dataclasses import replace
from pathlib import Path

from fastsds import comparison, figures, jobs, report
from fastsds.config import CLIPTDRecipe, ConfigError, load_recipe
from fastsds.progress import clock
from fastsds.reproduce import experiment as files
from fastsds.reproduce.command import write
from fastsds.reproduce.experiment import Experiment
from fastsds.reproduce.file import ALL, START, Asked
from fastsds.reproduce.runs import Cell, Plan, plan

SUITE, HELD_OUT, BACKBONE = "world_test", "test", "world"
SPLITS = ("test", "shift")  # of a task of the world
SHOWN = 2  # items a kind in the picture: the first ones, not chosen


def parse(argv: list[str]) -> Experiment:
    parser = argparse.ArgumentParser(prog="fastsds demo", description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--recipe", metavar="FILE", help="in place of the embedded world's SDS-CLIP; or one of CLIP-TD")
    parser.add_argument("--output", type=Path, metavar="DIR", help="default: runs/demo, of CLIP-TD runs/demo_clip_td")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a recipe value, both arms")
    parser.add_argument("--items", type=int, metavar="N", help="test items a kind (default 300)")
    asked = parser.parse_args(argv)
    if asked.items is not None and asked.items < 1:
        raise ConfigError(f"--items is {asked.items}; expected at least 1")
    if asked.output is not None and asked.output.exists() and not asked.output.is_dir():
        raise ConfigError(f"--output: {asked.output} is not a folder")
    recipe = load_recipe(asked.recipe, checked=False)
    instead = {} if asked.recipe is None else {"recipe": str(Path(asked.recipe).resolve())}
    if isinstance(recipe, CLIPTDRecipe):
        if asked.items is not None:
            raise ConfigError("--items is of the world's test items; expected none with a recipe of clip_td")
        evaluation = {recipe.data.task: Asked(splits=SPLITS)}
        return files.load(files.SHIPPED / "demo_clip_td.yaml", asked.output, asked.set, evaluation=evaluation, **instead)
    found = files.load(files.SHIPPED / "demo.yaml", asked.output, asked.set, **instead)
    if asked.items is None:
        return found
    suite = replace(found.said.evaluation[SUITE], options={"items": asked.items})
    return replace(found, said=replace(found.said, evaluation={SUITE: suite}))


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    experiment, began = parse(argv), time.monotonic()
    made = plan(experiment)
    if experiment.trains_tasks:
        files.check_data(experiment)
    line = "" if experiment.trains_tasks else first_line(experiment)
    print(line or f"CLIP-TD, arms: {', '.join(experiment.said.arms)}", flush=True)
    import torch

    torch.set_num_threads(1)  # the arms have the cores
    try:
        with jobs.claim(experiment.output, "fastsds demo", fresh=True) as lock:
            jobs.run(made.jobs, fresh=True, lock=lock)
    except jobs.Failed as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if error.code == 2 else 1
    except KeyboardInterrupt:
        print("stopped: nothing is left running", file=sys.stderr)
        return 130
    if experiment.trains_tasks:
        written = write(made, ["fastsds demo", *argv])
    else:
        written = write_all(made, argv, line)
    print(f"\n{clock(time.monotonic() - began)} in all. Written:")
    print("\n".join(f"  {path}" for path in (*written, *(job.folder for job in made.runs.values()))))
    return 0


def write_all(made: Plan, argv: list[str], line: str) -> list[Path]:
    """The tables, with the teacher's own reading, and the picture."""
    read = comparison.readings(made.suites[SUITE], teacher(made))
    said = ", ".join(f"{report.SPLIT_NAMES[key.partition('/')[0]]} {value:.1f}" for key, value in read.items())
    note = f"The teacher's own reading of the same images (their VAE latents), text score: {said}."
    written = [*write(made, ["fastsds demo", *argv], (note,), (line,)), made.experiment.output / "demo.png"]
    draw(written[-1], made)
    return written


def cell(arm: str) -> Cell:
    return Cell(BACKBONE, ALL, arm, 0)


def teacher(made: Plan) -> str:
    return made.experiment.recipe(*cell("sds")).teacher.path


def first_line(experiment: Experiment) -> str:
    from fastsds.world import models, scenes

    recipe = experiment.recipe(*cell("sds"))
    latent = (models.LATENT_CHANNELS, models.LATENT_SIZE, models.LATENT_SIZE)
    return report.settings_line(recipe, latent, scenes.SIZE, recipe.teacher.path)


def draw(path: Path, made: Plan) -> None:
    """The picture, from what the runs left: the first items of each kind, held out."""
    arms = {of.label: cell(arm) for arm, of in made.experiment.said.arms.items()}
    starts = {START: cell(START)}
    choices = {
        label: comparison.choices(made.evaluations[of, SUITE].folder, HELD_OUT) for label, of in (starts | arms).items()
    }
    items = made.suites[SUITE].measures[f"{HELD_OUT}/swap_object"].n
    student = made.runs[cell("sds")].folder / "run" / "student"
    shown = comparison.shown(student, SUITE, HELD_OUT, items, SHOWN, teacher(made))
    for item in shown:
        item["choices"] = {label: of[item["id"]] for label, of in choices.items()}
    curves = {label: comparison.curves(made.runs[of].folder / "run" / "metrics.jsonl") for label, of in arms.items()}
    title = "Held-out test items: the first of each kind, not chosen. ✓: the student gives this image its own caption"
    figures.picture(path, shown, curves, title)


if __name__ == "__main__":
    sys.exit(main())
