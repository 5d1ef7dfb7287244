"""A student's weights on disk: an open_clip folder, with the head beside the CLIP, that plain open_clip loads."""

import json
import math
import shutil
from pathlib import Path

import torch

from fastsds.student.head import HEAD_FILE, read_head
from fastsds.student.model import MAX_LOGIT_SCALE, Student
from fastsds.student.openclip import WEIGHT_SUFFIXES, WEIGHTS_FILE


def save_student(state: dict[str, torch.Tensor], like: Student | Path, out: Path) -> None:
    """Write a student's state as an open_clip folder: config, weights, tokenizer files, and the head beside them.

    Args: state: `Student.state_dict()`, whole tensors. like: the student, or the folder it came from, which gives
        config and tokenizer files. A `local-dir:` load of `out` in plain open_clip gives the same features.
    """
    from safetensors.torch import save_file

    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    if isinstance(like, Student):
        like.family.save(out)
    else:
        for file in sorted(Path(like).iterdir()):
            if file.is_file() and file.suffix not in WEIGHT_SUFFIXES and file.resolve() != (out / file.name).resolve():
                shutil.copyfile(file, out / file.name)
    parts: dict[str, dict] = {"clip": {}, "head": {}}
    for name, tensor in state.items():
        part, _, rest = name.partition(".")
        if part not in parts or not rest:
            raise ValueError(f"{name}: not a student's tensor, expected clip.* or head.*")
        parts[part][rest] = tensor.detach().cpu().contiguous().clone()
    clip = parts["clip"]
    clip["logit_scale"] = clip["logit_scale"].clamp(max=MAX_LOGIT_SCALE).reshape(())
    if "logit_bias" in clip:
        clip["logit_bias"] = clip["logit_bias"].reshape(())
    _replace(out / WEIGHTS_FILE, lambda path: save_file(clip, path))
    if parts["head"]:
        shape = like.latent_shape if isinstance(like, Student) else _shape_of_head(like, parts["head"])
        meta = {"latent_shape": json.dumps(list(shape))}
        _replace(out / HEAD_FILE, lambda path: save_file(parts["head"], path, metadata=meta))


def _shape_of_head(like: Path, state: dict) -> tuple[int, ...]:
    saved = read_head(Path(like))
    if saved is None or math.prod(saved[0]) != state["linear.bias"].numel():
        raise ValueError(f"the latent shape of the head is unknown: {like} has no {HEAD_FILE} like it; pass the student")
    return saved[0]


def _replace(path: Path, write) -> None:
    """Write a file whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    write(partial)
    partial.replace(path)
