"""What a file of `fastsds reproduce` may say, and what can be checked of it without recipes, suites and data."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Literal

from fastsds.config import ConfigError
from fastsds.evaluation.suite import options_of
from fastsds.strict import nearest, show

ALL = "all"
START = "pretrained"  # what every arm of a backbone starts from
OWN = {"seed": "seeds", "output": "output"}  # keys of a recipe that the file has for itself
PATHS = ("images", "classes", "templates")  # options of suites that are relative to the file
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]*$")


@dataclass(frozen=True)
class Backbone:
    """pretrain: a command that leaves a student in {folder}/student, {seed} by {seed}; none: `student.model` as it is."""

    sets: dict = field(default_factory=dict)
    pretrain: tuple[str, ...] = ()


@dataclass(frozen=True)
class Arm:
    """One way to train.

    recipe, pretrain: in place of the file's and the backbone's. against: whose scores its own are compared with. same_time_as:
    train for as long as that arm did, by the measured speeds.
    """

    label: str | None = None
    recipe: str | None = None
    sets: dict = field(default_factory=dict)
    against: tuple[str, ...] = ()
    same_time_as: str | None = None
    pretrain: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Asked:
    """One suite, or the recipes' task. options: of its loader. splits: of a task. headline: its columns (none: the suite's
    own); claims: what is tested, Holm's correction over all of them; zero_shot: what must not be lost."""

    suite: str | None = None
    path: str | None = None
    options: dict = field(default_factory=dict)
    splits: tuple[str, ...] = ()
    headline: tuple[str, ...] = ()
    claims: tuple[str, ...] = ()
    zero_shot: tuple[str, ...] = ()


@dataclass(frozen=True)
class Reproduction:
    """What a file says; `file` and `overrides` (--set) are added by `load`."""

    recipe: str | None = None
    output: str = "runs/reproduce"
    sets: dict = field(default_factory=dict)
    seeds: int = 5
    pairs: tuple[int | float | Literal["all"], ...] = (ALL,)       # of CLIP-TD: fractions of the training examples
    backbones: dict[str, Backbone] = field(default_factory=dict)
    arms: dict[str, Arm] = field(default_factory=dict)
    evaluation: dict[str, Asked] = field(default_factory=dict)
    zero_shot_bound: float = 0.5


def twin(said: Reproduction, arm: str) -> str | None:
    """Another arm with the same settings and steps of its own: the one by whose speed `same_time_as` is reckoned."""

    def settings(name: str):
        return said.arms[name].recipe, said.arms[name].sets, said.arms[name].pretrain

    return next((a for a in said.arms if a != arm and settings(a) == settings(arm) and said.arms[a].same_time_as is None), None)


def trained(said: Reproduction) -> Iterable[tuple[str, float | str, str]]:
    """(backbone, pairs, arm) of all that is trained, for each seed."""
    return product(said.backbones, said.pairs, said.arms)


def check_file(file: Path, said: Reproduction) -> None:
    def wrong(key: str, value, expected: str) -> ConfigError:
        return ConfigError(f"{file}: {key} is {show(value)}; expected {expected}")

    if said.seeds < 1:
        raise wrong("seeds", said.seeds, "at least 1")
    if not said.zero_shot_bound >= 0:
        raise wrong("zero_shot_bound", said.zero_shot_bound, "at least 0, in points")
    if not said.pairs or len(set(said.pairs)) < len(said.pairs) or any(p != ALL and p <= 0 for p in said.pairs):
        raise wrong("pairs", said.pairs, "numbers of pairs, at least 1 and each once, or all")
    for key in ("backbones", "arms", "evaluation"):
        names = getattr(said, key)
        if not names:
            raise wrong(key, names, "at least one")
        for name in names:
            if not NAME.match(name) or name == START:
                raise wrong(f"{key}: the name", name, f"letters, digits, _ . + -, as a folder has; not {START}")
    labels = {START: START}
    for name, arm in said.arms.items():
        if (label := arm.label or name) in labels:
            raise wrong(f"arms.{name}.label", arm.label, f"another than {labels[label]}'s")
        labels[label] = name
    for name, arm in said.arms.items():
        if len(set(arm.against)) < len(arm.against):
            raise wrong(f"arms.{name}.against", arm.against, "each once: a claim that is made twice counts twice in Holm's")
        for key, others in (("against", arm.against), ("same_time_as", (arm.same_time_as,) if arm.same_time_as else ())):
            for other in others:
                known = [a for a in (*said.arms, START) if a != name and (a != START or key == "against")]
                if other not in known:
                    near = f"; the nearest is {nearest(other, known)!r}" if known else ""
                    raise wrong(f"arms.{name}.{key}", other, f"another arm{near}")
        if arm.same_time_as and said.arms[arm.same_time_as].same_time_as:
            raise wrong(f"arms.{name}.same_time_as", arm.same_time_as, "an arm that trains for steps of its own")
        if arm.same_time_as and twin(said, name) is None:
            raise wrong(f"arms.{name}.sets", arm.sets, "those of another arm, by whose speed its time is reckoned in steps")
    for where, sets in _sets(said).items():
        for key, instead in OWN.items():
            if key in sets:
                raise wrong(f"{where}.{key}", sets[key], f"none: it is what `{instead}` says")
    for name, asked in said.evaluation.items():
        if asked.path is not None and not asked.path.strip():
            raise wrong(f"evaluation.{name}.path", asked.path, "a text that is not empty")
        if asked.splits:  # a task; what it may have is checked with the recipes
            continue
        try:
            known = options_of(asked.suite or name)
        except ConfigError as error:
            raise ConfigError(f"{file}: evaluation.{name}: {error}") from None
        for option, value in asked.options.items():
            if option not in known:
                raise wrong(f"evaluation.{name}.options: the name", option, f"one of {', '.join(known)}")
            kind, expected = (int, "a whole number") if known[option] is int else (str, "text")
            if not isinstance(value, kind) or isinstance(value, bool):
                raise wrong(f"evaluation.{name}.options.{option}", value, expected)
    for of in (said.backbones, said.arms):
        for name, section in of.items():
            if section.pretrain and not any("{folder}" in word for word in section.pretrain):
                where = f"{'backbones' if of is said.backbones else 'arms'}.{name}.pretrain"
                raise wrong(where, section.pretrain, "a command with {folder}, where it leaves student/, and {seed}")


def _sets(said: Reproduction) -> dict[str, dict]:
    """All `sets` of a file, by where they are."""
    kinds = {"backbones": said.backbones, "arms": said.arms}
    return {"sets": said.sets} | {f"{key}.{n}.sets": section.sets for key, of in kinds.items() for n, section in of.items()}


def only_of(said: Reproduction, only: Sequence[str]) -> Reproduction:
    """The arms and backbones of these names; comparisons with others are left out."""
    kinds = {"arms": said.arms, "backbones": said.backbones}
    for name in only:
        if not any(name in of for of in kinds.values()):
            raise ConfigError(f"--only: {name!r} is not one of {', '.join([*said.arms, *said.backbones])}")
    kept = {key: {n: v for n, v in of.items() if n in only} or of for key, of in kinds.items()}
    arms = kept["arms"]
    for name, arm in arms.items():
        for other in (arm.same_time_as, twin(said, name)) if arm.same_time_as else ():
            if other not in arms:
                raise ConfigError(f"--only: {name} trains as long as {arm.same_time_as}; name {other}, too")
        arms = arms | {name: replace(arm, against=tuple(a for a in arm.against if a in (*kept["arms"], START)))}
    return replace(said, arms=arms, backbones=kept["backbones"])
