"""`fastsds plan` against what real runs hold: engines, activations, optimizer state, the bank on disk; FLOP against formulas.

As a script it is what a launch runs on each rank: real training steps, and their bytes beside the plan's, as JSON.
"""

import gc
import json
import os
import sys
from pathlib import Path

os.environ.setdefault("DS_ACCELERATOR", "cpu")
if __name__ == "__main__":
    sys.path.append(str(Path(__file__).resolve().parent.parent))

import torch
from torch._subclasses.fake_tensor import FakeTensor

from fastsds import config

CLOSE = 0.05
ENGINES = {  # name: (stage, overrides)
    **{f"{stage} {precision}": (stage, [f"precision={precision}"]) for stage in range(4) for precision in ("fp32", "bf16")},
    **{f"{stage} 8-bit": (stage, ["optimizer.name=adamw8bit"]) for stage in range(4)},
    "2 8-bit bf16": (2, ["optimizer.name=adamw8bit", "precision=bf16"]),
    "3 layernorm": (3, ["student.tune=layernorm"]),
    "2 layernorm": (2, ["student.tune=layernorm", "loss.gradient=sds"]),
    "1 once": (1, ["data.accumulation=1", "teacher.micro_batch=4"]),
}
PLAIN = {"plain fp32": (None, []), "plain bf16": (None, ["precision=bf16"]), "plain 8-bit": (None, ["optimizer.name=adamw8bit"])}
BASE = ["data.batch=16", "loss.gradient=full", "teacher.accelerate=false", "loss.negatives=swapped"]


def deepspeed_json(stage: int | None, bucket: int | None = 700_000) -> dict | None:
    if stage is None:
        return None
    found = json.loads((config.CONFIGS / f"zero{stage}.json").read_text())
    if bucket:
        found["zero_optimization"]["reduce_bucket_size"] = bucket
    return found


# -- engines -----------------------------------------------------------------------------------------------------------


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


def count(stage: int | None, overrides: list[str], ranks: int, rank: int) -> dict[str, list[int]]:
    """Train for two steps; the bytes of each phase, counted and planned."""
    from fastsds import sharding
    from fastsds.data.loader import Loader
    from fastsds.data.sources import open_source
    from fastsds.plan.measure import Live
    from fastsds.plan.planner import Planner
    from fastsds.recipes.sds_clip import SDSCLIP
    from fastsds.student import make_student
    from fastsds.teacher import Teacher

    recipe, sharded = config.load_recipe(None, [*BASE, *overrides]), deepspeed_json(stage)
    planner = Planner(recipe, sharded, ranks, gpu=False)
    before, live, found = walk(), Live(), {}
    with live:
        teacher = Teacher.of(recipe, torch.device("cpu"), planner.loaded)
        student, _ = make_student(recipe.student, teacher.latent_shape)
        micro = recipe.teacher.micro_batch
        objective = SDSCLIP(recipe.loss, teacher, 0, ranks, rank, student.head, micro)
        loader = Loader(
            open_source(recipe.data), batch=recipe.data.batch, streams=recipe.data.streams, seed=0, image_size=student.image_size,
            tokenize=student.tokenize, rank=rank, world=ranks, negatives=True, max_skipped=0.0,
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
                live.peak = live.now
                del loss
                engine.step()
            gc.collect()
            phases |= {"step": live.peak, "between": live.now}
    planned, host = counted_captions(planner, teacher).phases(recipe.data.batch, micro), planner.held.host if rank == 0 else 0
    phases |= {"walked": walk() - before, "backward, step": max(phases["backward"], phases["step"])}
    expected = {**vars(planned), "walked": planned.between, "backward, step": max(planned.backward, planned.step)}
    for name in ("between", "walked", "ask", "backward", "step", "backward, step"):
        found[name] = [phases[name], expected[name] + host]
    if ranks > 1 and stage == 0:  # gradients are copied to be reduced when the backward pass is done: part of neither
        del found["backward"], found["step"]
    engine.close()
    return found


def counted_captions(planner, teacher):
    """The plan allows for all captions that the teacher may keep; after two steps it has a few."""
    rows = teacher._captions.values()
    planner.captions = sum(row.numel() * row.element_size() for row in rows)
    return planner


def main() -> None:
    from fastsds.engine import ranks

    rank, world, _ = ranks()
    wanted = json.loads(Path(sys.argv[-1]).read_text())
    found = {name: count(stage, overrides, world, rank) for name, (stage, overrides) in wanted.items()}
    if rank == 0:
        (Path(sys.argv[-1]).parent / "counted.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
