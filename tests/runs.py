"""Runs of the trainer in tests: a tiny recipe, one run in this process, many in one DeepSpeed launch.

As a script it is what a launch runs: `deepspeed tests/runs.py PLAN`, PLAN a JSON list of command lines.
"""

import json
import os
import socket
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if find_spec("fastsds") is None:  # not installed: the source tree
    sys.path.append(str(ROOT))

os.environ.setdefault("DS_ACCELERATOR", "cpu")  # these tests compare runs on the CPU, also where there is a GPU

STEPS = 20
TINY = """
steps: 20
student: {model: ./student}
teacher: {path: ./teacher}
data: {batch: 32, accumulation: 2}
optimizer: {warmup: 5}
log_every: 1
checkpoint_every: 10
eval: {suite: none}
"""


def write_recipe(folder: Path) -> Path:
    """A tiny teacher and student, untrained, and the recipe that trains one with the other."""
    import tiny

    tiny.save_teacher(folder / "teacher")
    tiny.save_student(folder / "student")
    (folder / "recipe.yaml").write_text(TINY)
    return folder / "recipe.yaml"


def sets(*values: str) -> list[str]:
    return [part for value in values for part in ("--set", value)]


def train(*argv) -> int:
    """One run in this process, on plain torch; what it sets for the process is put back."""
    import torch

    from fastsds import train as trainer

    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    try:
        return trainer.main([str(a) for a in argv])
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = before[1]


def rows(output: Path, split: str = "train") -> list[dict]:
    found = [json.loads(line) for line in (Path(output) / "metrics.jsonl").read_text().splitlines()]
    return [row for row in found if row["split"] == split]


def losses(output: Path, key: str = "loss") -> list[float]:
    return [row[key] for row in rows(output)]


def evaluation(output: Path, step: int):
    """The evaluation that a run made after a step."""
    from fastsds.evaluation.results import load_result
    from fastsds.metrics import evaluation_folder

    return load_result(evaluation_folder(output, step))


def relative(a: list[float], b: list[float]) -> float:
    """max |a - b| / max |b|."""
    assert len(a) == len(b), (len(a), len(b))
    return max(abs(x - y) for x, y in zip(a, b)) / max(map(abs, b))


def at(output: Path, step: int) -> Path:
    return Path(output) / "checkpoints" / f"step_{step:08d}"


def deepspeed(*argv, ranks: int | None = None, timeout: int = 900, accelerator: str = "cpu") -> subprocess.CompletedProcess:
    """DeepSpeed's launcher, as the `deepspeed` command runs it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [str(Path(sys.executable).with_name("deepspeed")), f"--master_port={port}"]
    command += [f"--num_gpus={ranks}"] if ranks else []
    return subprocess.run([*command, *map(str, argv)], cwd=ROOT, timeout=timeout, capture_output=True, text=True,
                          env={**os.environ, "DS_ACCELERATOR": accelerator})  # fmt: skip


def launch(ranks: int, plan: dict[str, list], folder: Path, accelerator: str = "cpu") -> dict[str, Path]:
    """All runs of a plan, {name: arguments}, in one launch. Returns {name: output folder}; a failed run raises."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [["--output", str(folder / name), *map(str, argv)] for name, argv in plan.items()]
    (folder / "plan.json").write_text(json.dumps(lines))
    done = deepspeed(__file__, folder / "plan.json", ranks=ranks, accelerator=accelerator)
    codes = folder / "codes.json"
    found = json.loads(codes.read_text()) if codes.exists() else []
    said = f"{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    assert (found, done.returncode) == ([0] * len(plan), 0), f"{found} of {list(plan)}, then {done.returncode}\n{said}"
    return {name: folder / name for name in plan}


def main() -> None:
    from fastsds import distributed
    from fastsds import train as trainer

    plan = Path(next(a for a in sys.argv[1:] if not a.startswith("--")))
    codes = []
    for argv in json.loads(plan.read_text()):
        codes.append(trainer.main(argv))
        if os.environ.get("RANK") == "0":
            (plan.parent / "codes.json").write_text(json.dumps(codes))
    distributed.end(0)


if __name__ == "__main__":
    main()
