"""Save and restore a run through safetensors alone, by parameter name, whole or not at all.

    OUTPUT/checkpoints/step_00000200/
      student/                 a folder of the student's library with the weights in fp32, and head.safetensors
      optimizer.safetensors    "NAME.exp_avg", "NAME.exp_avg_sq" (AdamW); "recipe.*": the recipe's own state; LoRA's factors
      rank_R.safetensors       8-bit AdamW only: rank R's state as it lies
      state.json               step, recipe, data, how it was sharded, commit, versions

AdamW's state fits any engine and number of ranks; the 8-bit one fits the stage and ranks it came from. The teacher is
never here. A folder is written under another name, synced and renamed, so one that has its name is complete.
"""

import json
import os
import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import torch

from fastsds.config import AnyRecipe, ConfigError, Recipe, as_dict
from fastsds.crossmodal import read_crossmodal, save_crossmodal
from fastsds.durable import sync
from fastsds.engine import MOMENTS
from fastsds.provenance import commit, versions
from fastsds.student import beside, lora, read_student, save_student

FORMAT = 2
KEEP = 2
FREE = (
    "output", "log_every", "log.tensorboard", "log.wandb", "checkpoint_every",
    "data.workers", "data.cache", "data.max_skipped", "bank.path", "student.checkpoint", "student.compile",
    "teacher.micro_batch", "teacher.accelerate", "teacher.attention", "teacher.compile", "teacher.cuda_graph",
    "teacher.checkpoint", "eval.suite", "eval.data", "eval.every", "eval.items", "eval.splits", "eval.examples", "targets.path",
)  # fmt: skip
PLACES = (  # free, too, where the data themselves can be compared
    "data.source", "data.images", "data.folder", "data.options.images", "data.options.answers", "data.shift.lists",
)  # fmt: skip
_NAME = re.compile(r"step_(\d{8,})$")


@dataclass
class Saved:
    """A checkpoint in memory. weights: the student's state_dict; slots: AdamW's moments; recipe: the recipe's state;
    cursors: how far the data's streams were."""

    step: int
    meta: dict
    path: Path
    weights: dict[str, torch.Tensor]
    cursors: torch.Tensor
    slots: dict[str, torch.Tensor] = field(default_factory=dict)
    recipe: dict[str, torch.Tensor] = field(default_factory=dict)


def folder(output: Path) -> Path:
    return Path(output) / "checkpoints"


def steps(output: Path) -> list[int]:
    """The steps of all complete checkpoints, in order."""
    names = os.listdir(folder(output)) if folder(output).is_dir() else []
    return sorted(int(found[1]) for name in names if (found := _NAME.fullmatch(name)))


def path_of(output: Path, step: int) -> Path:
    return folder(output) / f"step_{step:08d}"


def save(
    output: Path, step: int, engine, student, recipe: AnyRecipe, objective, data: dict, cursors: torch.Tensor
) -> Path:
    """Write one checkpoint and drop all but it and the one before it, later ones, too: the run went back. Collective: every
    rank calls; rank 0 writes the whole parts.

    Args: data: "samples", how many it has, and its "identity"; None where nobody knows. cursors: of its streams.
    """
    from safetensors.torch import save_file

    eight_bit = recipe.optimizer.name == "adamw8bit"
    final = path_of(output, step)
    partial = final.with_name(f".partial_{final.name}")
    weights, slots = engine.state(moments=not eight_bit)
    own = objective.state_dict()  # collective
    if engine.rank == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    engine.barrier()
    if eight_bit:
        save_file(engine.raw_state(), partial / f"rank_{engine.rank}.safetensors")
    engine.barrier()
    if engine.rank == 0:
        save_model(weights, student, partial / "student", recipe)
        extra = beside(weights) | {f"recipe.{k}": v.detach().cpu() for k, v in own.items()}
        save_file({k: v.contiguous() for k, v in {**slots, **extra}.items()}, partial / "optimizer.safetensors")
        meta = {
            "format": FORMAT,
            "step": step,
            "updates": engine.updates(),
            **data,
            "cursors": cursors.tolist(),
            "engine": {"deepspeed": engine.stage is not None, "stage": engine.stage, "ranks": engine.world_size},
            "recipe": as_dict(recipe),
            "commit": commit(),
            "versions": versions(),
        }
        (partial / "state.json").write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")
        _sync(partial)
        if final.exists():
            shutil.rmtree(final)
        partial.rename(final)
        sync(final.parent)
        there = steps(output)
        for old in {*there} - {*[s for s in there if s <= step][-KEEP:]}:
            shutil.rmtree(path_of(output, old))
    engine.barrier()
    return final


def save_model(weights: dict[str, torch.Tensor], student, folder: Path, recipe: AnyRecipe) -> None:
    """Write a student as a folder of its library."""
    (save_student if isinstance(recipe, Recipe) else save_crossmodal)(weights, student, folder)


def find(resume: str, output: Path) -> Path:
    """The folder that `--resume` names: "latest" in the output folder, or a path. Raises: ConfigError."""
    if resume == "latest":
        if not (complete := steps(output)):
            raise ConfigError(f"--resume latest: no complete checkpoint in {folder(output)}")
        return path_of(output, complete[-1])
    path = Path(resume)
    if not (path / "state.json").is_file():
        raise ConfigError(f"--resume {path}: not a checkpoint folder (expected state.json in it)")
    return path


def load(path: Path, recipe: AnyRecipe, data: dict) -> Saved:
    """Read a checkpoint, to go on with these data (as `save` takes them).

    Raises: ConfigError that names the file, or the recipe key that differs.
    """
    meta = read_meta(path)
    _same_recipe(path, meta["recipe"], as_dict(recipe), FREE if data["identity"] is None else FREE + PLACES)
    key = "data.source" if isinstance(recipe, Recipe) else "data.task"
    if data["samples"] not in (None, meta["samples"]):
        raise ConfigError(f"--resume {path}: {key} has {data['samples']} samples, the checkpoint saw {meta['samples']}")
    if data["identity"] not in (None, meta["identity"]):
        raise ConfigError(f"--resume {path}: {key} holds other images or captions than the checkpoint saw")
    rest = _read(path / "optimizer.safetensors")
    exact = beside(rest)
    reads = read_student if isinstance(recipe, Recipe) else read_crossmodal
    if isinstance(recipe, Recipe) and "clip.logit_scale" not in exact:
        raise ConfigError(f"--resume {path / 'optimizer.safetensors'}: tensor clip.logit_scale is missing")
    weights = reads(path / "student") | {key: rest.pop(key) for key in exact}
    own = {key.removeprefix("recipe."): rest.pop(key) for key in list(rest) if key.startswith("recipe.")}
    return Saved(meta["step"], meta, path, weights, torch.tensor(meta["cursors"]), rest, own)


def read_meta(path: Path) -> dict:
    try:
        meta = json.loads((path / "state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"--resume {path / 'state.json'}: {error}") from error
    if meta.get("format") != FORMAT:
        raise ConfigError(f"--resume {path}: checkpoint format {meta.get('format')}, expected {FORMAT}")
    return meta


def put_weights(saved: Saved, student: torch.nn.Module, trained: list[str]) -> None:
    """Load the weights into a student that no engine holds yet. Raises: ConfigError that names the tensor."""
    saved.weights = lora.split(student, saved.weights, f"--resume {saved.path}")
    target = student.state_dict()
    slots = {f"{n}.{m}" for n in trained for m in MOMENTS} if saved.meta["recipe"]["optimizer"]["name"] == "adamw" else set()
    for ours, theirs in ((target, saved.weights), (slots, saved.slots)):
        if odd := sorted(set(ours) ^ set(theirs)):
            where = "missing" if odd[0] in ours else "not this student's"
            raise ConfigError(f"--resume {saved.path}: tensor {odd[0]} is {where}")
    for name, tensor in target.items():
        for key in (name, *(f"{name}.{m}" for m in MOMENTS if f"{name}.{m}" in slots)):
            held = saved.weights if key == name else saved.slots
            if tensor.numel() != held[key].numel():
                shapes = f"{tuple(held[key].shape)}, expected {tuple(tensor.shape)}"
                raise ConfigError(f"--resume {saved.path}: tensor {key} has shape {shapes}")
            held[key] = held[key].reshape(tensor.shape)
    student.load_state_dict(saved.weights)


def check_engine(saved: Saved, recipe: AnyRecipe, stage: int | None, rank: int, world_size: int) -> None:
    """Raise ConfigError where 8-bit state would meet another stage or number of ranks, or is not there."""
    if recipe.optimizer.name != "adamw8bit":
        return
    here, was = {"deepspeed": stage is not None, "stage": stage, "ranks": world_size}, saved.meta["engine"]
    if was != here:
        raise ConfigError(
            f"--resume {saved.path}: 8-bit Adam's state fits only where it was made: {_show(was)}; this run is "
            f"{_show(here)}"
        )
    if not (saved.path / f"rank_{rank}.safetensors").is_file():
        raise ConfigError(f"--resume {saved.path}: rank_{rank}.safetensors is missing")


def put_state(saved: Saved, engine, objective, recipe: AnyRecipe) -> None:
    """Restore masters, moments and the recipe's state into a fresh engine. Collective."""
    engine.load_moments(saved.meta["updates"], saved.weights, saved.slots)
    if recipe.optimizer.name == "adamw8bit":
        engine.load_raw_state(_read(saved.path / f"rank_{engine.rank}.safetensors"))
    objective.load_state_dict({k: v.to(engine.device) for k, v in saved.recipe.items()})


def _read(file: Path) -> dict[str, torch.Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"--resume {file}: {str(error).splitlines()[0]}") from error


def _same_recipe(path: Path, then: dict, now: dict, free: tuple[str, ...]) -> None:
    then, now = _flat(then), _flat(now)
    for key in [*now, *(k for k in then if k not in now)]:
        if not any(key == name or key.startswith(f"{name}.") for name in free) and then.get(key) != now.get(key):
            hint = "; the cosine runs to `steps`, so it cannot change half-way" if key == "steps" else ""
            raise ConfigError(
                f"--resume {path}: {key} is {json.dumps(now.get(key))}, the checkpoint was made with "
                f"{json.dumps(then.get(key))}{hint}"
            )


def _flat(values: dict, prefix: str = "") -> dict:
    flat = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _show(engine: dict) -> str:
    kind = f"ZeRO {engine['stage']}" if engine["deepspeed"] else "plain torch"
    return f"{kind} on {engine['ranks']} rank(s)"


def _sync(root: Path) -> None:
    """fsync every file and folder under root."""
    for path in [*root.rglob("*"), root]:
        sync(path)
