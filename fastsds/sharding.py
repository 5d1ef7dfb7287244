"""Where the student's weights, gradients and optimizer state live: one device, or sharded by DeepSpeed's ZeRO.

DeepSpeed's own checkpoints, which unpickle, are never used: weights and moments are gathered and put back by name.
"""

import os
import socket

import torch

from fastsds import optimizer as optimizers
from fastsds.config import AnyRecipe, ConfigError
from fastsds.engine import TorchEngine, device, gradient_norm, ranks


def stage_of(config: dict | None) -> int | None:
    """The ZeRO stage that a DeepSpeed configuration asks for; None without one. Raises: ConfigError."""
    if config is None:
        return None
    section = config.get("zero_optimization", {})
    stage = section.get("stage", 0) if isinstance(section, dict) else section
    if stage not in (0, 1, 2, 3) or isinstance(stage, bool):
        raise ConfigError(f"DeepSpeed file: zero_optimization.stage is {stage!r}, expected 0, 1, 2 or 3")
    return stage


def make_engine(student: torch.nn.Module, recipe: AnyRecipe, deepspeed_config: dict | None = None) -> TorchEngine:
    """Put a student under an engine. deepspeed_config: DeepSpeed's own JSON, or None for plain torch on one device.

    The recipe fills in the batch keys, clipping and bf16; everything else passes through untouched.
    """
    kind = TorchEngine if deepspeed_config is None else DeepSpeedEngine
    return kind(student, recipe, deepspeed_config)


class DeepSpeedEngine(TorchEngine):
    """DeepSpeed with ZeRO 0 to 3. precision bf16: bf16 weights, fp32 masters."""

    def __init__(self, student: torch.nn.Module, recipe: AnyRecipe, config: dict):
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
        self.module, self._norm = student, None
        self.stage = self.ds.zero_optimization_stage()
        gloo = self.device.type == "cpu"
        self._host_group = None if gloo else torch.distributed.new_group(backend="gloo")

    def __call__(self, *inputs: torch.Tensor | None):
        return self.ds(*inputs)

    def backward(self, loss: torch.Tensor) -> None:
        self.ds.backward(loss)

    def step(self) -> None:
        last = self.ds.is_gradient_accumulation_boundary()
        if last and (plain := not hasattr(self.optimizer, "_global_grad_norm")):  # ZeRO 0 in fp32: gradients are whole here
            self._norm = gradient_norm(self._trained.values())
        self.ds.step()
        if last and not plain:
            self._norm = self.ds.get_global_grad_norm()

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

    def most(self, x: torch.Tensor) -> torch.Tensor:
        if self.world_size > 1:
            x = x.clone()
            torch.distributed.all_reduce(x, torch.distributed.ReduceOp.MAX, group=self._host_group)
        return x

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


def fill(config: dict, recipe: AnyRecipe, world_size: int) -> dict:
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
