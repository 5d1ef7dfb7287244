"""Where the student's weights, gradients and optimizer state live: one device, or sharded by DeepSpeed's ZeRO.

Both engines have one surface, so the loop does not know which it has:

    engine(pixels, tokens) -> StudentOutput      engine.backward(loss); engine.step()    one call each a micro-step
    engine.mean(x), engine.any(flag)             over ranks
    engine.state(), engine.load_moments(...)     the fp32 weights and moments by parameter name, whole

`state` is collective: every rank calls it. It never touches DeepSpeed's own checkpoints, which unpickle.
"""

import contextlib
import os
import socket

import torch

from fastsds import optimizer as optimizers
from fastsds.config import ConfigError, Recipe

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


def stage_of(config: dict | None) -> int | None:
    """The ZeRO stage that a DeepSpeed configuration asks for; None without one. Raises: ConfigError."""
    if config is None:
        return None
    section = config.get("zero_optimization", {})
    stage = section.get("stage", 0) if isinstance(section, dict) else section
    if stage not in (0, 1, 2, 3) or isinstance(stage, bool):
        raise ConfigError(f"DeepSpeed file: zero_optimization.stage is {stage!r}, expected 0, 1, 2 or 3")
    return stage


def make_engine(student: torch.nn.Module, recipe: Recipe, deepspeed_config: dict | None = None) -> "TorchEngine":
    """Put a student under an engine. deepspeed_config: DeepSpeed's own JSON, or None for plain torch on one device.

    The recipe fills in the batch keys, clipping and bf16; everything else passes through untouched.
    """
    kind = TorchEngine if deepspeed_config is None else DeepSpeedEngine
    return kind(student, recipe, deepspeed_config)


class TorchEngine:
    """Plain torch on one device. precision bf16: fp32 weights, bf16 autocast of the student's forward."""

    stage: int | None = None

    @property
    def name(self) -> str:
        """What a log line says."""
        kind = "plain torch" if self.stage is None else f"ZeRO {self.stage}"
        return f"{kind}, {self.world_size} rank(s), {self.device}"

    def __init__(self, student: torch.nn.Module, recipe: Recipe, _=None):
        self.rank, self.world_size, _ = ranks()
        if self.world_size > 1:
            raise ConfigError(f"{self.world_size} ranks without --config: name a DeepSpeed file (configs/zero2.json)")
        self.device = device()
        self.module = student.to(self.device)
        self.optimizer = self.inner = optimizers.build(student, recipe.optimizer)
        self.accumulation, self.clip = recipe.data.accumulation, recipe.optimizer.clip
        self.bf16, self.micro_steps = recipe.precision == "bf16", 0
        self._trained = {n: p for n, p in student.named_parameters() if p.requires_grad}
        self._frozen = {}  # read when asked for: nothing shards it

    def __call__(self, pixels: torch.Tensor | None = None, tokens: torch.Tensor | None = None):
        cast = torch.autocast(self.device.type, torch.bfloat16) if self.bf16 else contextlib.nullcontext()
        with cast:
            return self.module(pixels, tokens)

    def backward(self, loss: torch.Tensor) -> None:
        (loss / self.accumulation).backward()

    def step(self) -> None:
        self.micro_steps += 1
        if self.micro_steps % self.accumulation:
            return
        for parameter in self._trained.values():  # ZeRO steps a parameter without a gradient as one with a zero gradient
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        if self.clip > 0:
            torch.nn.utils.clip_grad_norm_(self._trained.values(), self.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def mean(self, x: torch.Tensor) -> torch.Tensor:
        """The mean over ranks."""
        return x

    def any(self, flag: bool) -> bool:
        """Whether any rank says so. Host to host: waits for no GPU."""
        return flag

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


class DeepSpeedEngine(TorchEngine):
    """DeepSpeed with ZeRO 0 to 3. precision bf16: bf16 weights, fp32 masters."""

    def __init__(self, student: torch.nn.Module, recipe: Recipe, config: dict):
        import deepspeed
        from deepspeed import utils

        init_distributed()
        self.rank, self.world_size, _ = ranks()
        self.device = device()
        frozen = {n: p for n, p in student.state_dict().items() if n not in dict(student.named_parameters())}
        frozen |= {n: p for n, p in student.named_parameters() if not p.requires_grad}
        self._frozen = {n: t.detach().to("cpu", copy=True) for n, t in frozen.items()} if self.rank == 0 else {}
        self._trained = {n: p for n, p in student.named_parameters() if p.requires_grad}
        self.inner = optimizers.build(student, recipe.optimizer)
        optimizers.set_lr(self.inner, 0.0)
        try:
            self.ds, self.optimizer, *_ = deepspeed.initialize(
                model=student.to(self.device), optimizer=self.inner, config=fill(config, recipe, self.world_size)
            )
        except (ValueError, AssertionError) as error:
            raise ConfigError(f"DeepSpeed refuses its configuration: {' '.join(str(error).split())}") from error
        self.inner.state.clear()  # ZeRO 0 in bf16 makes a step of its own, at rate 0 here, to allocate its state
        self._zero3 = (
            utils.safe_get_full_fp32_param, utils.safe_get_full_optimizer_state,
            utils.safe_set_local_fp32_param, utils.safe_set_local_optimizer_state,
        )  # fmt: skip
        self.module = student
        self.stage = self.ds.zero_optimization_stage()
        gloo = self.device.type == "cpu"
        self._host_group = None if gloo else torch.distributed.new_group(backend="gloo")

    def __call__(self, pixels: torch.Tensor | None = None, tokens: torch.Tensor | None = None):
        return self.ds(pixels, tokens)

    def backward(self, loss: torch.Tensor) -> None:
        self.ds.backward(loss)

    def step(self) -> None:
        self.ds.step()

    def mean(self, x: torch.Tensor) -> torch.Tensor:
        if self.world_size > 1:
            x = x.clone()
            torch.distributed.all_reduce(x)
        return x / self.world_size

    def any(self, flag: bool) -> bool:
        if self.world_size > 1:
            votes = torch.tensor(int(flag))
            torch.distributed.all_reduce(votes, group=self._host_group)
            flag = bool(votes)
        return flag

    def barrier(self) -> None:
        self.any(False)

    def close(self) -> None:
        self.ds.destroy()

    def _tensors(self) -> list[torch.Tensor]:
        for name in ("single_partition_of_fp32_groups", "fp32_partitioned_groups_flat", "fp32_groups_flat_partition"):
            if hasattr(self.optimizer, name):  # ZeRO 1 and 2, ZeRO 3, ZeRO 1 in bf16 with fp32 accumulation
                return list(getattr(self.optimizer, name))
        return super()._tensors()

    def _whole(self, parameter: torch.Tensor, key: str | None) -> torch.Tensor:
        if hasattr(parameter, "ds_id"):  # ZeRO 3
            get, get_moment = self._zero3[:2]
            return get(parameter) if key is None else get_moment(parameter, key)
        if not hasattr(parameter, "_hp_mapping"):  # ZeRO 0
            return super()._whole(parameter, key)
        whole = torch.zeros(parameter.numel(), device=self.device)
        if (piece := self._piece(parameter, key)) is not None:
            address = parameter._hp_mapping.lp_fragment_address
            whole.narrow(0, address.start, address.numel).copy_(piece)
        if self.world_size > 1:
            torch.distributed.all_reduce(whole)
        return whole.view_as(parameter)

    @torch.no_grad()
    def _set_whole(self, parameter: torch.Tensor, value: torch.Tensor, key: str | None) -> None:
        if hasattr(parameter, "ds_id"):  # the last rank's part is padded; DeepSpeed's setter of whole ones forgets that
            put, put_moment = self._zero3[2:]
            part = parameter.ds_tensor.numel()
            padded = torch.nn.functional.pad(value.flatten(), (0, part * self.world_size - value.numel()))
            mine = padded.narrow(0, part * self.rank, part)
            put(parameter, mine) if key is None else put_moment(parameter, mine, key)
        elif not hasattr(parameter, "_hp_mapping"):
            super()._set_whole(parameter, value, key)
        elif (piece := self._piece(parameter, key)) is not None:
            address = parameter._hp_mapping.lp_fragment_address
            piece.copy_(value.flatten().narrow(0, address.start, address.numel))

    def _piece(self, parameter: torch.Tensor, key: str | None) -> torch.Tensor | None:
        """ZeRO 1 and 2: this rank's piece of a parameter's fp32 weight or moment, or None.

        DeepSpeed's own lookup of moments knows the first parameter group alone.
        """
        if (mapping := parameter._hp_mapping) is None:
            return None
        if key is None:
            return mapping.hp_fragment
        flat, address = self._tensors()[mapping.param_group_index], mapping.hp_fragment_address
        return self.inner.state[flat][key].narrow(0, address.start, address.numel)

    def _master(self, parameter: torch.Tensor) -> torch.Tensor:
        """At ZeRO 0 in bf16 the optimizer steps fp32 copies, group by group."""
        copies = zip(getattr(self.optimizer, "fp16_groups", ()), getattr(self.optimizer, "fp32_groups", ()), strict=True)
        for lows, highs in copies:
            for low, high in zip(lows, highs, strict=True):
                if low is parameter:
                    return high
        return parameter


def fill(config: dict, recipe: Recipe, world_size: int) -> dict:
    """DeepSpeed's JSON with the recipe's part filled in."""
    filled = {
        **config,
        "train_micro_batch_size_per_gpu": recipe.data.batch // world_size,
        "gradient_accumulation_steps": recipe.data.accumulation,
        "gradient_clipping": recipe.optimizer.clip,
    }
    if recipe.precision == "bf16":
        section = config.get("bf16", {})
        filled["bf16"] = {**(section if isinstance(section, dict) else {}), "enabled": True}
    return filled


def init_distributed() -> None:
    """Join the ranks: NCCL on GPUs, gloo on the CPU. Without a launcher, be the only rank."""
    import deepspeed

    if torch.distributed.is_initialized():
        return
    if "MASTER_PORT" not in os.environ:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        os.environ.update(alone)
    on_gpu = device().type == "cuda"
    if on_gpu:
        torch.cuda.set_device(device())
    else:  # DeepSpeed would compile an op that only its inference calls: 40 s, and a lock that a killed build leaves
        deepspeed.ops.__compatible_ops__ = {}
    deepspeed.init_distributed("nccl" if on_gpu else "gloo", auto_mpi_discovery=False, verbose=False)
