"""A task asked on however many ranks there are: FOLDER ENTAILED OUT. FOLDER: a student's; ENTAILED: SNLI-VE, damaged in dev."""

import json
import sys
from datetime import timedelta
from pathlib import Path

import torch

from fastsds import distributed
from fastsds.config import ConfigError
from fastsds.crossmodal import load_crossmodal
from fastsds.data.tasks import load_task
from fastsds.evaluation.tasks import evaluate_task

SIZES = {"train": 4, "dev": 37, "test": 30, "dev_shift": 4, "shift": 21}
SPLITS = ("dev", "test", "shift")
BATCHES = (16, 64)  # of world_choice's 74, 60 and 42 examples: 5, 4 and 3 batches, or 2, 1 and 1


def asked(folder, name, seed=0):
    """An untrained student, and one of the world's tasks."""
    task = load_task(name, sizes=SIZES)
    return load_crossmodal(folder, classes=len(task.classes), seed=seed).eval(), task


def gathered(student):
    """The student as if it were sharded: all ranks wait for each other wherever one asks it."""
    own = student.forward

    def forward(*arguments):
        for parameter in student.parameters():
            torch.distributed.all_reduce(parameter.detach().clone())
        return own(*arguments)

    student.forward = forward
    return student


def main(folder: str, entailed: str, out: Path) -> None:
    torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=30))
    rank = torch.distributed.get_rank()
    student, task = asked(folder, "world_choice")
    gathered(student)
    rows = {batch: evaluate_task(student, task, SPLITS, batch=batch).rows for batch in BATCHES}
    (out / f"rows_{rank}.json").write_text(json.dumps(rows))
    student = gathered(load_crossmodal(folder, classes=3).eval())
    try:
        evaluate_task(student, load_task("snli_ve", entailed), ("dev",), batch=2)
    except ConfigError as error:
        (out / f"error_{rank}.txt").write_text(str(error))
    torch.distributed.barrier()
    distributed.end(0)


if __name__ == "__main__":
    folder, entailed, out = [a for a in sys.argv[1:] if not a.startswith("--")]  # a launcher adds its own
    main(folder, entailed, Path(out))
