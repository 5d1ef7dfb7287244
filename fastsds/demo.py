"""The main job in one command: does the teacher teach? `fastsds demo`, `fastsds demo --seeds 5 --controls`.

Each arm is one run of the real trainer, `python -m fastsds.train`, on one thread, two at a time. Arms of a seed start from
the same pretrained student and see the same batches. Settings were chosen on development items; every figure here is on
test items, which nothing else looks at.
"""

import argparse
import json
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from fastsds import comparison, figures, jobs, report
from fastsds.config import ConfigError, Recipe, as_dict, load_recipe
from fastsds.jobs import Job
from fastsds.provenance import provenance


@dataclass(frozen=True)
class Arm:
    """One way to train. sets: over the recipe; student: flags of a pretraining of its own; same_time_as: train for as long
    as that arm did, by the measured ratio of that seed's runs; bank: the name of the bank of targets that it trains from,
    one for all seeds."""

    name: str
    label: str
    sets: tuple[str, ...] = ()
    student: tuple[str, ...] = ()
    same_time_as: str | None = None
    bank: str | None = None

    def over(self, output: Path) -> tuple[str, ...]:
        """Its sets, its bank's folder included."""
        return self.sets if self.bank is None else (*self.sets, f"bank.path={output / 'banks' / self.bank / 'bank'}")


OFF = "loss.lambda=0"
CLIP, SDS = Arm("clip", "L_CLIP", (OFF,)), Arm("sds", "L_CLIP + L_SDS")
CONTROLS = (
    Arm("shuffled", "captions shuffled in L_SDS", ("loss.captions=shuffled",)),
    Arm("latents", "regression on real latents, no teacher", ("loss.gradient=latents",)),
    Arm("clip_same_wall_time", "L_CLIP, same wall time", (OFF,), same_time_as="sds"),
    Arm("parsing_student", "L_CLIP, parsing in pretraining", (OFF,), student=("--parsing",)),
    Arm("negatives", "L_CLIP, swapped captions as negatives", (OFF, "loss.negatives=swapped")),
    Arm("batch_128", "L_CLIP, batch 128", (OFF, "data.batch=128", "data.accumulation=1")),
    Arm("full_uniform", "full gradient, uniform in weight and t",
        ("loss.gradient=full", "loss.weighting=uniform", "loss.t=[0.0, 1.0]")),
    Arm("full_weighted", "full gradient, weighted", ("loss.gradient=full", "loss.weighting=inverse_snr_root")),
    Arm("layernorm", "L_CLIP + L_SDS, LayerNorm only", ("student.tune=layernorm",)),
    Arm("layernorm_clip", "L_CLIP, LayerNorm only", (OFF, "student.tune=layernorm")),
)  # fmt: skip



def amortised(name: str, label: str, bank: str, draws: int, t: str, *more: str) -> Arm:
    sets = ("loss.gradient=amortised", f"bank.draws={draws}", f"loss.t={t}", *more)
    return Arm(name, label, sets, bank=bank)


BANKED = (
    amortised("amortised_1", "amortised, K = 1", "k1", 1, "[0.5, 0.9]"),
    amortised("amortised_2", "amortised, K = 2", "k2", 2, "[0.5, 0.9]"),
    amortised("amortised_8", "amortised, K = 8", "k8", 8, "[0.5, 0.9]"),
    amortised("amortised_1_70", "amortised, K = 1, t in [0.7, 1] T", "k1_70", 1, "[0.7, 1.0]"),
    amortised("amortised_8_70", "amortised, K = 8, t in [0.7, 1] T", "k8_70", 8, "[0.7, 1.0]"),
    amortised("amortised_8_90", "amortised, K = 8, t in [0.9, 1] T", "k8_90", 8, "[0.9, 1.0]"),
    amortised("refreshed", "refreshed each epoch, K = 1, t in [0.9, 1] T", "k1_90", 1, "[0.9, 1.0]", "bank.refresh_every=1"),
)

ITEMS = 300  # test items a kind
DURING = ("eval.suite=world_dev", "eval.items=100")  # what the trainer looks at while it runs
SHOWN = 2  # items a kind in the picture: the first ones, not chosen
METRICS = ("text", "image", "group", "swap_object", "swap_colour", "swap_shape", "retrieval")
TESTED = ("text", "image", "group")
CLAIMS = ("text", "swap_object")


@dataclass(frozen=True)
class Settings:
    """What the command line asks for. sets: --set, for every arm."""

    output: Path
    recipe: Recipe
    sets: tuple[str, ...] = ()
    items: int = ITEMS
    seeds: int | None = None  # None: seed 0 from the shipped student
    controls: tuple[Arm, ...] = ()
    control_seeds: int = 1
    argv: list[str] = field(default_factory=list)


def parse(argv: list[str]) -> Settings:
    parser = argparse.ArgumentParser(prog="fastsds demo", description=__doc__.split("\n")[0], allow_abbrev=False)
    known = {arm.name: arm for arm in (*CONTROLS, *BANKED)}
    groups, names = {"all": CONTROLS, "bank": BANKED}, ", ".join(known)
    parser.add_argument("--seeds", type=int, metavar="N", help="N pretrained students, data orders and noises")
    parser.add_argument("--controls", nargs="?", const="all", metavar="NAMES", help=f"all, bank, or some of {names}")
    parser.add_argument("--control-seeds", type=int, metavar="K", help="seeds of the controls (default: as --seeds)")
    parser.add_argument("--output", type=Path, metavar="DIR", help="default: runs/demo; with --seeds runs/seeds")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a recipe value, all arms")
    parser.add_argument("--items", type=int, default=ITEMS, metavar="N", help=f"test items a kind (default {ITEMS})")
    asked = parser.parse_args(argv)
    seeds = 1 if asked.seeds is None and asked.controls is not None else asked.seeds
    for option, value in (("--seeds", seeds), ("--control-seeds", asked.control_seeds), ("--items", asked.items)):
        if value is not None and value < 1:
            raise ConfigError(f"{option} is {value}; expected at least 1")
    wanted = [n for n in (asked.controls or "").split(",") if n]
    for name in wanted:
        if name not in known and name not in groups:
            raise ConfigError(f"--controls: {name!r} is not one of {names}")
    controls = tuple(arm for name in wanted for arm in groups.get(name) or (known[name],))
    output = (asked.output or Path("runs", "demo" if seeds is None else "seeds")).resolve()
    for arm in controls:  # a mistake in --set is found before anything runs
        recipe = load_recipe(None, [*asked.set, *arm.over(output)])
        if arm.bank and recipe.data.samples is None:
            raise ConfigError(f"--controls {arm.name}: a bank needs a data set that ends; expected --set data.samples=N")
    if output.exists() and not output.is_dir():
        raise ConfigError(f"--output: {output} is not a folder")
    return Settings(
        output, load_recipe(None, asked.set), tuple(asked.set), asked.items, seeds, controls,
        min(seeds or 1, asked.control_seeds or seeds or 1), argv,
    )  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    settings, began = parse(sys.argv[1:] if argv is None else argv), time.monotonic()
    print(first_line(settings.recipe), flush=True)
    import torch

    torch.set_num_threads(1)  # the arms have the cores
    try:
        written = compare_two(settings) if settings.seeds is None else compare_seeds(settings)
    except jobs.Failed as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if error.code == 2 else 1
    except KeyboardInterrupt:
        again = "" if settings.seeds is None else "; the same command goes on with what is not finished"
        print(f"stopped: nothing is left running{again}", file=sys.stderr)
        return 130
    print(f"\n{jobs.clock(time.monotonic() - began)} in all. Written:")
    print("\n".join(f"  {path}" for path in written))
    return 0


# -- the two ways to run -----------------------------------------------------------------------------------------------


def compare_two(settings: Settings) -> list[Path]:
    """Seed 0 from the shipped student: three rows, paired differences, the picture."""
    output, first = settings.output, settings.recipe.student.model
    start = untrained(settings, "pretrained", first, output / "pretrained", of_images=True)
    sds, clip = (training(settings, arm, output / arm.name, 0) for arm in (SDS, CLIP))
    jobs.run([sds, clip, start], fresh=True)
    arms = {"pretrained": start, CLIP.label: clip, SDS.label: sds}
    a, b = ([comparison.outcomes(job.folder)] for job in (sds, clip))
    differences = comparison.compare(f"{SDS.label} - {CLIP.label}", a, b, METRICS, TESTED)
    tables = [
        report.scores_table({label: [job.results["metrics"]] for label, job in arms.items()}, comparison.splits()),
        report.differences_table(differences),
    ]
    said = ", ".join(f"{split} {value:.1f}" for split, value in start.results["of_images"].items())
    notes = [
        f"{settings.items} test items of each kind, retrieval among 100; all in percent. Seed 0, not chosen.",
        f"The teacher's own reading of the same images (their VAE latents), text score: {said}.",
        f"Seconds of training, one thread each: {CLIP.label} {clip.results['seconds']:.0f}, "
        f"{SDS.label} {sds.results['seconds']:.0f}.",
    ]
    results = {"arms": {label: job.results for label, job in arms.items()}, "differences": differences}
    written = write(settings, tables, notes, results)
    draw(output / "demo.png", arms, settings)
    return [*written, output / "demo.png", sds.folder, clip.folder]


def compare_seeds(settings: Settings) -> list[Path]:
    """Each seed: its own pretraining, data order and noise. Then the controls. Finished runs are not run again."""
    plan = plan_seeds(settings)
    jobs.run(list(plan.values()))
    labels = {"pretrained": "pretrained", **{arm.name: arm.label for arm in (CLIP, SDS, *settings.controls)}}
    runs = {name: [plan[name, s] for s in range(settings.seeds) if (name, s) in plan] for name in labels}
    data = {name: [comparison.outcomes(job.folder) for job in of] for name, of in runs.items()}
    compare, k = comparison.compare, settings.control_seeds
    main_differences = compare(f"{SDS.label} - {CLIP.label}", data["sds"], data["clip"], METRICS)
    differences = list(main_differences)
    for arm in settings.controls:
        differences += compare(f"{arm.label} - {CLIP.label}", data[arm.name], data["clip"][:k], CLAIMS)
        differences += compare(f"{SDS.label} - {arm.label}", data["sds"][:k], data[arm.name], CLAIMS)
    results = {labels[name]: [job.results for job in of] for name, of in runs.items()}
    metrics = {label: [r["metrics"] for r in of] for label, of in results.items()}
    tables = [report.scores_table(metrics, comparison.splits()), report.differences_table(differences)]
    seconds = {label: np.mean([r["seconds"] for r in of]) for label, of in results.items() if "seconds" in of[0]}
    of_controls = f" ({k} for the controls)" if settings.controls else ""
    notes = [
        f"{settings.seeds} seed(s){of_controls}, mean and deviation over seeds; {settings.items} test items of each kind, "
        "retrieval among 100; all in percent.",
        "Intervals: two-level bootstrap (seeds, then items), widened for few seeds. With one seed: items alone.",
        *(report.verdict(d) for d in main_differences if d["metric"] in CLAIMS),
        "Seconds of training, one thread, mean: " + ", ".join(f"{label} {v:.0f}" for label, v in seconds.items()) + ".",
    ]
    if banks := building(plan):
        said = ", ".join(f"{name} {v:.0f}" for name, v in banks.items())
        notes.append(f"Before that, once for all seeds, seconds to build a bank, one thread, its start included: {said}.")
    everything = {"seeds": settings.seeds, "arms": results, "banks": banks, "differences": differences}
    return write(settings, tables, notes, everything)


def building(plan: dict[tuple, Job]) -> dict[str, float]:
    """Seconds that each bank of a plan took, by its name."""
    return {name: job.results["seconds_in_all"] for (kind, name), job in plan.items() if kind == "bank"}


def plan_seeds(settings: Settings) -> dict[tuple, Job]:
    """All jobs by (name, seed), banks by ("bank", name), in the order they should start."""
    plan: dict[tuple, Job] = {}
    for s in range(settings.seeds):
        folder = settings.output / f"seed_{s}"
        plan["pretraining", s] = first = pretraining(s, folder / "pretraining")
        student = first.folder / "student"
        for arm in (SDS, CLIP):
            plan[arm.name, s] = training(settings, arm, folder / arm.name, s, student, [first])
        plan["pretrained", s] = untrained(settings, f"seed_{s} pretrained", student, folder / "pretrained", [first])
    for arm in settings.controls:
        own, bank = f"pretraining_{arm.name}", ("bank", arm.bank)
        if arm.bank and bank not in plan:
            plan[bank] = banking(settings, arm)
        for s in range(settings.control_seeds):
            folder, first = settings.output / f"seed_{s}", plan["pretraining", s]
            if arm.student:
                plan[own, s] = first = pretraining(s, folder / own, arm.student)
            pair = (plan["clip", s], plan[arm.same_time_as, s]) if arm.same_time_as else ()
            needs = [first, *pair, *([plan[bank]] if arm.bank else [])]
            plan[arm.name, s] = training(settings, arm, folder / arm.name, s, first.folder / "student", needs, pair)
    return plan


# -- jobs --------------------------------------------------------------------------------------------------------------


def pretraining(seed: int, folder: Path, flags: tuple[str, ...] = ()) -> Job:
    """A student of its own."""
    argv = [sys.executable, "-m", "fastsds.world.pretrain", "--only", "student", "--seed", str(seed), *flags]
    argv += ["--output", str(folder)]
    return Job(f"{folder.parent.name} {folder.name}", folder, lambda: argv, key={"weights": comparison.weights()})


def banking(settings: Settings, arm: Arm) -> Job:
    """The bank of an arm."""
    folder = settings.output / "banks" / arm.bank
    argv = [sys.executable, "-m", "fastsds.cli", "bank", "build"]
    argv += [x for value in (*settings.sets, *arm.over(settings.output)) for x in ("--set", value)]
    return Job(f"bank {arm.bank}", folder, lambda: argv, key={"weights": comparison.weights()})


def untrained(settings: Settings, name: str, student: Path | str, folder: Path, needs=(), of_images: bool = False) -> Job:
    def measure() -> dict:
        return comparison.assess(student, folder, settings.items, settings.recipe.teacher.path, of_images)

    return Job(name, folder, lambda: None, measure, list(needs), key(settings))


def training(
    settings: Settings, arm: Arm, folder: Path, seed: int, student: Path | None = None, needs=(), pair: tuple[Job, ...] = ()
) -> Job:
    """One run of the trainer, then its evaluation. pair: multiply steps by the seconds of pair[1] over pair[0]'s."""
    over = [f"seed={seed}", *DURING, *(["eval.every=0"] if student else []), *settings.sets]
    over += arm.over(settings.output)
    over += [f"student.model={student}"] if student else []
    recipe, run = load_recipe(None, over), folder / "run"

    def command() -> list[str]:
        scale = pair[1].results["seconds"] / pair[0].results["seconds"] if pair else 1
        sets = [*over, f"steps={round(recipe.steps * scale)}"]
        return [sys.executable, "-m", "fastsds.train", "--output", str(run), *(x for o in sets for x in ("--set", o))]

    def measure() -> dict:  # every arm with a head is read by the same teacher, also one that learnt from none
        read_by = settings.recipe.teacher.path
        seconds = comparison.training_seconds(run / "metrics.jsonl", recipe.data.batch * recipe.data.accumulation)
        return {"seconds": seconds, **comparison.assess(run / "student", folder, settings.items, read_by)}

    name = f"{folder.parent.name} {arm.name}" if student else arm.label
    return Job(name, folder, command, measure, list(needs), key(settings))


def key(settings: Settings) -> dict:
    """What results depend on besides their command."""
    return {"weights": comparison.weights(), "items": settings.items}


# -- what is shown -----------------------------------------------------------------------------------------------------


def first_line(recipe: Recipe) -> str:
    from fastsds.world import models, scenes

    latent = (models.LATENT_CHANNELS, models.LATENT_SIZE, models.LATENT_SIZE)
    return report.settings_line(recipe, latent, scenes.SIZE, recipe.teacher.path)


def write(settings: Settings, tables, notes: list[str], results: dict) -> list[Path]:
    """Print the tables; write them as markdown, and everything as JSON."""
    for table in tables:
        print("\n" + report.as_text(*table))
    print("\n" + "\n".join(notes))
    source = {"command": " ".join(["fastsds demo", *settings.argv]), **provenance()}
    versions = ", ".join(f"{name} {version}" for name, version in source["versions"].items())
    stamp = f"`{source['command']}`, commit {source['commit']}; {versions}; {source['machine']}."
    parts = [first_line(settings.recipe), *(report.as_markdown(*table) for table in tables), *notes, stamp]
    (settings.output / "table.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    everything = {**source, "recipe": as_dict(settings.recipe), "notes": notes, **results}
    (settings.output / "results.json").write_text(json.dumps(everything, indent=1) + "\n", encoding="utf-8")
    return [settings.output / "table.md", settings.output / "results.json"]


def draw(path: Path, arms: dict[str, Job], settings: Settings) -> None:
    """The picture, from what the runs left: the first items of each kind, held out."""
    choices = {label: comparison.choices(job.folder) for label, job in arms.items()}
    read_by = settings.recipe.teacher.path
    shown = comparison.shown(arms[SDS.label].folder / "run" / "student", settings.items, SHOWN, read_by)
    for item in shown:
        item["choices"] = {label: of[item["id"]] for label, of in choices.items()}
    curves = {label: comparison.curves(arms[label].folder / "run" / "metrics.jsonl") for label in (CLIP.label, SDS.label)}
    title = "Held-out test items: the first of each kind, not chosen. ✓: the student gives this image its own caption"
    figures.picture(path, shown, curves, title)


if __name__ == "__main__":
    sys.exit(main())
