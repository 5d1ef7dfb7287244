"""Recipes read, checked and written."""
import dataclasses
import importlib.util
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from fastsds.config.clip_td import CLIPTDRecipe
from fastsds.config.sds_clip import Recipe
from fastsds.strict import ConfigError, key_of, merge, parse, read_yaml, show

_HERE = Path(__file__).resolve().parent.parent
CONFIGS = _HERE / "configs" if (_HERE / "configs").is_dir() else _HERE.parent / "configs"   # wheel | source tree
KINDS = {"sds_clip": Recipe, "clip_td": CLIPTDRecipe}
AnyRecipe = Recipe | CLIPTDRecipe


def _get(recipe: AnyRecipe, key: str):
    """The value of a key; None of an option that is not given."""
    for name in key.split("."):
        found = recipe
        recipe = found.get(name) if isinstance(found, dict) else getattr(found, "lambda_" if name == "lambda" else name)
    return recipe


# -- paths -------------------------------------------------------------------------------------------------------------

def _resolve(recipe: AnyRecipe, keys, folder: Path) -> AnyRecipe:
    """Make the paths under `keys` absolute, relative to `folder`."""
    for key in keys:
        value = _get(recipe, key)
        if isinstance(value, dict):
            recipe = _put(recipe, key, {name: _absolute(path, folder) for name, path in value.items()})
        elif key not in recipe.maybe_paths or _looks_like_path(value, folder):      # else a name that open_clip knows
            recipe = _put(recipe, key, _absolute(value, folder))
    return recipe


def _looks_like_path(value: str | None, folder: Path) -> bool:
    return bool(value) and (value.startswith((".", "~", "/")) or (folder / Path(value).expanduser()).exists())


def _absolute(value, folder: Path):
    if not isinstance(value, str) or not value or value == "world" or "://" in value or re.match(r"[a-z-]+:", value):
        return value                                                  # hf-hub:..., local-dir:...
    return str((folder / Path(value).expanduser()).resolve())


def _put(node, key: str, value):
    """A section, or dict, with the value of a key in it; an option that is not given stays so."""
    name, _, rest = key.partition(".")
    if isinstance(node, dict):
        return node | {name: value} if name in node else node
    return dataclasses.replace(node, **{name: _put(getattr(node, name), rest, value) if rest else value})


# -- public ------------------------------------------------------------------------------------------------------------

class Over(NamedTuple):
    """Values over a recipe. Of `values` the keys are whole ("loss.t"); folder: what their paths are relative to."""

    origin: str
    values: dict[str, Any]
    folder: Path


def load_recipe(
    path: str | Path | AnyRecipe | None = None, overrides: Sequence[str | Over] = (), checked: bool = True,
    only: type | None = None,
) -> AnyRecipe:
    """Read a recipe, or take one, and apply `a.b=c` overrides in order; without it, start from the embedded world's recipe.

    Args: overrides, each "key=value" with the full key and a YAML value: "loss.lambda=auto", "loss.t=[0.3, 1.0]"; or an `Over`.
        checked: False leaves ranges and what keys ask of each other to a later call. only: the kind that the caller knows.
    Raises: ConfigError for a missing file, an unknown or repeated key, a wrong type, a value out of range.
    """
    recipe, origins = Recipe() if path is None or isinstance(path, (str, Path)) else path, {}
    if isinstance(path, (str, Path)):
        path = Path(path)
        values = read_yaml(path, "recipe")
        recipe = merge(_kind(values, path)(), values, str(path), origins)
        recipe = _resolve(recipe, recipe.paths + recipe.maybe_paths, path.resolve().parent)
    if only is not None and not isinstance(recipe, only):
        where = f"{path}: " if isinstance(path, Path) else ""
        raise ConfigError(f"{where}recipe is {recipe.recipe}; expected {only().recipe}: this command knows no other")
    for override in overrides:
        over, own = _of_text(override) if isinstance(override, str) else override, {}
        for key, value in over.values.items():
            for name in reversed(str(key).split(".")):
                value = {name: value}
            recipe = merge(recipe, value, over.origin, own)
        recipe = _resolve(recipe, _named(recipe, own), over.folder)
        origins |= own
    if checked:
        file = path if isinstance(path, (str, Path)) else "default recipe"
        _check_values(recipe, lambda key: origins.get(key, str(file)))
    return recipe


def _kind(values: Any, path: Path) -> type:
    """The class of what a file says."""
    name = values.get("recipe", "sds_clip") if isinstance(values, dict) else "sds_clip"
    if not isinstance(name, str) or name not in KINDS:
        raise ConfigError(f"{path}: recipe is {show(name)}; expected one of {', '.join(KINDS)}")
    return KINDS[name]


def _named(recipe: AnyRecipe, origins: dict[str, str]) -> list[str]:
    """The keys of paths that were given, or the dict that they are in."""
    return [key for key in recipe.paths + recipe.maybe_paths if key in origins or key.rpartition(".")[0] in origins]


def _of_text(override: str) -> Over:
    """What `--set key=value` says."""
    origin = f"--set {override}"
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"{origin}: expected key=value, for example loss.lambda=30")
    return Over(origin, {key.strip(): parse(text, origin)}, Path.cwd())


def _check_values(recipe: AnyRecipe, origin) -> None:
    for key, (test, expected) in recipe.ranges.items():
        value = _get(recipe, key)
        if value is not None and value != "auto" and not test(value):
            raise ConfigError(f"{origin(key)}: {key} is {show(value)}; expected {expected}")
    recipe.check_values(origin)


def load_deepspeed(path: str | Path) -> dict:
    """Read a DeepSpeed configuration (JSON): how to shard. Raises ConfigError if it is missing or not a JSON object."""
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such DeepSpeed file") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: not a JSON file that can be read: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected a JSON object, found {show(values)}")
    return values


def check(recipe: AnyRecipe, world_size: int = 1, deepspeed_json: dict | None = None) -> None:
    """Check everything that a recipe cannot know alone: the ranks, the DeepSpeed file, the files it points at.

    data.batch = micro-batch x ranks; DeepSpeed's train_batch_size = data.batch x accumulation.
    Raises: ConfigError.
    """
    batch, accumulation = recipe.data.batch, recipe.data.accumulation
    if batch % world_size:
        raise ConfigError(f"data.batch is {batch}, over all ranks; expected a multiple of "
                          f"{world_size}, the number of ranks")
    if recipe.data.streams % world_size:
        raise ConfigError(f"data.streams is {recipe.data.streams}; expected a multiple of {world_size}, the number of ranks "
                          f"(--set data.streams={max(1, recipe.data.streams // world_size) * world_size})")
    recipe.check(world_size)
    for key, wanted, package in (("log.tensorboard", recipe.log.tensorboard, "tensorboard"),
                                 ("log.wandb", recipe.log.wandb, "wandb")):
        if wanted and importlib.util.find_spec(package) is None:
            raise ConfigError(f"{key} is {show(wanted)}, and the package {package} is missing: "
                              "pip install 'fastsds[logs]'")
    config = deepspeed_json or {}
    zero = config.get("zero_optimization")
    if recipe.student.compile and isinstance(zero, dict) and zero.get("stage") == 3:
        raise ConfigError(f"student.compile is {show(recipe.student.compile)}; expected null with ZeRO 3, whose linear layer "
                          "torch.compile differentiates wrongly; ZeRO 0 to 2 compile")
    for key, expected, reason in (
        ("train_micro_batch_size_per_gpu", batch // world_size, f"data.batch {batch} / {world_size} ranks"),
        ("gradient_accumulation_steps", accumulation, "data.accumulation"),
        ("train_batch_size", batch * accumulation, f"data.batch {batch} x data.accumulation {accumulation}"),
        ("gradient_clipping", recipe.optimizer.clip, "optimizer.clip"),
    ):
        if key in config and config[key] != expected:
            raise ConfigError(f"DeepSpeed file: {key} is {show(config[key])}, the recipe says {expected} ({reason}); "
                              "leave the key out of the DeepSpeed file or make them agree")
    for key in ("optimizer", "scheduler"):
        if key in config:
            raise ConfigError(f"DeepSpeed file: the section {key!r} belongs to the recipe (optimizer.*); take it out")
    for key in ("bf16", "fp16"):
        section = config.get(key, {})
        enabled = section.get("enabled") if isinstance(section, dict) else section
        if enabled is not None and enabled != (recipe.precision == key):
            raise ConfigError(f"DeepSpeed file: {key}.enabled is {show(enabled)}, the recipe's precision is "
                              f"{recipe.precision}; leave the key out of the DeepSpeed file or make them agree")


def as_dict(recipe: AnyRecipe) -> dict:
    """The recipe as plain dicts, lists and scalars, keyed as in YAML."""
    def plain(value):
        if dataclasses.is_dataclass(value):
            return {key_of(f.name): plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return list(value) if isinstance(value, tuple) else dict(value) if isinstance(value, dict) else value
    return plain(recipe)


def dump_recipe(recipe: AnyRecipe) -> str:
    """The recipe as YAML with every value written; `load_recipe` of it gives an equal recipe."""
    return yaml.safe_dump(as_dict(recipe), sort_keys=False, default_flow_style=None, allow_unicode=True, width=110)
