"""Which parameters share a learning rate and a decay, the optimizer over them, and the rate at each step."""

import math

import torch

from fastsds.config import ConfigError, OptimizerConfig

NEW = ("head.", "projections.")


def groups(student: torch.nn.Module, config: OptimizerConfig) -> list[dict]:
    """The trained parameters in groups: the model's matrices with decay, its gains, biases and scalars without; the head and
    projections, which are new, without and at a rate of their own. `base_lr` is what the schedule multiplies.
    """
    matrices, vectors, head = [], [], []
    for name, parameter in student.named_parameters():
        if parameter.requires_grad:
            kind = head if name.startswith(NEW) else matrices if parameter.ndim > 1 else vectors
            kind.append(parameter)
    rates = ((matrices, config.lr, config.weight_decay), (vectors, config.lr, 0.0), (head, config.head_lr, 0.0))
    return [
        {"params": members, "lr": lr, "base_lr": lr, "weight_decay": decay} for members, lr, decay in rates if members
    ]


def build(student: torch.nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """The optimizer that the recipe names, never another one in its place.

    Raises: ConfigError if nothing trains, or if `adamw8bit` is asked for and bitsandbytes is missing.
    """
    parameters = groups(student, config)
    if not parameters:
        raise ConfigError("student.tune: no parameter of this student would train")
    options = {"lr": config.lr, "betas": config.betas, "eps": config.eps, "weight_decay": config.weight_decay}
    if config.name == "adamw":
        return torch.optim.AdamW(parameters, **options)
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise ConfigError(f"optimizer.name is adamw8bit, which needs bitsandbytes: {error}") from error
    return AdamW8bit(parameters, **options)


def schedule(step: int, steps: int, warmup: int) -> float:
    """The factor on every base rate at step 0 .. steps - 1: linear warm-up from 1 / warmup, then cosine to 0.

    factor = (step + 1) / warmup for step < warmup, else (1 + cos(pi (step - warmup) / (steps - warmup))) / 2
    """
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def set_lr(optimizer, factor: float) -> None:
    """Set every group's rate to factor * base_lr. Takes a torch optimizer or DeepSpeed's wrapper of one."""
    for group in optimizer.param_groups:
        group["lr"] = factor * group["base_lr"]
