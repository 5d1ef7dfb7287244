"""A cross-modal student on disk: a transformers folder, and head.safetensors beside it, which transformers leaves alone.

head.safetensors: "head.*", and "projections.*" or whatever else a recipe hung on the student; metadata: the classes
as JSON, a list of their names or their number.
"""

import json
from pathlib import Path
from typing import NamedTuple

import torch

from fastsds.config import ConfigError
from fastsds.crossmodal.model import CrossModal
from fastsds.student import lora
from fastsds.student.head import HEAD_FILE
from fastsds.student.hf import WEIGHTS_FILE
from fastsds.student.saving import write_whole
from fastsds.weights import open_safetensors


def save_crossmodal(weights: dict[str, torch.Tensor], model: CrossModal, folder: Path) -> None:
    """Write a student's state as a folder that its library loads, and the head beside it.

    Args: weights: `CrossModal.state_dict()`, whole tensors; LoRA's products are added to their matrices.
    """
    from safetensors.torch import save_file

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    model.family.save(folder)
    state = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in lora.merge(model, weights).items()}
    inner = {name.removeprefix("model."): tensor for name, tensor in state.items() if name.startswith("model.")}
    rest = {name: tensor for name, tensor in state.items() if not name.startswith("model.")}
    write_whole(folder / WEIGHTS_FILE, lambda path: save_file(inner, path, metadata={"format": "pt"}))
    says = {"classes": json.dumps(model.answers or model.classes)}
    write_whole(folder / HEAD_FILE, lambda path: save_file(rest, path, metadata=says))


def read_crossmodal(folder: Path) -> dict[str, torch.Tensor]:
    """The state that `save_crossmodal` wrote, what a recipe added included. Raises: ConfigError that names the file."""
    folder = Path(folder)
    if (saved := read_head(folder)) is None:
        raise ConfigError(f"{folder}: no {HEAD_FILE}: not a cross-modal student's folder")
    with open_safetensors(folder / WEIGHTS_FILE) as file:
        return {f"model.{key}": file.get_tensor(key) for key in file.keys()} | saved.state  # noqa: SIM118


class SavedHead(NamedTuple):
    """answers: the classes' names, or their number; 0: one score a choice."""

    answers: int | tuple[str, ...]
    state: dict[str, torch.Tensor]


def read_head(folder: Path) -> SavedHead | None:
    """A folder's head, or None. Raises: ConfigError."""
    if not (path := Path(folder) / HEAD_FILE).is_file():
        return None
    with open_safetensors(path) as file:
        says = (file.metadata() or {}).get("classes", "")
        state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    try:
        answers = json.loads(says)
    except ValueError:
        answers = None
    if isinstance(answers, list) and answers and all(isinstance(name, str) for name in answers):
        return SavedHead(tuple(answers), state)
    if type(answers) is int and answers >= 0:
        return SavedHead(answers, state)
    raise ConfigError(f"{path}: not the head of a cross-modal student (expected its classes, as JSON, in the metadata)")
