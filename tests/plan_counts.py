"""Real training steps of the embedded world under each engine, and their bytes beside the plan's.

As a script it is what a launch runs on each rank: `deepspeed tests/plan_counts.py WANTED.json` writes counted.json beside it.
"""

import gc
import json
import os
import sys
from importlib.util import find_spec
from pathlib import Path

os.environ.setdefault("DS_ACCELERATOR", "cpu")
if find_spec("fastsds") is None:  # not installed: the source tree
    sys.path.append(str(Path(__file__).resolve().parent.parent))

import torch
from torch._subclasses.fake_tensor import FakeTensor

from fastsds import config, distributed

FIT = 700_000  # a bucket that holds the embedded student's gradients
ENGINES = {  # name: (ZeRO stage, the bucket's elements, overrides of the recipe)
    "0 fp32": (0, FIT, []),
    "0 bf16": (0, FIT, ["precision=bf16"]),
    "1 bf16, one micro-step": (1, FIT, ["precision=bf16", "data.accumulation=1", "teacher.micro_batch=4"]),
    "1 8-bit, DeepSpeed's own bucket": (1, None, ["optimizer.name=adamw8bit"]),
    "2 fp32, a small bucket": (2, 4096, []),
    "2 fp32, one micro-step": (2, FIT, ["data.accumulation=1"]),
    "2 bf16": (2, FIT, ["precision=bf16", "loss.gradient=full", "loss.negatives=swapped"]),
    "3 fp32": (3, FIT, ["student.checkpoint=true"]),
    "3 layernorm, 8-bit bf16": (3, FIT, ["student.tune=layernorm", "optimizer.name=adamw8bit", "precision=bf16"]),
    "3 lora": (3, FIT, ["student.tune=lora"]),
}
PLAIN = {
    "plain fp32": (None, None, ["loss.gradient=full", "loss.negatives=swapped"]),
    "plain bf16": (None, None, ["precision=bf16", "student.tune=layernorm"]),
    "plain 8-bit": (None, None, ["optimizer.name=adamw8bit", "teacher.micro_batch=4", "teacher.accelerate=true"]),
}
TEACHERS: dict = {}
BASE = ["data.batch=16", "teacher.attention=keep"]


def deepspeed_json(stage: int | None, bucket: int | None) -> dict | None:
    if stage is None:
        return None
    found = json.loads((config.CONFIGS / f"zero{stage}.json").read_text())
    if bucket:
        found["zero_optimization"]["reduce_bucket_size"] = bucket
    return found


def walk() -> int:
    """Bytes of all tensors that Python can reach, and of their gradients."""
    gc.collect()
    found = {}
    for thing in gc.get_objects():
        if isinstance(thing, torch.Tensor) and not isinstance(thing, FakeTensor) and thing.device.type != "meta":
            for tensor in (thing, thing.grad if thing.is_leaf else None):
                if tensor is not None:
                    found[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
    return sum(found.values())


def count(stage: int | None, bucket: int | None, overrides: list[str], ranks: int, rank: int) -> dict[str, list[int]]:
    """Train for two steps; the bytes of each phase, counted and planned."""
    gc.freeze()  # what was there before is not looked through again and again
    from fastsds import sharding
    from fastsds.data.loader import Loader
    from fastsds.data.sources import open_source
    from fastsds.plan.measure import Live
    from fastsds.plan.planner import Planner
    from fastsds.recipes.sds_clip import SDSCLIP
    from fastsds.student import make_student
    from fastsds.teacher import Teacher

    recipe, sharded = config.load_recipe(None, [*BASE, *overrides]), deepspeed_json(stage, bucket)
    planner = Planner(recipe, sharded, ranks, gpu=False)
    planner.teacher = TEACHERS.setdefault((recipe.teacher, recipe.loss.gradient), planner.teacher)  # measured once
    before, live = walk(), Live()
    with live:
        teacher = Teacher.of(recipe, torch.device("cpu"), planner.loaded)
        student, _ = make_student(recipe.student, teacher.latent_shape)
        micro = recipe.teacher.micro_batch
        objective = SDSCLIP(recipe.loss, teacher, 0, ranks, rank, student.head, micro)
        loader = Loader(
            open_source(recipe.data), batch=recipe.data.batch, streams=recipe.data.streams, seed=0,
            image_size=student.image_size, tokenize=student.tokenize, rank=rank, world=ranks, max_skipped=0.0,
            negatives=recipe.loss.negatives == "swapped",
        )  # fmt: skip
        engine = sharding.make_engine(student, recipe, sharded)
        batches, phases = iter(loader), {}
        engine.module.train()
        for step in range(2):
            for _ in range(recipe.data.accumulation):
                batch, _ = next(batches)
                live.peak = live.now
                loss = objective(engine(batch.pixels, batch.student_tokens), batch, step)["loss"]
                phases["ask"] = live.peak
                live.peak = live.now
                engine.backward(loss)
                phases["backward"] = live.peak
                del loss
                gc.collect()  # cycles of the backward pass die when Python pleases, which is no part of the step
                live.peak = live.now
                engine.step()
            gc.collect()
            phases |= {"step": live.peak, "between": live.now}
    if rank:
        engine.close()
        return {}
    rows = teacher._captions.values()  # the plan allows for all that the teacher may keep
    planner.captions = sum(row.numel() * row.element_size() for row in rows)
    planned, host = planner.phases(recipe.data.batch, micro), planner.held.host
    # At ZeRO 0 gradients are copied to be reduced when the backward pass is done: part of neither it nor the step.
    phases |= {"walked": walk() - before, "backward, step": max(phases["backward"], phases["step"])}
    expected = {**vars(planned), "walked": planned.between, "backward, step": max(planned.backward, planned.step)}
    found = {name: [phases[name], expected[name] + host] for name in ("between", "walked", "ask", "backward, step")}
    if ranks == 1 or stage != 0:
        found |= {name: [phases[name], expected[name] + host] for name in ("backward", "step")}
    engine.close()
    return found


def main() -> None:
    from fastsds.engine import ranks

    rank, world, _ = ranks()
    wanted = json.loads(Path(sys.argv[-1]).read_text())
    found = {name: count(*how, world, rank) for name, how in wanted.items()}
    if rank == 0:
        (Path(sys.argv[-1]).parent / "counted.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
    distributed.end(0)
