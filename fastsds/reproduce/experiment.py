"""The file of `fastsds reproduce`, read as strictly as a recipe: every mistake is found before anything runs.

Values under a `sets` are keys of a recipe, `loss.lambda: 0`, and lie over one another in this order: the recipe, the file's,
the backbone's, the arm's, the number of pairs, --set, the seed. Paths are relative to the file, `output` to the current folder.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from fastsds.config import CONFIGS, AnyRecipe, CLIPTDRecipe, ConfigError, Over, Recipe, as_dict, check, load_recipe
from fastsds.data.tasks import Task
from fastsds.data.tasks.opening import open_task
from fastsds.data.tasks.subsets import TRAIN, low_shot
from fastsds.evaluation.suite import Suite, load_suite
from fastsds.evaluation.tasks import measures_of
from fastsds.reproduce.file import ALL, OWN, PATHS, START, Reproduction, check_file, only_of, trained
from fastsds.strict import merge, nearest, read_yaml, show
from fastsds.training import check_batch

SHIPPED = CONFIGS / "reproduce"


@dataclass(frozen=True)
class Experiment:
    """A reproduction that was checked. overrides: of the command line, "a.b=c", over everything but the seed."""

    file: Path
    said: Reproduction
    output: Path
    overrides: tuple[str, ...] = ()
    _read: dict[str | None, AnyRecipe] = field(default_factory=dict, repr=False, compare=False)
    _tasks: dict[str, Task] = field(default_factory=dict, repr=False, compare=False)
    _sizes: dict[tuple[str, float], int] = field(default_factory=dict, repr=False, compare=False)

    def pretrain(self, backbone: str, arm: str | None = None) -> tuple[str, ...]:
        """The command that makes where an arm starts (None: most arms)."""
        own = None if arm is None else self.said.arms[arm].pretrain
        return self.said.backbones[backbone].pretrain if own is None else own

    @property
    def trains_tasks(self) -> bool:
        """Whether it is of CLIP-TD: its recipes' task in place of suites, and no evaluation of a start, whose head is new."""
        return isinstance(self._base(next(iter(self.said.arms.values())).recipe or self.said.recipe), CLIPTDRecipe)

    def recipe(self, backbone: str, pairs: float | str, arm: str, seed: int = 0, student: Path | None = None) -> AnyRecipe:
        """What one run trains. student: where it starts, if something made that.

        An arm whose gradient is amortised has the bank that all arms and seeds with its settings share, unless it names one;
        so have arms of CLIP-TD, which is not adapted, the targets.
        """
        said, base = self.said, self._base(self.said.arms[arm].recipe or self.said.recipe)
        size = "data.fraction" if isinstance(base, CLIPTDRecipe) else "data.samples"
        layers = [
            self._over("sets", said.sets), self._over(f"backbones.{backbone}.sets", said.backbones[backbone].sets),
            self._over(f"arms.{arm}.sets", said.arms[arm].sets),
            self._over("pairs", {} if pairs == ALL else {size: pairs}), *self.overrides,
            self._over("seeds", {"seed": seed}), self._over("pretrain", {"student.model": str(student)} if student else {}),
        ]  # fmt: skip
        if isinstance(base, CLIPTDRecipe):
            made = load_recipe(base, layers)
            if made.loss.beta and made.targets.path is None and not made.adaptation.steps:  # an adapted CLIP is a run's own
                folder = self.output / "targets" / digest(target_settings(made))
                layers.append(self._over(f"arms.{arm}", {"targets.path": str(folder)}))
            return load_recipe(base, layers)
        made = load_recipe(base, layers, checked=False)
        if made.loss.gradient == "amortised" and made.bank.path is None:
            folder = self.output / "banks" / digest(bank_settings(made)) / "bank"
            layers.append(self._over(f"arms.{arm}", {"bank.path": str(folder)}))
        if made.data.cache:  # a cache is of one data set, and alone in its folder
            layers.append(self._over("pairs", {"data.cache": str(Path(made.data.cache) / str(pairs))}))
        return load_recipe(base, layers)

    def makes_bank(self, recipe: AnyRecipe) -> bool:
        """Whether a recipe's bank is one of the experiment's own."""
        path = recipe.bank.path if isinstance(recipe, Recipe) else None
        return path is not None and self.output / "banks" in Path(path).parents

    def suite(self, name: str) -> Suite:
        """Read a suite from where it lies. Raises: ConfigError."""
        path, options = self.places(name)
        try:
            return load_suite(self.said.evaluation[name].suite or name, path, **options)
        except ConfigError as error:
            raise ConfigError(f"{self.file}: evaluation.{name}: {error}") from None

    def task(self, recipe: CLIPTDRecipe) -> Task:
        """The task of a recipe, with all its examples. Raises: ConfigError."""
        data = replace(recipe.data, fraction=1.0)
        if (key := digest(task_settings(recipe))) not in self._tasks:
            self._tasks[key] = open_task(data, recipe.seed)
        return self._tasks[key]

    def check_batch(self, recipe: CLIPTDRecipe) -> None:
        """Raise a ConfigError where a batch is larger than the training examples that a recipe keeps."""
        key, data = (digest(task_settings(recipe)), recipe.data.fraction), recipe.data
        if key not in self._sizes:
            self._sizes[key] = len(low_shot(self.task(recipe), data.fraction, recipe.seed).splits[TRAIN])
        named = f"{self.file}: data.fraction {data.fraction}: data.batch"
        check_batch(named, data.batch, f"{data.task}, {TRAIN},", self._sizes[key])

    def measures(self, name: str) -> Iterable[str]:
        """The metrics of a section. Raises: ConfigError."""
        if not self.trains_tasks:
            return self.suite(name).measures
        recipe, splits = self.recipe(*next(iter(trained(self.said)))), self.said.evaluation[name].splits
        task = self.task(recipe)
        if unknown := [split for split in splits if split not in task.splits]:
            known = ", ".join(task.splits)
            raise ConfigError(f"{self.file}: evaluation.{name}.splits: {name} has no {unknown[0]!r}; expected some of {known}")
        return measures_of(task, splits)[0]

    def places(self, name: str) -> tuple[Path | None, dict]:
        """Where a suite lies, and its options."""
        asked = self.said.evaluation[name]
        options = {key: str(self._path(value)) if key in PATHS else value for key, value in asked.options.items()}
        return asked.path and self._path(asked.path), options

    def _base(self, recipe: str | None) -> AnyRecipe:
        if recipe not in self._read:
            self._read[recipe] = load_recipe(recipe and self._path(recipe), checked=False)
        return self._read[recipe]

    def _over(self, key: str, values: dict) -> Over:
        return Over(f"{self.file}: {key}", values, self.file.parent)

    def _path(self, value: str) -> Path:
        return (self.file.parent / Path(value).expanduser()).resolve()


def find(name: str) -> Path:
    """The file, or the shipped one of that name. Raises: ConfigError with the names of those that are shipped."""
    shipped = {path.stem: path for path in sorted(SHIPPED.glob("*.yaml"))}
    if Path(name).is_file():
        return Path(name).resolve()
    stem = Path(name).stem
    if stem in shipped and Path(name).parent in (Path(), Path("configs/reproduce")):
        return shipped[stem]
    raise ConfigError(f"{name}: no such file; expected one, or the name of a shipped one: {', '.join(shipped)}")


def load(
    file: Path, output: Path | None = None, overrides: Sequence[str] = (), seeds: int | None = None, only: Sequence[str] = (),
    **instead,
) -> Experiment:
    """Read and check a file.

    Args: seeds, only: as many seeds; these arms and backbones (of a kind that is not named, all). instead: of the file's keys.
    Raises: ConfigError that names file and key, and what was expected.
    """
    said = replace(merge(Reproduction(), read_yaml(file, "reproduction"), str(file), {}), **instead)
    check_file(file, said)
    if seeds is not None and seeds < 1:
        raise ConfigError(f"--seeds is {seeds}; expected at least 1")
    for override in overrides:
        if (key := override.partition("=")[0].strip()) in OWN:
            raise ConfigError(f"--set {override}: expected --{OWN[key]}, which is of all runs")
    said = replace(only_of(said, only), seeds=seeds or said.seeds)
    experiment = Experiment(file, said, (output or Path(said.output)).resolve(), tuple(overrides))
    for name, arm in said.arms.items():
        if isinstance(experiment._base(arm.recipe or said.recipe), CLIPTDRecipe) != experiment.trains_tasks:
            raise ConfigError(f"{file}: arms.{name}.recipe is of another kind; expected recipes of one kind")
    if not experiment.trains_tasks and any(isinstance(pairs, float) for pairs in said.pairs):
        raise ConfigError(f"{file}: pairs is {show(said.pairs)}; expected whole numbers, or all: data.samples")
    for backbone, pairs, arm in trained(said):
        recipe = experiment.recipe(backbone, pairs, arm)
        if experiment.trains_tasks:
            _check_task(experiment, backbone, pairs, arm, recipe)
            continue
        if pairs not in (ALL, recipe.data.samples):
            found = f"--set data.samples={recipe.data.samples}"
            raise ConfigError(f"{found}: expected none with the file's pairs: {show(said.pairs)}")
        if said.arms[arm].same_time_as and not recipe.steps:
            raise ConfigError(f"{file}: arms.{arm}.same_time_as: steps is 0, and takes no time; expected at least 1")
        if recipe.bank.path and recipe.data.source == "world" and recipe.data.samples is None:
            raise ConfigError(f"{file}: arms.{arm}: a bank needs a data set that ends; expected data.samples in sets, or pairs")
    return experiment


def _check_task(experiment: Experiment, backbone: str, pairs, arm: str, recipe: CLIPTDRecipe) -> None:
    """What a reproduction of CLIP-TD cannot have. Raises: ConfigError."""
    file, said = experiment.file, experiment.said
    for name, asked in said.evaluation.items():
        for key, wrong, expected in (
            ("", name != recipe.data.task, f"the name of the recipe's task: {recipe.data.task}"),
            (".splits", not asked.splits, "splits of the task"),
            (".suite", asked.suite is not None, "none: it is the recipe's task"),
            (".path", asked.path is not None, "none: data.folder says it"),
            (".options", bool(asked.options), "none: data.options has them"),
            (".zero_shot", bool(asked.zero_shot), "none: a start, whose head is new, knows nothing"),
        ):
            if wrong:
                raise ConfigError(f"{file}: evaluation.{name}{key}; expected {expected}")
    if START in said.arms[arm].against:
        raise ConfigError(f"{file}: arms.{arm}.against: {START}: a start, whose head is new, knows nothing; expected arms")
    if experiment.pretrain(backbone, arm):
        raise ConfigError(f"{file}: pretrain; expected none with recipes of clip_td: student.model names where they start")
    if pairs != ALL and recipe.data.fraction != pairs:
        found = f"--set data.fraction={recipe.data.fraction}"
        raise ConfigError(f"{found}: expected none with the file's pairs: {show(said.pairs)}")
    if said.arms[arm].same_time_as and not recipe.steps:
        raise ConfigError(f"{file}: arms.{arm}.same_time_as: steps is 0, and takes no time; expected at least 1")


def check_data(experiment: Experiment) -> None:
    """Raise a ConfigError with all that is missing."""
    if found := missing(experiment):
        raise ConfigError("before this can run:" + "".join(f"\n  {line}" for line in found))


def missing(experiment: Experiment) -> list[str]:
    """What the file names and this disk does not hold, or holds wrongly: one line each."""
    found = {}
    for one in trained(experiment.said):
        try:
            check(recipe := experiment.recipe(*one))
            if experiment.trains_tasks:
                experiment.check_batch(recipe)
        except ConfigError as error:
            found[str(error)] = None
    for name in experiment.said.evaluation:
        try:
            check_metrics(experiment, name, experiment.measures(name))
        except ConfigError as error:
            found[str(error)] = None
    return list(found)


def check_metrics(experiment: Experiment, name: str, measures: Iterable[str]) -> None:
    """Raise a ConfigError where a suite, or what was kept of it, has no metric that its section names."""
    asked = experiment.said.evaluation[name]
    for key in ("headline", "claims", "zero_shot"):
        known = [*measures, *(readings(measures) if key == "headline" else [])]
        for metric in getattr(asked, key):
            if metric not in known:
                raise ConfigError(
                    f"{experiment.file}: evaluation.{name}.{key}: {asked.suite or name} has no metric {metric!r}; the nearest "
                    f"is {nearest(metric, known)!r}"
                )


def readings(measures: Iterable[str]) -> list[str]:
    """The world's suites also have what the teacher reads of h_w(f(x)), by split."""
    return [f"{name.partition('/')[0]}/reading" for name in measures if name.endswith("/swap_object")]


def bank_settings(recipe: Recipe) -> dict:
    """All of a recipe that a bank's targets depend on: what shares them shares a bank."""
    whole = as_dict(recipe)
    keys = {
        "teacher": ("path", "prediction_type"), "bank": ("draws", "seed"), "loss": ("t", "log_snr", "shift"),
        "data": ("source", "images", "split", "samples", "subset", "caption"),
    }  # fmt: skip
    found = {f"{section}.{key}": whole[section][key] for section, own in keys.items() for key in own}
    return {"precision": recipe.precision, **found}


def task_settings(recipe: CLIPTDRecipe) -> dict:
    """All of a recipe that what its task asks depends on. Values that are drawn for a shift are the seed's."""
    data = as_dict(recipe)["data"]
    seed = recipe.seed if recipe.data.shift.share is not None else None
    return {key: data[key] for key in ("task", "folder", "options", "shift")} | {"seed": seed}


def target_settings(recipe: CLIPTDRecipe) -> dict:
    """All of a recipe that what CLIP says of its examples depends on: what shares them shares a folder of targets."""
    whole = as_dict(recipe)
    data, targets, drawn = whole["data"], whole["targets"], recipe.data.fraction < 1
    return {
        "student": whole["student"]["model"], "teacher": whole["teacher"], "task": task_settings(recipe),
        "fraction": data["fraction"], "seed": recipe.seed if drawn else None,
        **{key: targets[key] for key in ("select", "k", "mass")},
    }  # fmt: skip


def digest(values) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:10]


def plain(said: Reproduction) -> dict:
    return asdict(said)
