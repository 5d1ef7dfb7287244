"""What a module holds and computes, without memory: its own forward and backward pass on tensors that have no storage.

`Live` counts the storages that are alive, and their peak, as torch makes and drops them. Under FakeTensorMode it counts what a
real run would have, op by op; what a kernel allocates inside (a convolution's workspace) is not seen.
"""

import contextlib
import weakref
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Live(TorchDispatchMode):
    """Inside, `now` is the bytes of all storages that were made inside and are alive, `peak` the most there were."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self._known: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        for x in _tensors((args, kwargs)):
            self._meet(x.untyped_storage(), 0)  # made outside
        out = func(*args, **(kwargs or {}))
        for x in _tensors(out):
            self._meet(x.untyped_storage(), x.untyped_storage().nbytes())
        return out

    def _meet(self, storage: torch.UntypedStorage, size: int) -> None:
        key = storage._cdata
        if key in self._known:
            return
        self.now += size
        self.peak = max(self.peak, self.now)

        def gone(_):
            del self._known[key]
            self.now -= size

        self._known[key] = weakref.ref(storage, gone)


def _tensors(tree) -> list[torch.Tensor]:
    return [x for x in tree_leaves(tree) if isinstance(x, torch.Tensor) and x.device.type != "meta"]


@dataclass(frozen=True)
class Use:
    """Bytes: held when the forward pass is done, and at the peak of forward and backward."""

    held: int
    peak: int


@dataclass(frozen=True)
class Law:
    """fixed + each * n: measured at two sizes, and checked at a third."""

    fixed: float
    each: float

    def __call__(self, n: int) -> int:
        return round(self.fixed + self.each * n)

    @classmethod
    def of(cls, measured: dict[int, int]) -> "Law":
        """The line through the first two of three sizes. Raises: ArithmeticError if the third is off by more than 0.1 %."""
        (a, at_a), (b, at_b), (c, at_c) = sorted(measured.items())
        law = cls(at_a - (at_b - at_a) / (b - a) * a, (at_b - at_a) / (b - a))
        if abs(law(c) - at_c) > 1e-3 * at_c:
            raise ArithmeticError(f"not a line: {measured}, which gives {law(c)} at {c}")
        return law


def without_storage():
    """FakeTensorMode that lets constants in."""
    return FakeTensorMode(allow_non_fake_inputs=True)


def place(module: nn.Module, dtype: torch.dtype | None = None, gradients: bool = False) -> nn.Module:
    """Under FakeTensorMode, give a module from the meta device fake tensors of the CPU, its floating ones in dtype.

    Args: gradients: of what trains are there already, as in a micro-step that is not the first.
    """
    made: dict[int, torch.Tensor] = {}

    def fake(v: torch.Tensor) -> torch.Tensor:
        if id(v) not in made:
            x = torch.empty_like(v, device="cpu", dtype=dtype if v.is_floating_point() else None)
            if isinstance(v, nn.Parameter):
                x = nn.Parameter(x, v.requires_grad)
                x.grad = torch.empty_like(x) if v.requires_grad and gradients else None
            made[id(v)] = x
        return made[id(v)]

    for part in module.modules():
        for tensors in (part._parameters, part._buffers):
            tensors.update({name: fake(v) for name, v in tensors.items() if v is not None})
    return module


class _LayerNormsInFp32(TorchFunctionMode):
    """What CUDA's autocast does to LayerNorms and the CPU's does not; of CLIP's layers no other differs."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is not F.layer_norm:
            return func(*args, **kwargs)
        x, *rest = args
        with torch.autocast("cpu", enabled=False):
            return func(x.float(), *rest, **kwargs)


@contextlib.contextmanager
def cuda_autocast():
    """bf16 autocast of fake CPU tensors, with what a GPU's would hold."""
    with torch.autocast("cpu", torch.bfloat16), _LayerNormsInFp32():
        yield


def use(forward, backward=None) -> Use:
    """Run forward() -> result, then backward(result), and count what lives. Both under FakeTensorMode."""
    with Live() as live:
        result = forward()
        held = live.now
        if backward is not None:
            backward(result)
        return Use(held, live.peak)


