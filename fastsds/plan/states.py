"""Bytes that an engine keeps of the student on one rank: weights, fp32 masters, gradients, moments, buffers.

N ranks, w bytes a weight (bf16 under DeepSpeed 2, else 4), T trained and F frozen elements; group g of the optimizer has
t_g elements. ZeRO 1 and 2 flatten a group, pad it to a multiple of 2 N and give each rank s_g of them; ZeRO 3 cuts every
parameter into N parts of ceil(n / N).

                 weights          masters    gradients between micro-steps       optimizer steps
    plain torch  4 (T + F)        -          4 T                                 each parameter
    ZeRO 0       w (T + F)        4 T, bf16  w T                                 each parameter
    ZeRO 1       w (sum t_g + F)  4 sum s_g  w T, and a bucket                   a flat part a group
    ZeRO 2       w (sum t_g + F)  4 sum s_g  w S, what lies in the rank's part   a flat part a group
    ZeRO 3       w (T + F) / N    4 T / N    w T / N, always, and a bucket       a flat part a group

A bucket is `reduce_bucket_size` elements (DeepSpeed's default: 500,000,000) whatever the student's size; ZeRO 2 has it during
the backward pass. S counts parameters that lie only partly in the part as a whole. ZeRO 3 gathers weights while the student
runs.
"""

from dataclasses import dataclass

from fastsds.config import ConfigError

BLOCK = 256  # of bitsandbytes' 8-bit states: one fp32 maximum a block and moment
SMALL = 4096  # elements under which bitsandbytes keeps fp32 moments
MAPS = 2 * 256 * 4  # bytes of its two code books, once
REDUCED = 500_000_000  # elements that ZeRO 0 reduces at a time
ELSEWHERE = (
    "offload_optimizer", "offload_param", "cpu_offload", "zero_hpz_partition_size", "zero_quantized_weights", "zenflow",
)  # fmt: skip


@dataclass(frozen=True)
class Engine:
    """What keeps the student. stage: None is plain torch; zero: DeepSpeed's own zero_optimization section, checked."""

    stage: int | None
    ranks: int
    precision: str
    optimizer: str
    accumulation: int
    gpu: bool
    zero: object = None

    @property
    def width(self) -> int:
        """Bytes of a weight: plain torch keeps fp32 and casts as it computes."""
        return 2 if self.precision == "bf16" and self.stage is not None else 4

    @property
    def grows(self) -> bool:
        """Whether gradients are kept whole, and made anew in every backward pass: they come as the activations go."""
        return self.accumulation == 1 and self.stage in (None, 0, 1)

    @property
    def name(self) -> str:
        return "plain torch" if self.stage is None else f"ZeRO {self.stage}"


@dataclass
class Held:
    """Bytes on one rank.

    Between steps: weights, masters, moments; buffers (ZeRO 3's buckets and gradient parts, and the parameters that it never
    lets go). While the student runs, besides: gathered (weights), gradients (of the micro-steps before, kept to the last) and
    bucket; second, of a later micro-step before it is added up; reduced, a copy on its way to the other ranks. stepping: what
    the optimizer's step adds to what lies between steps. host: on the CPU of rank 0, copies of what is frozen.
    """

    weights: int = 0
    masters: int = 0
    moments: int = 0
    buffers: int = 0
    gathered: int = 0
    gradients: int = 0
    bucket: int = 0
    second: int = 0
    reduced: int = 0
    stepping: int = 0
    host: int = 0

    @property
    def between(self) -> int:
        return self.weights + self.masters + self.moments + self.buffers


def zero_section(config: dict, stage: int):
    """DeepSpeed's zero_optimization with its defaults filled in by DeepSpeed itself. Raises: ConfigError."""
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    section = config.get("zero_optimization", {})
    try:
        return DeepSpeedZeroConfig(**{**(section if isinstance(section, dict) else {}), "stage": stage})
    except ValueError as error:  # pydantic's: a heading, then pairs of lines, the key and what is wrong with it
        key, wrong = [*str(error).splitlines(), "", ""][1:3]
        raise ConfigError(f"DeepSpeed file: zero_optimization.{key}: {wrong.split(' [')[0].strip()}") from error


def not_counted(config: dict) -> list[str]:
    """Keys of a DeepSpeed file that move memory elsewhere and that `held` knows nothing of."""
    section = config.get("zero_optimization", {})
    section = section if isinstance(section, dict) else {}
    found = [f"zero_optimization.{key}" for key in ELSEWHERE if section.get(key)]
    return found + [key for key in ("activation_checkpointing", "data_types") if config.get(key)]


def held(groups: list[list[int]], frozen: list[int], buffers: int, engine: Engine) -> Held:
    """Count the bytes of one rank, the fullest where they differ.

    Args: groups: elements of each trained parameter, by optimizer group; frozen: of each frozen one; buffers: bytes of the
        student's buffers.
    """
    w = engine.width
    count = {None: _whole, 0: _whole, 1: _flat, 2: _flat, 3: _parted}[engine.stage]
    found, by_group = count(groups, frozen, engine)
    stepped = [size for group in by_group for size in group]
    found.weights += buffers
    found.host = 4 * sum(frozen) + buffers if engine.stage is not None else 0
    found.moments = sum(_moments(size, engine.optimizer) for size in stepped)
    found.moments += MAPS * (engine.optimizer == "adamw8bit" and max(stepped) >= SMALL)
    cast = w * max(stepped) if w < 4 and engine.stage else 0  # flat gradients on their way to fp32
    found.stepping = max(0, found.stepping + max(cast, _step_copies(by_group, engine)))
    if engine.accumulation == 1:
        found.second = 0
    return found


# Each returns what it holds but for moments, and what the optimizer steps: the elements of each tensor, by group.


def _whole(groups, frozen, engine) -> tuple[Held, list[list[int]]]:
    """Plain torch and ZeRO 0."""
    w, trained = engine.width, sum(map(sum, groups))
    masters = 4 * trained if w < 4 else 0  # and as much for the gradients' fp32 copies while it steps
    reduced = w * min(trained, REDUCED) if engine.ranks > 1 else 0
    weights, gradients = w * (trained + sum(frozen)), w * trained
    return Held(weights, masters, gradients=gradients, reduced=reduced, stepping=gradients + masters), groups


def _flat(groups, frozen, engine) -> tuple[Held, list[list[int]]]:
    """ZeRO 1 and 2."""
    w, n, zero = engine.width, engine.ranks, engine.zero
    padded = [-(-sum(group) // (2 * n)) * 2 * n for group in groups]
    parts = [size // n for size in padded]
    mine = w * max(sum(_overlapping(g, part, rank) for g, part in zip(groups, parts, strict=True)) for rank in range(n))
    two = engine.stage == 2
    found = Held(
        weights=w * (sum(padded) + sum(frozen)), masters=4 * sum(parts), stepping=mine + 4 * max(parts),
        gradients=mine if two else w * sum(map(sum, groups)), second=mine if two else 0,
        bucket=w * zero.reduce_bucket_size * zero.contiguous_gradients * (1 + bool(zero.overlap_comm)),
    )  # fmt: skip
    return found, [[part] for part in parts]


def _parted(groups, frozen, engine) -> tuple[Held, list[list[int]]]:
    """ZeRO 3. Alone, a rank gathers nothing."""
    w, n, zero = engine.width, engine.ranks, engine.zero
    sizes = [size for group in groups for size in group]
    parts = [sum(-(-size // n) for size in group) for group in groups]
    everything = sum(sizes) + sum(frozen)
    kept = sum(size for size in (*sizes, *frozen) if size <= zero.param_persistence_threshold) if n > 1 else 0
    live = min(everything, max(zero.max_live_parameters, kept)) if n > 1 else 0
    bucket = w * zero.reduce_bucket_size * zero.contiguous_gradients
    found = Held(
        weights=w * (sum(parts) + sum(-(-size // n) for size in frozen)), masters=4 * sum(parts),
        buffers=bucket + w * (sum(parts) + kept), gathered=w * (live - kept), stepping=4 * max(parts) - w * kept,
        reduced=min(bucket, w * sum(sizes)) if n > 1 else 0,
    )  # fmt: skip
    return found, [[part] for part in parts]


def _overlapping(sizes: list[int], part: int, rank: int) -> int:
    """Elements of the parameters of which some lie in the rank's part of their flat group."""
    total, start = 0, 0
    for size in sizes:
        if start < (rank + 1) * part and start + size > rank * part:
            total += size
        start += size
    return total


def _moments(size: int, optimizer: str) -> int:
    if optimizer == "adamw8bit" and size >= SMALL:
        return 2 * size + 2 * 4 * -(-size // BLOCK)
    return 8 * size + 4 * (optimizer == "adamw")  # and the count of steps


def _step_copies(groups: list[list[int]], engine: Engine) -> int:
    """What torch's AdamW makes and drops while it steps: on a GPU the roots of a group's second moments at once, on the CPU
    a parameter's, twice. bitsandbytes works in place.
    """
    if engine.optimizer != "adamw":
        return 0
    return 4 * max(map(sum, groups)) if engine.gpu else 2 * 4 * max(map(max, groups))
