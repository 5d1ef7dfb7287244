"""The jobs of an experiment: pretraining, banks, the real trainer, evaluations; what each shares and waits for.

    OUTPUT/banks/DIGEST/                        a bank, for all arms, backbones and seeds with the same teacher, data and draws
    OUTPUT/BACKBONE/seed_S/pretraining/         where the arms of that seed start; pretraining_ARM/ where one has its own
    OUTPUT/BACKBONE/seed_S/pretrained/          evaluations of that start
    OUTPUT/BACKBONE/pretrained_MODEL/           the same of a start that needs no pretraining, for all seeds
    OUTPUT/BACKBONE/seed_S/PAIRS/ARM/           recipe.yaml, log.txt, run/, evaluations
    .../evaluation/SUITE/                       items.jsonl and result.json (evaluation/results.py)

A folder that is deleted is made anew, and so is what lies in it.
"""

import re
import sys
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from fastsds import checkpoint, comparison
from fastsds.config import AnyRecipe, CLIPTDRecipe, Recipe, as_dict, dump_recipe
from fastsds.crossmodal import load_crossmodal
from fastsds.engine import device
from fastsds.evaluation.results import RESULT, Result, load_result
from fastsds.evaluation.suite import Suite
from fastsds.evaluation.tasks import evaluate_task
from fastsds.jobs import Job
from fastsds.reproduce.experiment import Experiment, bank_settings, digest, task_settings
from fastsds.reproduce.file import ALL, START, twin
from fastsds.student import load_student

RECIPE = "recipe.yaml"


class Cell(NamedTuple):
    """One student: a trained one, or a start, whose arm is "pretrained" or "pretrained_ARM" and whose pairs are "all"."""

    backbone: str
    pairs: float | str
    arm: str
    seed: int


@dataclass
class Plan:
    """Jobs in the order in which they should start. starts: of each trained cell; begun: by their folders."""

    experiment: Experiment
    jobs: list[Job] = field(default_factory=list)
    by_folder: dict[Path, Job] = field(default_factory=dict)
    banks: list[Job] = field(default_factory=list)
    runs: dict[Cell, Job] = field(default_factory=dict)
    starts: dict[Cell, Cell] = field(default_factory=dict)
    begun: dict[Path, Cell] = field(default_factory=dict)
    evaluations: dict[tuple[Cell, str], Job] = field(default_factory=dict)

    @cached_property
    def suites(self) -> dict[str, Suite]:
        return {name: self.experiment.suite(name) for name in self.experiment.said.evaluation}

    def result(self, cell: Cell, suite: str) -> Result:
        """What was kept of a finished evaluation."""
        job = self.evaluations[cell, suite]
        return load_result(job.folder / job.results["kept"])

    def put(self, job: Job) -> Job:
        """The job; or the one that is planned for its folder already. Progress calls it by its folder."""
        if job.folder not in self.by_folder:
            self.jobs.append(job)
            parts = job.folder.relative_to(self.experiment.output).parts
            job.name = job.name or " ".join(part for part in parts if part not in (ALL, "evaluation"))
        return self.by_folder.setdefault(job.folder, job)


def plan(experiment: Experiment) -> Plan:
    """All jobs of an experiment. Nothing is written, and no data are read."""
    made, said = Plan(experiment), experiment.said
    timed = sorted(said.arms, key=lambda arm: said.arms[arm].same_time_as is not None)  # after those whose time they take
    for seed in range(said.seeds):
        for backbone in said.backbones:
            for pairs in said.pairs:
                for arm in timed:
                    _add(made, Cell(backbone, pairs, arm, seed))
    return made


def _add(made: Plan, cell: Cell) -> None:
    """Put what a cell needs, its training and its evaluations."""
    experiment, arm = made.experiment, made.experiment.said.arms[cell.arm]
    home = experiment.output / cell.backbone
    seeded, needs, student = home / f"seed_{cell.seed}", [], None
    if words := experiment.pretrain(cell.backbone, cell.arm):
        own = "" if arm.pretrain is None else f"_{cell.arm}"
        folder = seeded / f"pretraining{own}"
        needs, student = [made.put(pretraining(folder, words, cell.seed))], folder / "student"
    recipe = experiment.recipe(*cell, student)
    if not experiment.trains_tasks:
        _start(made, cell, seeded / f"{START}{own}" if words else home / f"{START}_{_called(recipe)}", recipe, needs)
    if experiment.makes_bank(recipe):
        bank = made.put(banking(Path(recipe.bank.path).parent, recipe))
        made.banks += [bank] * (bank not in made.banks)
        needs = [*needs, bank]
    pair = ()
    if arm.same_time_as:
        pair = tuple(made.runs[cell._replace(arm=other)] for other in (twin(experiment.said, cell.arm), arm.same_time_as))
    folder = seeded / str(cell.pairs) / cell.arm
    made.runs[cell] = made.put(training(folder, recipe, [*needs, *pair], pair))
    for suite in experiment.said.evaluation:
        where = folder / "evaluation" / suite
        if experiment.trains_tasks:
            asked = answering(made, suite, where, folder / "run" / "student", recipe, [made.runs[cell]])
            made.evaluations[cell, suite] = made.put(asked)
            continue
        made.evaluations[cell, suite] = made.put(
            evaluation(made, suite, where, str(folder / "run" / "student"), None, recipe, [made.runs[cell]])
        )


def _start(made: Plan, cell: Cell, folder: Path, recipe: Recipe, needs: list[Job]) -> None:
    """Put the evaluations of where a cell starts: one start for all that begin alike."""
    if folder not in made.begun:
        def kind(at: Path) -> tuple:  # where it starts, whatever the seed
            return at.parent.name if at.parent.name == cell.backbone else "a seed's", at.name

        named = {kind(at): start.arm for at, start in made.begun.items() if start.backbone == cell.backbone}
        name = named.get(kind(folder), f"{START}_{cell.arm}" if named else START)
        made.begun[folder] = Cell(cell.backbone, ALL, name, cell.seed)
        for suite in made.experiment.said.evaluation:
            job = evaluation(
                made, suite, folder / "evaluation" / suite, recipe.student.model, recipe.student.pretrained, recipe, needs
            )
            made.evaluations[made.begun[folder], suite] = made.put(job)
    made.starts[cell] = made.begun[folder]


def _called(recipe: Recipe) -> str:
    """A name for a student that is there, as a folder has it: ViT-B-32-quickgelu_openai."""
    words = [recipe.student.model, *([recipe.student.pretrained] if recipe.student.pretrained else [])]
    words = [f"{Path(word).name}_{digest(word)}" if "/" in word else word for word in words]
    return re.sub(r"[^\w.+-]+", "_", "_".join(words))


# -- jobs --------------------------------------------------------------------------------------------------------------


def pretraining(folder: Path, words: tuple[str, ...], seed: int) -> Job:
    """A student of its own, by a command of the file: {seed}, {folder}; `python` is this one."""
    argv = [word.replace("{seed}", str(seed)).replace("{folder}", str(folder)) for word in words]
    argv = [sys.executable if word == "python" else word for word in argv[:1]] + argv[1:]
    return Job("", folder, lambda: argv, key={"weights": comparison.weights()})


def banking(folder: Path, recipe: Recipe) -> Job:
    """A bank. One that was cut off goes on."""
    argv = [sys.executable, "-m", "fastsds.cli", "bank", "build", "--recipe", str(folder / RECIPE)]
    key = {"bank": bank_settings(recipe), "weights": comparison.weights()}
    loss = recipe.loss
    noise = f"t in {list(loss.t)} T" if loss.t else f"log SNR in {[edge + loss.shift for edge in loss.log_snr]}"
    said = f"bank {folder.name} (K = {recipe.bank.draws}, {noise}, {recipe.data.samples or 'all'} samples)"
    return Job(said, folder, lambda: argv, key=key, files=_recipe(recipe), go_on=list)


def training(folder: Path, recipe: AnyRecipe, needs: list[Job], pair: tuple[Job, ...] = ()) -> Job:
    """One run of the trainer. One that was cut off goes on from its last checkpoint.

    pair: multiply steps by the seconds of pair[1] over those of pair[0].
    """
    run = folder / "run"

    def command() -> list[str]:
        scale = pair[1].results["seconds"] / pair[0].results["seconds"] if pair else 1
        steps = f"steps={max(1, round(recipe.steps * scale)) if pair else recipe.steps}"
        argv = ["-m", "fastsds.train", "--recipe", str(folder / RECIPE), "--set", steps, "--output", str(run)]
        return [sys.executable, *argv]

    def measure() -> dict:
        images = recipe.data.batch * recipe.data.accumulation
        return {"seconds": comparison.training_seconds(run / "metrics.jsonl", images), "pairs": pairs_seen(recipe, run)}

    def go_on() -> list[str] | None:
        return ["--resume", "latest"] if checkpoint.steps(run) else None

    key = {"recipe": as_dict(recipe), "weights": comparison.weights()}
    return Job("", folder, command, measure, list(needs), key, _recipe(recipe), go_on)


def evaluation(
    made: Plan, suite: str, folder: Path, model: str, pretrained: str | None, recipe: Recipe, needs: list[Job]
) -> Job:
    """One suite asked of one student: by `fastsds eval` in a place of its own, or here what is made here, of no data.

    One that was cut off goes on.
    """
    asked = made.experiment.said.evaluation[suite]
    name = asked.suite or suite
    key = {"suite": name, "path": asked.path, "options": asked.options, "student": [model, pretrained]}
    key["weights"] = comparison.weights()
    if asked.path is None:
        key["teacher"] = recipe.teacher.path  # whose reading is asked

    def here() -> dict:
        student = load_student(model, pretrained, device=device()).eval()
        return {"metrics": comparison.ask(student, made.suites[suite], folder, recipe.teacher.path), "kept": "."}

    def read() -> dict:
        (kept,) = folder.glob(f"*/*/{RESULT}")
        return {"metrics": load_result(kept.parent).metrics, "kept": str(kept.parent.relative_to(folder))}

    def command() -> list[str]:
        path, options = made.experiment.places(suite)
        words = ["--model", model if pretrained is None else f"{model}:{pretrained}", "--suite", f"{name}={path}"]
        words += [word for option, value in options.items() for word in ("--option", f"{option}={value}")]
        return [sys.executable, "-m", "fastsds.cli", "eval", *words, "--output", str(folder)]

    if asked.path is None:
        return Job("", folder, lambda: None, here, list(needs), key, go_on=list)
    return Job("", folder, command, read, list(needs), key, go_on=list)


def answering(made: Plan, task: str, folder: Path, student: Path, recipe: CLIPTDRecipe, needs: list[Job]) -> Job:
    """The recipes' task asked of one student, here."""
    splits = made.experiment.said.evaluation[task].splits
    key = {"task": task_settings(recipe), "splits": splits, "weights": comparison.weights()}

    def here() -> dict:
        model = load_crossmodal(student, device=device()).eval()
        found = evaluate_task(model, made.experiment.task(recipe), splits, workers=recipe.data.workers)
        found.save(folder)
        return {"metrics": found.metrics, "kept": "."}

    return Job("", folder, lambda: None, here, list(needs), key)


def _recipe(recipe: AnyRecipe):
    return lambda: {RECIPE: dump_recipe(recipe)}


def pairs_seen(recipe: AnyRecipe, run: Path) -> int:
    """How many different samples a run was trained on at most."""
    found = checkpoint.read_meta(checkpoint.path_of(run, checkpoint.steps(run)[-1]))
    return min(found["samples"] or sys.maxsize, found["step"] * recipe.data.batch * recipe.data.accumulation)
