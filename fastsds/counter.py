"""Counter-based random numbers: `Noise`, what it is for (`Purpose`), and `draw`, the word that keeps uses apart."""

import dataclasses
import enum
import math
import numbers
import operator

import torch

from fastsds.kernels import philox


class Purpose(enum.IntEnum):
    """What a random number is for: the top 4 bits of `draw`, so that no two uses share a word."""

    NOISE = 0
    TIMESTEP = 1
    CAPTION = 2
    CROP = 3
    ORDER = 4
    DROPOUT = 5
    RENDER = 6


def draw(purpose, visit):
    """Return `purpose * 2^28 + visit`, the last word of the counter.

    Args:
        purpose: a `Purpose`, or an int in [0, 16).
        visit: how often this sample was visited before (epoch * K + k), in [0, 2^28): an int, or an int64 tensor [B] with
            one visit a sample (then a tensor comes back).
    Raises: ValueError if either is out of range.
    """
    purpose = purpose.value if isinstance(purpose, Purpose) else purpose
    purpose = _integer(purpose, "purpose", 0, 1 << 4, "an int in [0, 16)")
    if isinstance(visit, torch.Tensor):
        _integers(visit, "visit")
        visit = visit.to(torch.int64)
        _check_range(visit, "visit", 1 << 28)
        return visit + (purpose << 28)
    return purpose << 28 | _integer(visit, "visit", 0, 1 << 28, "an int in [0, 2^28) or an int64 tensor [B]")


@dataclasses.dataclass(frozen=True, eq=False)
class Noise:
    """A counter-based stream of random numbers, one a sample: accepted wherever a noise tensor is, and never stored.

        word = Philox4x32-10(key = seed, counter = (i // 4, id low, id high, draw))[i % 4]

    A sample's numbers depend on (seed, draw, its id, element i in row-major order) alone: not on batch size, batch split,
    rank, world size, memory layout or device. The same normals come out of `.normal`, `add_noise` and the losses, bit for
    bit.

    Args:
        seed: int64 bit pattern, -2^63 <= seed < 2^64.
        draw: int in [0, 2^32), see `draw()`; or an int64 tensor [B] with one a sample.
        sample_ids: [B] integers (tensor, list or tuple), any int64 bit pattern. Its device is the stream's.
    Raises: ValueError for a wrong type, shape, range or device.
    Source: Salmon et al. 2011 (Philox); Box and Muller 1958.
    """

    seed: int
    draw: "int | torch.Tensor"
    sample_ids: "torch.Tensor | list[int]"

    def __post_init__(self):
        seed, ids = _integer(self.seed, "seed", -(1 << 63), 1 << 64, "an int in [-2^63, 2^64)"), self.sample_ids
        object.__setattr__(self, "seed", seed - (1 << 64) if seed >= 1 << 63 else seed)
        if not isinstance(ids, torch.Tensor):
            try:
                ids = torch.tensor(ids) if len(ids) else torch.zeros(0, dtype=torch.int64)
            except (TypeError, ValueError, RuntimeError) as error:
                raise ValueError(f"sample_ids: [B] integers of 64 bits expected, got {ids!r}") from error
        _integers(ids, "sample_ids")
        if ids.ndim != 1:
            raise ValueError(f"sample_ids: shape [B] expected, got {tuple(ids.shape)}")
        object.__setattr__(self, "sample_ids", ids.to(torch.int64).contiguous())
        value = self.draw
        if not isinstance(value, torch.Tensor):
            value = _integer(value, "draw", 0, 1 << 32, "an int in [0, 2^32) or a tensor [B]")
            value = torch.full((1,), value, dtype=torch.int64, device=ids.device)
        _integers(value, "draw")
        if value.shape not in ((1,), ids.shape):
            raise ValueError(f"draw: shape [1] or [{len(ids)}] expected to match sample_ids, got {tuple(value.shape)}")
        if value.device != ids.device:
            raise ValueError(f"draw: on {value.device}, sample_ids on {ids.device}")
        value = value.to(torch.int64).contiguous()
        _check_range(value, "draw", 1 << 32)
        object.__setattr__(self, "draw", value)

    def __len__(self):
        return len(self.sample_ids)

    def to(self, device):
        """Return the same stream on another device."""
        return Noise(self.seed, self.draw.to(device), self.sample_ids.to(device))

    def normal(self, shape):
        """Return standard normals, fp32 [B, *shape]: the noise of samples of that shape. Writes 4 bytes an element."""
        shape = shape if isinstance(shape, (tuple, list, torch.Size)) else (shape,)
        shape = [_integer(size, "shape", 1, 1 << 31, "ints in [1, 2^31)") for size in shape]
        n = _integer(math.prod(shape), f"shape {tuple(shape)}", 1, 1 << 31, "fewer than 2^31 elements a sample")
        flat = philox.normal(self.seed, self.draw, self.sample_ids, n)
        return flat.view(len(self), *shape)

    def words(self, n):
        """Return the first n raw words of each sample, int64 [B, n] in [0, 2^32)."""
        n = _integer(n, "n", 1, 1 << 31, "an int in [1, 2^31)")
        return philox.words(self.seed, self.draw, self.sample_ids, n)

    def uniform(self, n):
        """Return n uniforms a sample, fp32 [B, n] in (0, 1]: ((word >> 8) + 1) * 2^-24."""
        return ((self.words(n) >> 8) + 1).float() * 2.0**-24

    def randint(self, low, high):
        """Return one integer a sample, int64 [B] in [low, high): low + (word * (high - low) >> 32)."""
        low, high = (_integer(v, k, -(1 << 62), 1 << 62, "an int") for v, k in ((low, "low"), (high, "high")))
        if not 0 < high - low <= 1 << 31:
            raise ValueError(f"randint: low < high <= low + 2^31 expected, got low={low}, high={high}")
        return low + (self.words(1)[:, 0] * (high - low) >> 32)


def _integer(v, name, low, high, expected):
    """v as an int in [low, high). NumPy's are converted; an int of torch.compile must not be: that would pin its value."""
    i = operator.index(v) if isinstance(v, numbers.Integral) and not isinstance(v, int) else v
    if isinstance(v, bool) or not isinstance(i, int) or not low <= i < high:
        raise ValueError(f"{name}: {expected} expected, got {v!r}")
    return i


def _integers(v, name):
    if v.is_floating_point() or v.is_complex() or v.dtype == torch.bool:
        raise ValueError(f"{name}: integers expected, got {v.dtype}")


def _check_range(v, name, high):
    """0 <= v < high, checked where it costs no synchronisation."""
    if v.device.type != "cpu" or torch.compiler.is_compiling() or v.numel() == 0:
        return
    low, top = (int(e) for e in torch.aminmax(v))
    if low < 0 or top >= high:
        raise ValueError(f"{name}: values in [0, {high}) expected, got {low}..{top}")
