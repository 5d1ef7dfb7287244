"""Steps of a cross-modal student on however many ranks there are: FOLDER OUT CONFIG..., each a DeepSpeed file or "none"."""

import json
import sys
from pathlib import Path

import tiny
import torch
from safetensors.torch import save_file

from fastsds import config, distributed, optimizer, sharding
from fastsds.crossmodal import make_crossmodal
from fastsds.engine import ranks

TEXTS = [["the red ring", "a cross"], ["white", "a blue square is left of the white cross"]] * 4


def steps(folder: str, out: Path, deepspeed: dict | None) -> None:
    """Two steps on 8 pictures with two choices each, a rank its share; rank 0 saves the weights and the losses."""
    recipe = config.load_recipe(overrides=["data.batch=8", "data.accumulation=1", f"student.model={folder}"])
    student, _ = make_crossmodal(recipe.student, 0, seed=3)
    student.projections = torch.nn.ModuleDict({"text": torch.nn.Linear(tiny.WIDTH, 12)})
    torch.nn.init.eye_(student.projections["text"].weight)
    torch.nn.init.zeros_(student.projections["text"].bias)
    engine, (rank, world, _), losses = sharding.make_engine(student, recipe, deepspeed), ranks(), []
    mine = slice(rank * 8 // world, (rank + 1) * 8 // world)
    labels = (torch.arange(8) // 3 % 2)[mine]
    pixels, tokens = tiny.pixels(8, 32)[mine], student.tokenize(TEXTS)[mine]
    for _ in range(2):
        optimizer.set_lr(engine.optimizer, 1.0)
        out_of = engine(pixels, tokens)
        loss = torch.nn.functional.cross_entropy(out_of.logits, labels)
        loss = loss + out_of.visual.square().mean() + out_of.text[:, 0].square().mean()
        engine.backward(loss)
        engine.step()
        losses.append(engine.mean(loss.detach()))
    weights = engine.state(moments=False)[0]
    if rank == 0:
        save_file({**weights, "losses": torch.stack(losses)}, out)
    engine.barrier()
    engine.close()


if __name__ == "__main__":
    folder, out, *files = [a for a in sys.argv[1:] if not a.startswith("--")]  # a launcher adds its own
    for file in files:
        deepspeed = None if file == "none" else json.loads(Path(file).read_text())
        steps(folder, Path(out) / f"{Path(file).stem}.safetensors", deepspeed)
    distributed.end(0)
