"""What a kind of recipe gives the trainer: one file a kind, sds_clip.py and clip_td.py, each a subclass of `Training`.

The trainer knows no kind: it builds one object, and asks it for student, batches, loss and evaluation.
"""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch

from fastsds.config import AnyRecipe, CLIPTDRecipe, ConfigError, Recipe


class Training:
    """A recipe's teacher, student, data and objective, on one rank.

    student: what trains, not yet under an engine. trained: the names of its trained parameters. objective: (out, batch, step,
    diagnose) -> 0-dim tensors by name, "loss" among them; with state_dict and load_state_dict. samples: how many there are,
    None where nobody knows. identity: a digest of what they are. frozen: weights of the teacher.
    """

    student: torch.nn.Module
    trained: list[str]
    objective: Callable
    samples: int | None
    identity: str | None
    frozen: int = 0

    def __init__(self, recipe: AnyRecipe, place: torch.device, rank: int, world_size: int):
        self.recipe, self.place, self.rank, self.world_size = recipe, place, rank, world_size

    @property
    def about(self) -> dict:
        """The data, as a checkpoint keeps them."""
        return {"samples": self.samples, "identity": self.identity}

    def begin(self, resumed: bool) -> None:
        """What is done once before training: on the plain student, before an engine shards it. Every rank calls it."""

    def begun(self, metrics) -> None:
        """Tell of it; the output folder is there now."""

    def batches(self, **how) -> Iterator:
        """Pairs of (batch, cursors); of a batch, `inputs` are what the student is called with. Args: how: of `data.Loader`."""
        raise NotImplementedError

    def evaluate(self, engine, step: int, metrics) -> None:
        """Measure the student through its engine, in eval mode, without gradients. Every rank calls it."""
        raise NotImplementedError

    def close(self) -> None:
        """The run is complete: drop what was only for going on."""


def check_batch(key: str, batch: int, what: str, samples: int | None) -> None:
    """Raise a ConfigError where a batch is larger than the data. Args: key: its key; what: the data; samples: None: unknown."""
    if samples is not None and batch > samples:
        raise ConfigError(f"{key} is {batch}, larger than the data: {what} has {samples} samples")


def prepare(recipe: AnyRecipe, place: torch.device, rank: int, world_size: int, dry: bool = False) -> Training:
    """The training of a recipe. Args: dry: only to be described. Raises: ConfigError."""
    if isinstance(recipe, CLIPTDRecipe):
        from fastsds.training.clip_td import CLIPTDTraining

        return CLIPTDTraining(recipe, place, rank, world_size, dry)
    from fastsds.training.sds_clip import SDSCLIPTraining

    return SDSCLIPTraining(recipe, place, rank, world_size)


def stage_before(recipe: AnyRecipe) -> tuple[Recipe, Callable[..., Training]] | None:
    """The run that a recipe asks for before its own, in a folder inside its output, and what prepares it: as `prepare` does."""
    if not isinstance(recipe, CLIPTDRecipe) or not recipe.adaptation.steps:
        return None
    from fastsds.training.clip_td import adapt, adaptation

    return adaptation(recipe), partial(adapt, recipe)


def before_of(output: Path) -> Path:
    """The folder of `stage_before` in an output folder."""
    return Path(output) / "adaptation"


def targets_of(output: Path) -> Path:
    """The folder of what CLIP says of the examples, in an output folder."""
    return Path(output) / "targets"


def kept_of(output: Path) -> list[str]:
    """Names of the folders in an output folder that a new run there takes from the one before."""
    return [folder.name for folder in (before_of(output), targets_of(output)) if folder.is_dir()]
