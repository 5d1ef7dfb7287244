"""What all benchmarks share: the device, how one number is taken, and what stands beside it.

    pytest benchmarks/ --benchmark-json=out.json      numbers, with versions, device and commit
    pytest benchmarks/ --benchmark-disable            each body once: a benchmark cannot rot on a machine without a GPU

Beside every time: compulsory bytes, GB/s, percent of a plain copy of as many bytes in the same session, and on CUDA the
device time (median, 20 %, 80 %), peak memory minus start, and the number of kernels launched.
"""

import functools
import time

import pytest
import torch
import triton


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
