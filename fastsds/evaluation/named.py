"""Scorers by the names that a command line gives: a model's, `diffusion`, or MODULE:NAME of anybody's own."""

import importlib
import os
import re
import sys
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import torch

from fastsds.config import ConfigError, Recipe
from fastsds.crossmodal import CrossModal, load_crossmodal
from fastsds.evaluation.diffusion_score import DiffusionScorer
from fastsds.evaluation.scorer import BATCH, WORKERS, ClipScorer
from fastsds.hub import HUB
from fastsds.student import Student, load_student

AUTOCAST = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
WANTED = "a run's or a student's folder, NAME:TAG or NAME:FILE of open_clip, hf-hub:ORG/NAME, or world"


def scorer(asked: Namespace, model: str | None, device: torch.device):
    """The scorer of the command line. Args: model: which one it is asked for: --model or --baseline; of `diffusion` none."""
    if asked.scorer == "diffusion" and model is None:
        return diffusion(asked, device)
    if ":" in asked.scorer:
        return own(asked.scorer, model)
    batch, workers = asked.batch or BATCH, WORKERS if asked.workers is None else asked.workers
    return ClipScorer(student(model, device), called(model), AUTOCAST[asked.precision], batch, workers)


def student(text: str, device: torch.device) -> Student:
    """Load the model that a name stands for. Raises: ConfigError that begins with the name."""
    name, _, pretrained = text.removeprefix("local-dir:").partition(":")
    try:
        if text == "world" or text.startswith(HUB):
            return load_student(text, device=device).eval()
        if (folder := Path(text.removeprefix("local-dir:")).expanduser()).is_dir():
            from fastsds.export.origin import find

            return load_student(find(folder).student, device=device).eval()
        if folder.is_file():
            raise ConfigError("a file of weights; expected NAME:FILE, NAME its architecture, as in ViT-B-32-quickgelu:FILE")
        if not pretrained and name in _listed():
            raise ConfigError(f"an architecture without weights; expected one of {', '.join(_tags(name)) or f'{name}:FILE'}")
        if not pretrained or name not in _listed():
            raise ConfigError(f"expected {WANTED}")
        return load_student(name, str(Path(pretrained).expanduser()), device=device).eval()
    except ConfigError as error:
        raise ConfigError(f"model {text}: {error}") from error


def crossmodal(text: str, device: torch.device) -> CrossModal:
    """Load the cross-modal student of a folder. Raises: ConfigError that begins with its name."""
    from fastsds.export.origin import find

    try:
        return load_crossmodal(find(Path(text).expanduser()).student, device=device).eval()
    except ConfigError as error:
        raise ConfigError(f"model {text}: {error}") from error


def diffusion(asked: Namespace, device: torch.device) -> DiffusionScorer:
    """The teacher as scorer; its UNet is accelerated as in training."""
    from fastsds.teacher import Teacher

    recipe = replace(Recipe(), precision=asked.precision, teacher=replace(Recipe().teacher, path=asked.teacher))
    how = {"steps": asked.steps, "weighting": asked.weighting, "correction": asked.correction, "batch": asked.batch}
    how = {name: value for name, value in how.items() if value is not None}
    try:
        made = DiffusionScorer(Teacher.of(recipe, device), band=asked.log_snr and tuple(asked.log_snr), stop=asked.stop, **how)
    except ValueError as error:
        raise ConfigError(f"--scorer diffusion: {error}") from error
    made.name = f"diffusion:{asked.teacher}"
    return made


def own(text: str, model: str | None):
    """Anything with `score`, `name` and `settings` (`scorer.Scorer`), or what makes one: of a model's name, if there is one."""
    module, _, name = text.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"--scorer {text}: {error}; expected MODULE:NAME, of a module that Python finds from here") from error
    if isinstance(found, type) or not hasattr(found, "score"):
        if not callable(found):
            raise ConfigError(f"--scorer {text}: it is {found!r}; expected a scorer, or what makes one")
        found = found() if model is None else found(model)
    if missing := [of for of in ("score", "name", "settings") if not hasattr(found, of)]:
        raise ConfigError(
            f"--scorer {text}: it has no {missing[0]}; expected score(images, captions), name, and settings, a dict of what "
            "its scores depend on"
        )
    return found


def called(model: str) -> str:
    """What results call a model: a folder by its shortest path."""
    return os.path.normpath(model) if Path(model).is_dir() else model


def folder(name: str) -> str:
    """A scorer's or student's name as a folder's."""
    return re.sub(r"[^\w.+-]+", "_", name).strip("_.") or "model"


def _listed() -> list[str]:
    import open_clip

    return open_clip.list_models()


def _tags(name: str) -> list[str]:
    import open_clip

    return [f"{name}:{tag}" for tag in open_clip.list_pretrained_tags_by_model(name)]
