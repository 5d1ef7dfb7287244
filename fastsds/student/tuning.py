"""What of a student trains."""

from torch import nn

from fastsds.config import ConfigError
from fastsds.student.model import Student


def apply_tuning(student: Student, tune: str, head: bool = True) -> list[str]:
    """Set `requires_grad` on every parameter and return the trained names.

    "layernorm": affine parameters of LayerNorm (and BatchNorm, in ResNets), and the head. "all": everything.
    head=False leaves the head out: nothing would train it where L_SDS is off.
    """
    if tune not in ("layernorm", "all"):
        raise ConfigError(f"student.tune: {tune!r}, expected layernorm or all")
    kinds = nn.LayerNorm | nn.modules.batchnorm._BatchNorm
    norms = {id(p) for m in student.clip.modules() if isinstance(m, kinds) for p in m.parameters(recurse=False)}
    trained = []
    for name, parameter in student.named_parameters():
        if name.startswith("head."):
            wanted = head
        else:
            wanted = name != "clip.logit_bias" and (tune == "all" or id(parameter) in norms)
        parameter.requires_grad_(wanted)
        if wanted:
            trained.append(name)
    return trained
