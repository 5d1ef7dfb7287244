"""A student's weights on disk: the folder that its library reads, with the head beside the CLIP.

open_clip: open_clip_config.json, open_clip_model.safetensors (`local-dir:FOLDER`); transformers: config.json,
model.safetensors, preprocessor_config.json. Both: tokenizer files, and head.safetensors, which they leave alone.
"""

import json
import math
import shutil
from pathlib import Path

import torch

from fastsds.config import ConfigError
from fastsds.student import hf, lora, openclip
from fastsds.student.head import HEAD_FILE, read_head
from fastsds.student.model import MAX_LOGIT_SCALE, Student
from fastsds.weights import open_safetensors

FORMATS = {openclip.CONFIG_FILE: openclip.WEIGHTS_FILE, hf.CONFIG_FILE: hf.WEIGHTS_FILE}  # the first that is there


def save_student(state: dict[str, torch.Tensor], like: Student | Path, out: Path) -> None:
    """Write a student's state as a folder that its library loads, and the head beside it.

    Args: state: `Student.state_dict()`, whole tensors; LoRA's products are added to their matrices. like: the student, or
        the folder it came from, which gives configuration and tokenizer files. Plain open_clip or transformers gets the
        same features from `out`.
    """
    from safetensors.torch import save_file

    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    if isinstance(like, Student):
        like.family.save(out)
        state = lora.merge(like, state)
    else:
        for file in sorted(Path(like).iterdir()):
            weights = file.suffix in openclip.WEIGHT_SUFFIXES
            if file.is_file() and not weights and file.resolve() != (out / file.name).resolve():
                shutil.copyfile(file, out / file.name)
    parts: dict[str, dict] = {"clip": {}, "head": {}}
    for name, tensor in state.items():
        part, _, rest = name.partition(".")
        if part not in parts or not rest:
            raise ValueError(f"{name}: not a student's tensor, expected clip.* or head.*")
        parts[part][rest] = tensor.detach().cpu().contiguous().clone()
    clip = parts["clip"]
    shape = like.family.scalar if isinstance(like, Student) else _scalar(out)
    clip["logit_scale"] = clip["logit_scale"].clamp(max=MAX_LOGIT_SCALE).reshape(shape)
    if "logit_bias" in clip:
        clip["logit_bias"] = clip["logit_bias"].reshape(shape)
    write_whole(out / _format(out), lambda path: save_file(clip, path, metadata={"format": "pt"}))
    if parts["head"]:
        shape = like.latent_shape if isinstance(like, Student) else _shape_of_head(like, parts["head"])
        meta = {"latent_shape": json.dumps(list(shape))}
        write_whole(out / HEAD_FILE, lambda path: save_file(parts["head"], path, metadata=meta))


def read_student(folder: Path) -> dict[str, torch.Tensor]:
    """The state that `save_student` wrote, by the names of `Student.state_dict()`; the logit scale is clamped, of the
    library's shape. Raises: ConfigError that names the file.
    """
    state = {}
    with open_safetensors(Path(folder) / _format(folder)) as file:
        state |= {f"clip.{key}": file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    if head := read_head(folder):
        state |= {f"head.{key}": tensor for key, tensor in head[1].items()}
    return state


def beside(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What of a state `save_student` does not write as it is, and a run that goes on needs: the unclamped logit scale, and
    LoRA's factors.
    """
    return {name: tensor for name, tensor in state.items() if name == "clip.logit_scale" or lora.is_factor(name)}


def _format(folder: Path) -> str:
    """The name of the weights file in a folder, by its configuration file."""
    for config, weights in FORMATS.items():
        if (Path(folder) / config).is_file():
            return weights
    raise ConfigError(f"{folder}: no {' and no '.join(FORMATS)}: not a student's folder")


def _scalar(folder: Path) -> tuple[int, ...]:
    if _format(folder) == openclip.WEIGHTS_FILE:
        return ()
    return hf.SCALARS[json.loads((folder / hf.CONFIG_FILE).read_text(encoding="utf-8"))["model_type"]]


def _shape_of_head(like: Path, state: dict) -> tuple[int, ...]:
    saved = read_head(Path(like))
    if saved is None or math.prod(saved[0]) != state["linear.bias"].numel():
        raise ValueError(f"the latent shape of the head is unknown: {like} has no {HEAD_FILE} like it; pass the student")
    return saved[0]


def write_whole(path: Path, write) -> None:
    """Write a file whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    write(partial)
    partial.replace(path)
