"""Attention backends, and what each is worth on one shape: right or wrong, forward and backward, milliseconds, bytes held.

A backend is right by the twice-eager rule (`fastsds.testing`) on tensors scaled to a largest value of 1: its error against
float64 is at most twice that of SDPA's math in the same dtype, plus the table's atol, for the output and the gradients of
q, k and v, in the first and last head of the last sample.
"""

import dataclasses
import functools
import statistics
import time
import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastsds import ops, reference
from fastsds.kernels import launch
from fastsds.testing import TOLERANCE, holding

SCORES_BYTES = 1 << 31  # math is not tried where its scores alone would take more: there it never wins, and may not fit


@dataclasses.dataclass(frozen=True)
class Shape:
    """One attention: q [B, heads, queries, head_dim], k and v [B, heads, keys, head_dim]."""

    heads: int
    head_dim: int
    queries: int
    keys: int

    def __str__(self) -> str:
        return f"{self.heads} heads of {self.head_dim}, {self.queries} queries, {self.keys} keys"


@dataclasses.dataclass(frozen=True)
class Backend:
    """attend(q, k, v) [B, H, L, D] -> [B, H, L, D] with scale D^-1/2, and where it may be tried."""

    attend: Callable[[Tensor, Tensor, Tensor], Tensor]
    devices: tuple[str, ...] = ("cuda",)
    head_dims: tuple[int, ...] | None = None


@dataclasses.dataclass(frozen=True)
class Probe:
    """What one backend did on one shape: milliseconds of a forward and backward pass and bytes held between, or why not."""

    milliseconds: float | None = None
    saved_bytes: int | None = None
    reason: str | None = None


def _sdpa(kernel: SDPBackend) -> Callable:
    def attend(q, k, v):
        with sdpa_kernel(kernel):
            return F.scaled_dot_product_attention(q, k, v)

    return attend


# xformers through ops of our own, as Dynamo cannot trace its dispatcher; `module` of `xformers.ops.fmha`. Importing it takes
# about a second, so only where it runs; quiet.py takes its line about the extension, which these operators do not use.


@torch.library.custom_op("fastsds::xformers_attention", mutates_args=(), device_types="cuda")
def _xformers_attention(q: Tensor, k: Tensor, v: Tensor, module: str) -> tuple[Tensor, Tensor]:
    from xformers.ops import fmha

    out, lse = fmha.memory_efficient_attention_forward_requires_grad(q, k, v, op=getattr(fmha, module).FwOp)
    return out.contiguous(), lse.contiguous()


@torch.library.custom_op("fastsds::xformers_attention_gradient", mutates_args=(), device_types="cuda")
def _xformers_gradient(
    g: Tensor, out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, module: str
) -> tuple[Tensor, Tensor, Tensor]:
    from xformers.ops import fmha

    dq, dk, dv = fmha.memory_efficient_attention_backward(g, out, lse, q, k, v, op=getattr(fmha, module).BwOp)
    return dq.contiguous(), dk.contiguous(), dv.contiguous()


@_xformers_attention.register_fake
def _(q, k, v, module):
    rows = -(-q.shape[1] // 32) * 32 if module == "cutlass" else q.shape[1]  # cutlass pads its log-sum-exp
    return q.new_empty(q.shape), q.new_empty((q.shape[0], q.shape[2], rows), dtype=torch.float32)


@_xformers_gradient.register_fake
def _(g, out, lse, q, k, v, module):
    return tuple(x.new_empty(x.shape) for x in (q, k, v))


def _xformers_context(ctx, inputs, output):
    q, k, v, ctx.module = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*output, q, k, v)


def _xformers_backward(ctx, g, _):
    return *_xformers_gradient(g, *ctx.saved_tensors, ctx.module), None


_xformers_attention.register_autograd(_xformers_backward, setup_context=_xformers_context)


def _xformers(module: str) -> Callable:
    def attend(q, k, v):
        return _xformers_attention(*(x.transpose(1, 2) for x in (q, k, v)), module)[0].transpose(1, 2)

    return attend


# In the order in which ties are settled. xformers' two call the same torch kernels as flash and efficient.
BACKENDS: dict[str, Backend] = {
    "flash": Backend(_sdpa(SDPBackend.FLASH_ATTENTION), ("cuda", "cpu")),
    "cudnn": Backend(_sdpa(SDPBackend.CUDNN_ATTENTION)),
    "efficient": Backend(_sdpa(SDPBackend.EFFICIENT_ATTENTION)),
    "xformers_fa2": Backend(_xformers("flash")),
    "xformers_cutlass": Backend(_xformers("cutlass")),
    "fastsds": Backend(ops.attention, ("cuda", "cpu") if launch.INTERPRETED else ("cuda",), (40,)),
    "math": Backend(_sdpa(SDPBackend.MATH), ("cuda", "cpu")),
}


@functools.cache
def probe(backend: Backend, shape: Shape, batch: int, device: torch.device, dtype: torch.dtype) -> Probe:
    """Try one backend on one shape, as the processor calls it, once a process: correct forward and backward, then time."""
    if device.type not in backend.devices:
        return Probe(reason=f"no operator for {device.type}")
    if backend.head_dims is not None and shape.head_dim not in backend.head_dims:
        return Probe(reason=f"no operator for head dimension {shape.head_dim}")
    scores = 4 * batch * shape.heads * shape.queries * shape.keys
    if backend is BACKENDS["math"] and scores > SCORES_BYTES:
        return Probe(reason=f"not tried: its scores would take {scores / 2**30:.1f} GiB")
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autocast(device.type, enabled=False),
        warnings.catch_warnings(record=True) as said,  # SDPA's reasons are warnings
    ):
        warnings.simplefilter("always")
        *leaves, g = _inputs(shape, batch, device, dtype)

        def forward():
            q, k, v = (x.unflatten(2, (shape.heads, -1)).transpose(1, 2) for x in leaves)
            return backend.attend(q, k, v).transpose(1, 2).flatten(2)

        def both():
            return torch.autograd.grad(forward(), leaves, g)

        stage = "no operator"
        try:
            with holding() as held:
                out = forward()
            saved = sum(storage.nbytes() for storage in held.values())
            held.clear()
            stage = "no backward"
            found = (out.detach(), *torch.autograd.grad(out, leaves, g))
            if wrong := _wrong(found, _exact(shape, batch, device, dtype)):
                return Probe(reason=f"wrong: {wrong}")
            return Probe(_milliseconds(both, device), saved)
        except Exception as error:  # a third party's operator may fail in any way; the reason is kept
            return Probe(reason=f"{stage}: {_why(error, said)}")


def _why(error: Exception, said: list[warnings.WarningMessage]) -> str:
    """An error in one line, with what SDPA warned of: not the backends that were switched off, nor its headings."""
    lines = [str(error), *(str(w.message).split(" (Triggered")[0] for w in said if issubclass(w.category, UserWarning))]
    lines = [" ".join(x.split())[:160] for x in lines if "runtime disabled" not in x and not x.endswith("because:")]
    return "; ".join(dict.fromkeys(lines))


def _inputs(shape: Shape, batch: int, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    """q, k, v and an upstream gradient, [B, L, heads * head_dim] as the linears give them.

    Scores with a deviation of 2: a peaked softmax, so that a key left out, or one head in place of another, shows.
    """
    generator = torch.Generator(device).manual_seed(0)
    rows = (shape.queries, shape.keys, shape.keys, shape.queries)
    q, k, v, g = (
        torch.randn(batch, n, shape.heads * shape.head_dim, generator=generator, device=device).to(dtype) for n in rows
    )
    return [*(x.requires_grad_() for x in ((2 * q.detach()), k, v)), g]


@functools.lru_cache(maxsize=1)  # one shape's backends come one after the other
def _exact(shape: Shape, batch: int, device: torch.device, dtype: torch.dtype) -> list[tuple[str, slice, Tensor, float]]:
    """(name, columns, float64, error allowed) of the first and last head of the batch's last sample, four tensors each."""
    *leaves, g = _inputs(shape, batch, device, dtype)
    scale, found = shape.head_dim**-0.5, []
    for head in sorted({0, shape.heads - 1}):
        part = slice(head * shape.head_dim, (head + 1) * shape.head_dim)
        q, k, v, upstream = (x[-1:, None, :, part].detach() for x in (*leaves, g))
        wide = [x.double() for x in (q, k, v)]
        out, lse = reference.attention(*wide, scale)
        exact = (out, *reference.attention_gradient(upstream.double(), *wide, out, lse, scale))
        heads = [x.clone().requires_grad_() for x in (q, k, v)]
        out = BACKENDS["math"].attend(*heads)
        eager = (out.detach(), *torch.autograd.grad(out, heads, upstream))
        for name, theirs, oracle in zip(("output", "dq", "dk", "dv"), eager, exact, strict=True):
            error = (theirs.double() - oracle).abs().max() / oracle.abs().max()
            found.append((f"{name} of head {head}", part, oracle[:, 0], 2 * error.item() + TOLERANCE[dtype][1]))
    return found


def _wrong(found: tuple[Tensor, ...], exact: list[tuple[str, slice, Tensor, float]]) -> str | None:
    """The first of (output, dq, dk, dv) that breaks the twice-eager rule, in words."""
    for ours, (name, part, oracle, limit) in zip(found * (len(exact) // 4), exact, strict=True):
        error = ((ours[-1:, :, part].double() - oracle).abs().max() / oracle.abs().max()).item()
        if not error <= limit:  # NaN is wrong too
            return f"{name} off by {error:.2g} of its largest value, allowed {limit:.2g}"
    return None


def _milliseconds(function: Callable, device: torch.device) -> float:
    if device.type == "cuda":
        from triton.testing import do_bench

        with torch.cuda.device(device):
            return do_bench(function, warmup=10, rep=50, return_mode="median")
    times = []
    while sum(times) < 0.05 or (len(times) < 3 and sum(times) < 1):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times)
