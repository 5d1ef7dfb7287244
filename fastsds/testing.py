"""What tests and benchmarks share: the one tolerance table, the twice-eager rule, canonical shapes and samples."""

import contextlib

import torch

# dtype -> (rtol, atol)
TOLERANCE = {
    torch.float64: (1e-7, 1e-7),
    torch.float32: (1.3e-6, 1e-5),
    torch.float16: (1e-3, 1e-3),
    torch.bfloat16: (1.6e-2, 1.6e-2),
}
DTYPES = (torch.float32, torch.float16, torch.bfloat16)

LAYOUTS = ("contiguous", "channels_last", "strided")
# (shape, layout): real, odd, smallest, one past a block; the layouts on the odd shape, and the one users have on the real
CASES = (
    ((1, 4, 64, 64), "contiguous"),
    ((1, 4, 64, 64), "channels_last"),
    *(((3, 5, 7, 11), layout) for layout in LAYOUTS),
    ((1, 1, 1, 1), "contiguous"),
    ((2, 1025), "contiguous"),
)


def assert_close(actual, expected, dtype=None):
    """Compare at the table's tolerance for `dtype` (default: actual's), in float64."""
    rtol, atol = TOLERANCE[dtype or actual.dtype]
    torch.testing.assert_close(actual.double(), expected.double(), rtol=rtol, atol=atol)


def assert_twice_eager(actual, eager, oracle, dtype, name="result"):
    """The rule: max error against the float64 oracle at most twice eager torch's own in `dtype`, plus the table's atol."""
    assert actual.shape == oracle.shape, f"{name}: shape {tuple(actual.shape)}, expected {tuple(oracle.shape)}"
    ours = (actual.double() - oracle).abs().max().item()
    theirs = (eager.double() - oracle).abs().max().item()
    limit = 2 * theirs + TOLERANCE[dtype][1]
    assert ours <= limit, f"{name} in {dtype}: error {ours:.3g}, eager {theirs:.3g}, limit {limit:.3g}"  # NaN fails


def arrange(x, layout):
    """The same values in another memory layout: "contiguous", "channels_last" or "strided" (a view with gaps)."""
    if layout == "channels_last" and x.ndim == 4:
        return x.to(memory_format=torch.channels_last)
    if layout == "strided":  # gaps behind every axis, so that no two merge into one
        sizes = (x.shape[0] + 1, *(size + 1 for size in x.shape[1:-1]), 2 * x.shape[-1] + 1)
        wide = torch.empty(sizes, dtype=x.dtype, device=x.device)
        view = wide[tuple(slice(size) for size in x.shape[:-1])][..., :-1:2]
        return view.copy_(x)
    return x.contiguous()


def alphas_cumprod(steps=1000):
    """Stable Diffusion's schedule: scaled-linear beta from 0.00085 to 0.012, fp32 [steps]."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, steps, dtype=torch.float64) ** 2
    return torch.cumprod(1 - betas, 0).float()


@contextlib.contextmanager
def holding(*modules):
    """Yield {address: storage} of what autograd saves inside, the modules' weights left out."""
    weights = {v.untyped_storage()._cdata for m in modules for v in (*m.parameters(), *m.buffers())}
    held = {}  # the storages themselves, so that no address is used twice

    def pack(v):
        storage = v.untyped_storage()
        if storage._cdata not in weights:
            held[storage._cdata] = storage
        return v

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda v: v):
        yield held


def held_for_backward(run, *modules):
    """Bytes that autograd holds when run() has returned: distinct storages, those of the modules' weights excluded.

    What is held elsewhere than through `save_for_backward` (an attribute of a ctx) is not seen. Under FakeTensorMode the
    bytes are those that a real run would hold.
    """
    with holding(*modules) as held:
        result = run()
    size = sum(storage.nbytes() for storage in held.values())
    del result
    return size


def count_flop(run):
    """FLOP of the matrix products and convolutions of run(), its backward pass included if it has one.

    Attention counts as the products it is made of, whichever kernel does them: torch counts none for the CPU's, and a
    recomputed product for the GPU's.
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        run()
    return counter.get_total_flops()


def devices():
    """pytest parameters: "cpu", and "cuda" under the marker `gpu`, skipped with its reason where there is none."""
    import pytest

    missing = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
    return ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, missing])]


class _NoGPU:
    """Stands in for Triton's driver: enough to bind arguments and compile, nothing to run on."""

    def __init__(self, arch):
        self.arch = arch

    def get_current_device(self):
        return self.arch

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.arch, 32)


@contextlib.contextmanager
def compile_only(arch):
    """Inside, a launcher compiles its kernel for the CUDA architecture instead of running it; no GPU is needed.

    The kernel is bound with the launcher's own arguments, so what the compiler knows (alignment, small integers, the type
    of a seed) is what it will know on a GPU. Yields the list of Triton's compiled kernels, filled as launchers are called.
    """
    from unittest import mock

    import triton

    from fastsds.kernels import launch

    kernels = []

    def compile_kernel(kernel, programs, *args, block, **constants):
        kernels.append(kernel.warmup(*args, grid=(programs,), **launch.options(block, **constants)))

    with (
        mock.patch.object(launch, "launch", compile_kernel),
        mock.patch.object(triton.runtime.driver, "_active", _NoGPU(arch)),
    ):
        yield kernels


def assert_clean(compiled, loads, stores):
    """PTX has 16-byte accesses as often as told, no fp64, no local memory; the binary has no stack and no spills."""
    import re
    import subprocess
    import tempfile

    import triton

    ptx = compiled.asm["ptx"]
    count = {op: len(re.findall(rf"\b{op}\.global\.(?:v4\.b32|v2\.b64)", ptx)) for op in ("ld", "st")}
    assert count["ld"] >= loads and count["st"] >= stores, f"16-byte accesses: {count}, expected {loads} and {stores}"
    for found in (r"\.f64", r"\bld\.local", r"\bst\.local", r"\bcall\b"):
        assert not re.search(found, ptx), f"{found} in the PTX"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        tool = triton.knobs.nvidia.cuobjdump.path
        usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    stack, local = (int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("STACK", "LOCAL"))
    assert stack == 0 and local == 0, usage
