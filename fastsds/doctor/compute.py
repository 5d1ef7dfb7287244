"""The GPU and what computes: run, not looked up."""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from fastsds.doctor.finding import GIB, NONE, OK, WARN, WRONG, Finding, first_line, pip

PATIENCE = 180  # seconds for a process of its own
# heads, head dimension, queries, keys of Stable Diffusion v1's attentions; on the CPU something small
SHAPES = {"cuda": ((8, 40, 4096, 4096), (8, 40, 4096, 77), (8, 160, 64, 64)), "cpu": ((2, 40, 64, 64),)}


def device():
    """Where the other checks compute: a GPU that is there, else the CPU."""
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def gpu() -> Iterator[Finding]:
    import torch

    driver, cards = _driver()
    if not torch.cuda.is_available():
        if not cards:
            yield Finding("gpu", NONE, "none: everything runs on the CPU")
        elif torch.version.cuda is None:
            line = pip("torch", "--force-reinstall")
            yield Finding("gpu", WRONG, f"{', '.join(cards)}, and this torch was built without CUDA", line)
        else:
            line = "nvidia-smi   # its driver is too old for CUDA " + torch.version.cuda + ", or CUDA_VISIBLE_DEVICES hides it"
            yield Finding("gpu", WRONG, f"{', '.join(cards)}, driver {driver}, and torch sees none", line)
        return
    for index in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        arch, name = f"sm_{about.major}{about.minor}", f"gpu {index}"
        found = f"{about.name}, {total / GIB:.0f} GiB ({free / GIB:.0f} free), {arch}, "
        found += f"driver {driver}, torch's CUDA {torch.version.cuda}"
        built = [int(a.removeprefix("sm_").rstrip("af")) for a in torch.cuda.get_arch_list() if a.startswith("sm_")]
        if not any(b // 10 == about.major and b % 10 <= about.minor for b in built):
            yield Finding(name, WRONG, f"{found}: torch has no code for {arch}", pip("torch", "--force-reinstall"))
        elif about.major < 8:
            yield Finding(name, WARN, f"{found}: no bf16", "fastsds train --set precision=fp32")
        elif free < total / 2:
            yield Finding(name, WARN, f"{found}: others use it", "nvidia-smi")
        else:
            yield Finding(name, OK, found)


def _driver() -> tuple[str, list[str]]:
    """The driver's version and the cards' names, as nvidia-smi has them."""
    query = ["nvidia-smi", "--query-gpu=driver_version,name", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown", []
    rows = [line.split(", ", 1) for line in done.stdout.splitlines() if ", " in line] if done.returncode == 0 else []
    return (rows[0][0], [row[1] for row in rows]) if rows else ("unknown", [])


def attention(backends: dict | None = None) -> Iterator[Finding]:
    """Each attention operator, forward and backward, beside float64."""
    import torch

    from fastsds.teacher.probe import BACKENDS, Shape, probe

    place = device()
    dtype = torch.bfloat16 if place.type == "cuda" else torch.float32
    for shape in (Shape(*sizes) for sizes in SHAPES[place.type]):
        tried = {name: probe(b, shape, 1, place, dtype) for name, b in (backends or BACKENDS).items()}
        right = sorted((p.milliseconds, name) for name, p in tried.items() if p.reason is None)
        here = {name: p.reason for name, p in tried.items() if p.reason and not p.reason.startswith("no operator for")}
        said = ", ".join(f"{name} {ms:.3g} ms" for ms, name in right) or "none is right"
        said += "".join(f"; {name}: {reason}" for name, reason in here.items())
        name = f"attention, {shape}"
        if not right:
            yield Finding(name, WRONG, said, pip("torch", "--force-reinstall"))
        elif place.type == "cuda" and [n for _, n in right] == ["math"]:
            yield Finding(name, WARN, said + ": slow, and much memory", pip("torch", "--force-reinstall"))
        else:
            yield Finding(name, OK, said)


def triton() -> Iterator[Finding]:
    """A kernel of ours: run on a GPU, compiled for one without."""
    import torch
    import triton as compiler

    from fastsds import ops, reference
    from fastsds.kernels import geglu, launch

    if launch.INTERPRETED:
        yield Finding("triton kernel", WARN, "TRITON_INTERPRET is set: kernels run in Python", "unset TRITON_INTERPRET")
        return
    try:
        with tempfile.TemporaryDirectory() as folder, compiler.knobs.cache.scope():
            compiler.knobs.cache.dir = folder  # nothing of an earlier day
            x = torch.linspace(-2, 2, 64 * 512).view(64, 512)
            if device().type == "cuda":
                torch.testing.assert_close(ops.geglu(x.cuda()).cpu(), reference.geglu(x))
                found = "compiled and run"
            else:
                from fastsds.testing import compile_only

                with compile_only(90) as compiled:
                    geglu._geglu_cuda(x)
                found = f"compiled for sm_90, {len(compiled[0].asm['cubin']):,} bytes; none runs here without a GPU"
        yield Finding("triton kernel", OK, found)
    except Exception as error:  # of the compiler, an assembler, a driver
        yield Finding("triton kernel", WRONG, first_line(error), pip("triton", "--force-reinstall"))


def bitsandbytes() -> Iterator[Finding]:
    """A step of 8-bit AdamW."""
    import torch

    line = pip("bitsandbytes", "--force-reinstall")
    try:
        from bitsandbytes.optim import AdamW8bit

        weight = torch.nn.Parameter(torch.ones(8192, device=device()))
        weight.grad = torch.ones_like(weight)
        optimizer = AdamW8bit([weight], lr=0.1)
        optimizer.step()
        moved = torch.allclose(weight.detach(), torch.full_like(weight, 0.9), atol=0.02)
        if moved and optimizer.state[weight]["state1"].dtype == torch.uint8:
            yield Finding("8-bit AdamW", OK, f"a step on the {device().type}, its state in 8 bits")
        else:
            yield Finding("8-bit AdamW", WRONG, f"a step led from 1 to {weight[0].item():.3g}, expected 0.9", line)
    except Exception as error:
        yield Finding("8-bit AdamW", WRONG, first_line(error), line)


DISTRIBUTED = """
import torch
from fastsds import distributed, sharding
from fastsds.engine import device
sharding.init_distributed()
x = torch.ones(1000, device=device())
torch.distributed.all_reduce(x)
assert x.sum() == 1000
print("found", torch.distributed.get_backend(), device())
distributed.end(0)
"""


def deepspeed() -> Iterator[Finding]:
    """DeepSpeed in a process of its own: imported, its ranks joined, a sum over them."""
    line, variables = pip("deepspeed", "--force-reinstall"), ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    alone = {k: v for k, v in os.environ.items() if k not in variables}
    root = str(Path(__file__).resolve().parents[2])
    alone["PYTHONPATH"] = os.pathsep.join(p for p in (alone.get("PYTHONPATH"), root) if p)
    try:
        command = [sys.executable, "-c", DISTRIBUTED]
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, env=alone)
    except subprocess.TimeoutExpired:
        yield Finding("deepspeed", WRONG, f"it did not answer within {PATIENCE} seconds", line)
        return
    said = re.search(r"^found (\S+) (\S+)", done.stdout, re.M)
    if done.returncode == 0 and said:
        yield Finding("deepspeed", OK, f"imported; {said[1]} on {said[2]} sums over its ranks")
    else:
        yield Finding("deepspeed", WRONG, ([x for x in done.stderr.splitlines() if x.strip()] or ["no answer"])[-1], line)


def compiler() -> Iterator[Finding]:
    """A C++ compiler that works: Triton's launcher and torch.compile need one."""
    name = os.environ.get("CXX", "g++")
    line = f"unset CXX   # it names {name}" if "CXX" in os.environ else "apt install g++"
    with tempfile.TemporaryDirectory() as folder:
        source, program = Path(folder) / "a.cpp", Path(folder) / "a"
        source.write_text("#include <vector>\nint main() { return std::vector<int>{42}[0]; }\n")
        try:
            done = subprocess.run([name, source, "-o", program], capture_output=True, text=True, timeout=60)
            answer = subprocess.run([program]).returncode if done.returncode == 0 else None
        except (OSError, subprocess.TimeoutExpired) as error:
            yield Finding("compiler", WRONG, first_line(error), line)
            return
    if answer == 42:
        yield Finding("compiler", OK, shutil.which(name) or name)
    else:
        yield Finding("compiler", WRONG, f"{name}: {(done.stderr.strip() or 'its program fails').splitlines()[0]}", line)
