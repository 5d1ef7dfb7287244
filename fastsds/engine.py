"""The engine on one device, in plain torch. `sharding.py` has the other one.

Both have one surface, so the loop does not know which it has:

    engine(pixels, tokens) -> the student's output    engine.backward(loss); engine.step()    one call each a micro-step
    engine.mean(x), engine.any(flag)             over ranks
    engine.grad_norm()                           of the last step, before clipping
    engine.state(), engine.load_moments(...)     the fp32 weights and moments by parameter name, whole

`state` is collective: every rank calls it.
"""

import contextlib
import os

import torch

from fastsds import optimizer as optimizers
from fastsds.config import AnyRecipe, ConfigError

MOMENTS = ("exp_avg", "exp_avg_sq")


def ranks() -> tuple[int, int, int]:
    """(rank, world size, local rank), as a launcher sets them; (0, 1, 0) without one."""
    return tuple(int(os.environ.get(name, default)) for name, default in
                 (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))


def device() -> torch.device:
    """This rank's GPU, or the CPU where there is none or DS_ACCELERATOR=cpu says so."""
    if os.environ.get("DS_ACCELERATOR") == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    local = ranks()[2]
    if local >= torch.cuda.device_count():
        raise ConfigError(f"rank {local} of this machine needs GPU {local}, and it has {torch.cuda.device_count()}")
    return torch.device("cuda", local)


def gradient_norm(parameters) -> torch.Tensor:
    """The 2-norm of all gradients together; waits for no GPU. Returns: 0-dim."""
    return torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])


class TorchEngine:
    """Plain torch on one device. precision bf16: fp32 weights, bf16 autocast of the student's forward."""

    stage: int | None = None

    @property
    def name(self) -> str:
        """What a log line says."""
        kind = "plain torch" if self.stage is None else f"ZeRO {self.stage}"
        return f"{kind}, {self.world_size} rank(s), {self.device}"

    def __init__(self, student: torch.nn.Module, recipe: AnyRecipe, _=None):
        self.rank, self.world_size, _ = ranks()
        if self.world_size > 1:
            raise ConfigError(f"{self.world_size} ranks without --config: name a DeepSpeed file (configs/zero2.json)")
        self.device = device()
        self.module = student.to(self.device)
        self.optimizer = self.inner = optimizers.build(student, recipe.optimizer)
        self.accumulation, self.clip = recipe.data.accumulation, recipe.optimizer.clip
        self.bf16, self.micro_steps, self._norm = recipe.precision == "bf16", 0, None
        self._trained = {n: p for n, p in student.named_parameters() if p.requires_grad}
        self._frozen = {}  # read when asked for: nothing shards it

    def __call__(self, *inputs: torch.Tensor | None):
        cast = torch.autocast(self.device.type, torch.bfloat16) if self.bf16 else contextlib.nullcontext()
        with cast:
            return self.module(*inputs)

    def backward(self, loss: torch.Tensor) -> None:
        (loss / self.accumulation).backward()

    def step(self) -> None:
        self.micro_steps += 1
        if self.micro_steps % self.accumulation:
            return
        for parameter in self._trained.values():  # ZeRO steps a parameter without a gradient as one with a zero gradient
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        self._norm = gradient_norm(self._trained.values())
        if self.clip > 0:
            torch.nn.utils.clip_grads_with_norm_(self._trained.values(), self.clip, self._norm)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def grad_norm(self) -> float | None:
        """The global norm of the last step's gradient before clipping; the host waits. None: DeepSpeed was told not to ask."""
        return None if self._norm is None else float(self._norm)

    def mean(self, x: torch.Tensor) -> torch.Tensor:
        """The mean over ranks."""
        return x

    def any(self, flag: bool) -> bool:
        """Whether any rank says so. Host to host: waits for no GPU."""
        return flag

    def most(self, x: torch.Tensor) -> torch.Tensor:
        """The greatest over ranks, element by element. Host to host. Shapes: int64 on the CPU."""
        return x

    def barrier(self) -> None:
        pass

    def close(self) -> None:
        pass

    def state(self, moments: bool = True) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """Whole fp32 weights by parameter name, and moments as "NAME.exp_avg", "NAME.exp_avg_sq", on the CPU.

        Rank 0 gets all, other ranks two empty dicts; every rank must call. Moments before the first step are absent.
        """
        weights, slots = dict(self._frozen), {}
        for name, tensor in self.module.state_dict().items():
            if name not in self._trained and name not in weights:
                weights[name] = tensor
        for name, parameter in self._trained.items():
            tensors = [self._whole(parameter, key) for key in (None, *(MOMENTS if moments and self._has_moments() else ()))]
            if self.rank == 0:
                weights[name], *rest = (t.detach().to("cpu", torch.float32, copy=True) for t in tensors)
                slots.update({f"{name}.{key}": t for key, t in zip(MOMENTS, rest, strict=False)})
        if self.rank:
            return {}, {}
        return {n: t.detach().to("cpu", copy=True) for n, t in weights.items()}, slots

    def updates(self) -> int:
        """How many times the optimizer has stepped: the steps of the run, less those that bf16 overflow skipped."""
        tensors = self._tensors()
        return int(self.inner.state.get(tensors[0], {}).get("step", 0)) if tensors else 0

    def load_moments(self, updates: int, weights: dict[str, torch.Tensor], slots: dict[str, torch.Tensor]) -> None:
        """Put back what `state` gave after so many updates. Every rank passes the same whole tensors."""
        if slots:
            for tensor in self._tensors():
                self.inner.state[tensor] = {
                    "step": torch.tensor(float(updates)), **{key: torch.zeros_like(tensor) for key in MOMENTS}
                }
        for name, parameter in self._trained.items():
            for key in (None, *(MOMENTS if slots else ())):
                value = weights[name] if key is None else slots[f"{name}.{key}"]
                self._set_whole(parameter, value.to(self.device), key)

    def raw_state(self) -> dict[str, torch.Tensor]:
        """This rank's optimizer state as it lies: "INDEX.KEY" -> tensor. Fits the same stage and ranks only."""
        return {
            f"{index}.{key}": value.detach().cpu().clone() if torch.is_tensor(value) else torch.tensor(value)
            for index, tensor in enumerate(self._tensors())
            for key, value in self.inner.state.get(tensor, {}).items()
        }

    def load_raw_state(self, raw: dict[str, torch.Tensor]) -> None:
        for index, tensor in enumerate(self._tensors()):
            items = {key.partition(".")[2]: value for key, value in raw.items() if key.partition(".")[0] == str(index)}
            self.inner.state[tensor] = {
                key: int(value) if key == "step" else value.to(tensor.device) for key, value in items.items()
            }

    # How this engine keeps its state. A DeepSpeed engine overrides these.

    def _tensors(self) -> list[torch.Tensor]:
        """The tensors that the optimizer steps, in a fixed order."""
        return [p for group in self.inner.param_groups for p in group["params"]]

    def _has_moments(self) -> bool:
        tensors = self._tensors()
        return bool(tensors) and MOMENTS[0] in self.inner.state.get(tensors[0], {})

    def _whole(self, parameter: torch.Tensor, key: str | None) -> torch.Tensor:
        """The whole fp32 weight (key None) or moment of a parameter. Collective."""
        master = self._master(parameter)
        return master if key is None else self.inner.state[master][key]

    def _set_whole(self, parameter: torch.Tensor, value: torch.Tensor, key: str | None) -> None:
        with torch.no_grad():
            self._whole(parameter, key).copy_(value)

    def _master(self, parameter: torch.Tensor) -> torch.Tensor:
        return parameter
