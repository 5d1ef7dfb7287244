"""What every kernel file shares: the interpreter switch, argument checks, strides, registration and the one launch rule.

One device, one path: an op runs its Triton kernel on CUDA, and on the CPU its reference twin. With TRITON_INTERPRET=1 set
before the first import, the CPU runs the Triton kernel too. Samples in float64 go through the twin on every device (their
oracle and their arithmetic are the same thing); a device without an implementation is an error of the dispatcher.
"""

import collections
import contextlib
import math

import torch
import triton

INTERPRETED = bool(triton.knobs.runtime.interpret)
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
BLOCK = 1024  # elements a program, at most: four warps. By arithmetic, not yet measured on a GPU
PER_WARP = 256  # elements a warp: eight a thread, one 16-byte access in half precision, two in fp32

launches = collections.Counter()  # kernel name -> launches in this process; tests read it


def define(name, launcher, reference, fake, schema=None):
    """Declare `fastsds::name`: the twin on the CPU, the launcher on CUDA (and on the CPU when interpreting)."""
    cpu = launcher if INTERPRETED else reference
    op = torch.library.custom_op(f"fastsds::{name}", cpu, mutates_args=(), device_types="cpu", schema=schema)
    op.register_kernel("cuda", launcher)
    op.register_fake(fake)
    return op


def options(block, **constants):
    """How a kernel is compiled, unless `constants` say otherwise. Multiplies are never fused with adds: the same bits on
    every device."""
    return dict(BLOCK=block, num_warps=max(1, block // PER_WARP), enable_fp_fusion=False) | constants


def launch(kernel, programs, *args, block, **constants):
    """Run `kernel` on a 1-D grid, on the device of its first tensor."""
    if programs == 0:
        return
    device = next(a.device for a in args if isinstance(a, torch.Tensor))
    launches[kernel.fn.__name__] += 1
    guard = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
    with guard:
        kernel[(programs,)](*args, **options(block, **constants))


def block_size(n):
    """A power of two that covers a small sample in one program and never exceeds BLOCK."""
    return max(PER_WARP, min(BLOCK, triton.next_power_of_2(n)))


def output_dtype(dtype):
    """The dtype a kernel stores. The interpreter truncates half-precision stores, so there the launcher rounds instead."""
    return torch.float32 if INTERPRETED else dtype


def row_length(x):
    """Elements in a sample. Offsets within a sample are 32-bit, as is the noise's counter."""
    n = math.prod(x.shape[1:])
    if n >= 2**31:
        raise ValueError(f"a sample of shape {tuple(x.shape[1:])} has {n} elements; at most 2^31 - 1 are supported")
    return n


class Layout:
    """How the kernels find logical element i of sample b in each of several tensors of one shape.

    When every sample is contiguous in every tensor, the kernels see rows and row strides, in units of `unit` elements, the
    largest power of two (at most 16) that divides them all: that is what lets the compiler prove 16-byte accesses.
    Otherwise they split i over the axes, merged where all tensors allow it. Nothing is ever copied.
    """

    def __init__(self, *tensors):
        first = tensors[0]
        self.n = row_length(first)
        sizes = list(first.shape[1:])
        strides = [list(v.stride()[1:]) for v in tensors]
        keep = [i for i, size in enumerate(sizes) if size != 1]
        sizes, strides = [sizes[i] for i in keep], [[s[i] for i in keep] for s in strides]
        for i in range(len(sizes) - 2, -1, -1):
            if all(s[i] == s[i + 1] * sizes[i + 1] for s in strides):
                sizes[i : i + 2] = [sizes[i] * sizes[i + 1]]
                for s in strides:
                    del s[i]
        self.contiguous = len(sizes) == 0 or (len(sizes) == 1 and all(s[0] == 1 for s in strides))
        batch = [v.stride(0) if len(v) > 1 else 0 for v in tensors]
        self.unit = 1
        if self.contiguous:
            self.unit = math.gcd(16, self.n, *batch)
        self.sizes = (1,) if self.contiguous else tuple(sizes)
        # (row stride in units, then the axes' strides), one tuple a tensor
        self.strides = [(row // self.unit, *((0,) if self.contiguous else s)) for row, s in zip(batch, strides)]


class Rows:
    """How the kernels find the rows, [n] along the last axis, of several tensors that share all axes but the last.

    Row r of a tensor starts at `noise.offsets(r, sizes, strides, single)` units of `unit` elements; the axes before the last
    are merged where all tensors allow it, and nothing is ever copied. A program takes `tile` = (rows, columns).
    """

    def __init__(self, n, *tensors, columns=BLOCK):
        heads = Layout(*(v[..., 0][None] for v in tensors))
        self.rows, self.n, self.single = heads.n, n, heads.contiguous
        self.sizes, self.steps = heads.sizes, [v.stride(-1) if n > 1 else 1 for v in tensors]
        strides = [s[1:] for s in heads.strides]
        wide = all(s == 1 for s in self.steps) and (self.rows == 1 or not self.single)
        self.unit = math.gcd(16, n, *(s for row in strides for s in row)) if wide else 1
        self.strides = [(0, *(s // self.unit for s in row)) for row in strides]
        width = min(columns, triton.next_power_of_2(n))
        self.tile = (max(1, min(2 * BLOCK // width, triton.next_power_of_2(self.rows))), width)
