"""What of a student trains."""

import difflib
from fnmatch import fnmatchcase

from torch import nn

from fastsds.config import ConfigError, LoRAConfig
from fastsds.student import lora

IMAGE = ("visual.", "vision_model.", "visual_projection.")  # how the names of an image tower's parameters begin


def apply_tuning(
    student: nn.Module,
    tune: str | tuple[str, ...] | list[str],
    head: bool = True,
    low_rank: LoRAConfig | None = None,
    seed: int = 0,
    part: str = "clip",
) -> list[str]:
    """Set `requires_grad` on every parameter and return the trained names.

    Args: tune: "layernorm": affine parameters of LayerNorm (and BatchNorm, in ResNets), and the head; "all": everything;
        "lora": low-rank terms on the matrices that `low_rank.targets` match, from `seed`, and the head; or fnmatch patterns
        of parameter names ("clip.visual.*ln_*"), and the head. A constant `logit_bias` never trains. head=False leaves the
        head out: nothing would train it where L_SDS is off. part: the attribute of the student that is tuned; the rest is
        its head.
    Raises: ConfigError for a pattern that matches nothing.
    """
    clip, prefix = getattr(student, part), f"{part}."
    names = [name for name, _ in student.named_parameters() if name.startswith(prefix) and name != "clip.logit_bias"]
    if tune == "all":
        wanted = set(names)
    elif tune == "layernorm":
        kinds = nn.LayerNorm | nn.modules.batchnorm._BatchNorm
        norms = {id(p) for m in clip.modules() if isinstance(m, kinds) for p in m.parameters(recurse=False)}
        wanted = {name for name in names if id(student.get_parameter(name)) in norms}
    elif tune == "lora":
        low_rank = low_rank or LoRAConfig()
        matrices = [name for name in names if student.get_parameter(name).ndim > 1]
        targets = _matching(matrices, low_rank.targets, "student.lora.targets", "matrix")
        lora.insert(student, targets, low_rank, seed)
        wanted = {name for name, _ in student.named_parameters() if lora.is_factor(name)}
    elif isinstance(tune, str):
        raise ConfigError(f"student.tune: {tune!r}, expected layernorm, all, lora or a list of patterns")
    else:
        wanted = set(_matching(names, tune, "student.tune", "parameter"))
    trained = []
    for name, parameter in student.named_parameters():
        parameter.requires_grad_(name in wanted if name.startswith(prefix) else head)
        if parameter.requires_grad:
            trained.append(name)
    return trained


def count_trained(student: nn.Module, trained: list[str]) -> dict[str, tuple[int, int]]:
    """{"image tower": (tensors, elements), "text tower": ..., "logit scale": ..., "head": ...} of what trains; what is not of a
    CLIP goes by the student's attribute.
    """
    groups: dict[str, tuple[int, int]] = {}
    for name in trained:
        part, _, rest = name.partition(".")
        tower = "image tower" if rest.startswith(IMAGE) else "logit scale" if rest == "logit_scale" else "text tower"
        group = tower if part == "clip" else part
        tensors, elements = groups.get(group, (0, 0))
        groups[group] = tensors + 1, elements + size(student.get_parameter(name))
    return groups


def size(parameter: nn.Parameter) -> int:
    """The elements of a parameter, whole, wherever ZeRO-3 keeps its parts."""
    return getattr(parameter, "ds_numel", parameter.numel())


def _matching(names: list[str], patterns, key: str, kind: str) -> list[str]:
    """The names that any of the patterns matches, in order."""
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            near = ", ".join(difflib.get_close_matches(pattern, names, n=3, cutoff=0.0))
            raise ConfigError(f"{key}: {pattern!r} matches no {kind} of this student; the nearest are {near}")
    return [name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)]
