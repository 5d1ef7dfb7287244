"""What all benchmarks share: the device, how one number is taken, and what stands beside it.

    pytest benchmarks/ --benchmark-json=out.json      numbers, with versions, device and commit
    pytest benchmarks/ --benchmark-disable            each body once: a benchmark cannot rot on a machine without a GPU

Beside every time: compulsory bytes, GB/s, percent of a plain copy of as many bytes in the same session, and on CUDA the
device time (median, 20 %, 80 %), peak memory minus start, and the number of kernels launched.
"""

import functools
import gc
import time
from types import SimpleNamespace

import pytest
import torch
import triton

from fastsds import quiet


def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info["torch"] = torch.__version__
    machine_info["triton"] = triton.__version__
    machine_info["threads"] = torch.get_num_threads()
    machine_info["gpu"] = torch.cuda.get_device_name() if torch.cuda.is_available() else None


@pytest.fixture(scope="session")
def device():
    return "cuda" if torch.cuda.is_available() else "cpu"


def synchronize(device):
    if device == "cuda":
        torch.cuda.synchronize()


def launched(function):
    """How many kernels, copies and fills the device ran for one call."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as found:
        function()
        torch.cuda.synchronize()
    return sum(event.device_type == DeviceType.CUDA for event in found.events())


def device_milliseconds(function):
    """(median, 20 %, 80 %) of the device's own time."""
    return triton.testing.do_bench(function, quantiles=[0.5, 0.2, 0.8])


@functools.cache
def copy_seconds(size, device):
    """Seconds of a copy whose reads and writes add up to `size` bytes: the yardstick of this session."""
    source = torch.empty(max(size // 2, 1), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    if device == "cuda":
        return device_milliseconds(lambda: target.copy_(source))[0] * 1e-3
    times = []
    for _ in range(20):
        start = time.perf_counter()
        target.copy_(source)
        times.append(time.perf_counter() - start)
    return sorted(times)[len(times) // 2]


@pytest.fixture
def compile_baseline(benchmark, device):
    """torch.compile for a baseline; where nothing is timed on a CPU, without Inductor's half minute of C++."""
    backend = "aot_eager" if device == "cpu" and benchmark.disabled else "inductor"

    def compiled(function):
        torch._dynamo.reset()
        return torch.compile(function, fullgraph=True, backend=backend)

    return compiled


@pytest.fixture
def measure(benchmark, device):
    """measure(function, size): warm up, time, and put down what the time means; `size` in compulsory bytes."""

    def run(function, size):
        def timed():
            function()
            synchronize(device)

        timed()
        if benchmark.disabled:
            benchmark(timed)
            return
        timed()
        info = benchmark.extra_info
        info["bytes"] = size
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            start = torch.cuda.memory_allocated()
            timed()
            info["peak_memory"] = torch.cuda.max_memory_allocated() - start
            info["launches"] = launched(function)
            low_mid_high = device_milliseconds(function)
            info["device_ms"] = dict(zip(("median", "p20", "p80"), low_mid_high))
        benchmark(timed)
        seconds = info["device_ms"]["median"] * 1e-3 if device == "cuda" else benchmark.stats.stats.median
        info["gb_per_s"] = size / seconds * 1e-9
        info["percent_of_copy"] = 100 * copy_seconds(size, device) / seconds

    return run


@functools.cache
def matmul_flop_per_s(device, dtype):
    """FLOP/s of a large matrix product: the peak of this session."""
    n = 8192 if device == "cuda" else 1024
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    if device == "cuda":
        return 2 * n**3 / (device_milliseconds(lambda: a @ b)[0] * 1e-3)
    times = []
    for _ in range(10):
        start = time.perf_counter()
        a @ b
        times.append(time.perf_counter() - start)
    return 2 * n**3 / sorted(times)[len(times) // 2]


@pytest.fixture
def side_by_side(benchmark, device):
    """side_by_side(providers, flop=, samples=, dtype=, of=): the same work by several providers, in one benchmark.

    providers: name -> a function that makes what is timed (models, inputs), or the reason (a text) why there is none here. What
    it makes may have a method `split`, which is asked afterwards. flop: of one call, or one number a provider. of: what the
    work is. On CUDA one provider lives at a time, and the device's own time counts; one that does not fit says so. On the CPU
    all live at once and take turns, so that what else the machine does falls on all alike.
    """

    def run(providers, *, flop, samples, dtype, of, rounds=9):
        rows, made = {}, {}
        for name, make in providers.items():
            if isinstance(make, str):
                rows[name] = {"skipped": make}
            elif device == "cuda":
                rows[name] = _on_cuda(make, benchmark.disabled)
            else:
                made[name] = make()
                made[name]()
        times = {name: [] for name in made}
        for _ in range(1 if benchmark.disabled else rounds):
            for name, function in made.items():
                start = time.perf_counter()
                function()
                times[name].append((time.perf_counter() - start) * 1e3)
        for name, found in times.items():
            rows[name] = {"ms": sorted(found)[len(found) // 2], "best_ms": min(found)}
            if hasattr(made[name], "split"):
                rows[name]["split"] = made[name].split()
        for name, row in rows.items():
            if "ms" in row:
                seconds, work = row["ms"] * 1e-3, flop[name] if isinstance(flop, dict) else flop
                peak = matmul_flop_per_s(device, dtype)
                row |= {"flop": work, "floor_ms": 1e3 * work / peak, "percent_of_peak": 100 * work / seconds / peak}
                row |= {"samples_per_s": samples / seconds, "tflop_per_s": work / seconds * 1e-12}
            row["provider"] = name
        order = [rows[name] for name in providers]
        benchmark.extra_info |= {"providers": order, "samples": samples, "rounds": rounds, "of": of}
        benchmark.pedantic(lambda: None, rounds=1)
        return rows

    return run


def _on_cuda(make, once):
    try:
        function = make()
        function()
        if once:
            return {}
        function()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        start = torch.cuda.memory_allocated()
        function()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - start
        median, low, high = device_milliseconds(function)
        split = {"split": function.split()} if hasattr(function, "split") else {}
        return {"ms": median, "p20": low, "p80": high, "peak_memory": peak, **split}
    except torch.cuda.OutOfMemoryError:
        return {"skipped": "out of memory"}
    finally:
        function = None
        torch._dynamo.reset()
        gc.collect()
        torch.cuda.empty_cache()


@pytest.fixture(scope="session")
def network(device):
    """What the teacher's benchmarks run: Stable Diffusion v1's UNet with random weights in bf16 on a GPU; on the CPU the
    embedded world's. make() gives it frozen, with the same weights each time."""
    from diffusers import UNet2DConditionModel

    from fastsds import world

    def of_sd():
        torch.manual_seed(0)
        with torch.device(device):  # the class's defaults are SD v1's but for the width of the text
            return UNet2DConditionModel(sample_size=64, cross_attention_dim=768).to(torch.bfloat16)

    def of_world():
        with quiet.loading():
            return UNet2DConditionModel.from_pretrained(world.TEACHER, subfolder="unet", low_cpu_mem_usage=False).float()

    sd = device == "cuda"
    return SimpleNamespace(
        make=lambda: (of_sd if sd else of_world)().requires_grad_(False).eval(),
        name="Stable Diffusion v1's UNet, random weights" if sd else "the embedded world's UNet",
        latent=(4, 64, 64) if sd else (4, 8, 8), text=(77, 768) if sd else (16, of_world().config.cross_attention_dim),
        dtype=torch.bfloat16 if sd else torch.float32,
    )  # fmt: skip
