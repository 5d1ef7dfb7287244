"""What a run tells about itself: its recipe, metrics.jsonl, its evaluations, one status line, and what a dry run prints.

Rows also go to TensorBoard and Weights & Biases where the recipe's `log` asks for it; neither is imported otherwise.
"""

import json
import shutil
import sys
import time
from contextlib import contextmanager
from pathlib import Path

from fastsds.config import AnyRecipe, ConfigError, as_dict, dump_recipe
from fastsds.progress import EVERY, clock
from fastsds.student import count_trained, size

SHOWN = ("loss", "clip", "sds", "lambda", "rho", "cosine", "task", "text", "visual", "weight")  # in the status line


class Metrics:
    """Rank 0 makes the output folder and writes; the same calls on other ranks do nothing.

    On a resumed run the rows after its first step are dropped, so the file reads as if nothing had happened.
    Raises: ConfigError if the folder cannot be made, or Weights & Biases is asked for and cannot start.
    """

    def __init__(self, output: Path, rank: int, recipe: AnyRecipe, start: int = 0):
        self.silent, self.steps, self.start = rank != 0, recipe.steps, start
        self.path = Path(output) / "metrics.jsonl"
        self.sinks = [] if self.silent else _open(self.path.parent, recipe, start)
        self.tty = sys.stderr.isatty()
        self.began = self.marked = time.perf_counter()
        self.at, self.idle, self.said, self.width = start, 0.0, 0.0, 0
        if not self.silent and self.path.is_file():
            _drop_after(self.path, start)

    def row(self, split: str, step: int, **values) -> None:
        """Append one row and push it to the file, and its numbers to whoever else is told."""
        if self.silent:
            return
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"split": split, "step": step, **values}) + "\n")
        numbers = {f"{split}/{key}": value for key, value in values.items() if isinstance(value, int | float)}
        for sink in self.sinks:
            sink(step, numbers)

    def train(self, step: int, images_a_step: int, **values: float | None) -> None:
        """One training row, with the rate since the last one, and the status line. A value of None is left out."""
        values = {key: value for key, value in values.items() if value is not None}
        now = time.perf_counter()
        busy = max(now - self.marked - self.idle, 1e-9)
        rate = (step - self.at) * images_a_step / busy
        self.marked, self.at, self.idle = now, step, 0.0
        self.row(split="train", step=step, **values, images_per_s=round(rate, 2), seconds=round(now - self.began, 3))
        left = (self.steps - step) * images_a_step / max(rate, 1e-9)
        parts = "  ".join(f"{k} {values[k]:.4g}" for k in SHOWN if k in values)
        self.say(f"step {step}/{self.steps}  {parts}  {rate:.0f} images/s  left {clock(left)}", step == self.steps)

    def evaluation(self, step: int, result) -> None:
        """One evaluation row, and the whole result in a folder of its own."""
        if not self.silent:
            result.save(evaluation_folder(self.path.parent, step))
            self.row(split="eval", step=step, suite=result.suite, **result.metrics)
            said = "  ".join(f"{name} {result.metrics[name]:.4g}" for name in result.headline)
            self.note(f"step {step}/{self.steps}  {result.suite}: {said}")

    @contextmanager
    def pause(self):
        """Time that is not training: it does not count in images/s."""
        start = time.perf_counter()
        yield
        self.idle += time.perf_counter() - start

    def say(self, text: str, last: bool = False) -> None:
        """The status line: rewritten in place on a terminal, else a line every few seconds."""
        if self.silent:
            return
        if self.tty:
            text = text[: max(20, shutil.get_terminal_size((120, 24)).columns - 1)]
            print("\r" + text.ljust(self.width), end="\n" if last else "", file=sys.stderr, flush=True)
            self.width = 0 if last else len(text)
        elif last or time.perf_counter() - self.said >= EVERY:
            self.said = time.perf_counter()
            print(text, file=sys.stderr, flush=True)

    def note(self, text: str) -> None:
        """A line that stays."""
        if not self.silent:
            if self.width:
                print(file=sys.stderr)
                self.width = 0
            print(text, file=sys.stderr, flush=True)


def evaluation_folder(output: Path, step: int) -> Path:
    """Where a run keeps its evaluation after a step."""
    return Path(output) / "evaluations" / f"step_{step:08d}"


def counts(student, trained: list[str]) -> str:
    groups = count_trained(student, trained)
    listed = ", ".join(f"{group} {elements:,} in {tensors}" for group, (tensors, elements) in groups.items())
    total = sum(size(parameter) for parameter in student.parameters())
    return f"{sum(elements for _, elements in groups.values()):,} of {total:,} parameters train ({listed} tensors)"


def describe(recipe: AnyRecipe, training, world_size: int, stage: int | None) -> str:
    """What a dry run prints. Args: training: see `fastsds.training`."""
    data, steps = recipe.data, recipe.steps
    engine = "plain torch" if stage is None else f"ZeRO {stage}"
    images, epochs = data.batch * data.accumulation, ""
    if training.samples is not None:  # a pipe is not counted beforehand
        epochs = f" = {images * steps / training.samples:.2f} epochs of {training.samples:,}"
    return (
        f"{dump_recipe(recipe)}\n"
        f"student: {counts(training.student, training.trained)}; teacher: {training.frozen:,}, frozen\n"
        f"trained:\n{''.join(f'  {name}{chr(10)}' for name in training.trained)}"
        f"engine: {engine} on {world_size} rank(s), {recipe.precision}, {recipe.optimizer.name}\n"
        f"batch {data.batch} = {data.batch // world_size} a rank x {world_size} rank(s); "
        f"optimizer step {images} images = {data.batch} x accumulation {data.accumulation}\n"
        f"{steps} steps = {images * steps:,} images{epochs}\n"
        f"dry run: nothing was written"
    )


def read(path: Path) -> list[dict]:
    """The rows of a metrics file; a last line that was cut off is left out."""
    rows = []
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


def _open(output: Path, recipe: AnyRecipe, start: int) -> list:
    """Make the output folder with the recipe in it. Returns: functions of (step, {name: number})."""
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"output: {error}") from error
    sinks = [_tensorboard(output, start)] if recipe.log.tensorboard else []
    if recipe.log.wandb:
        sinks.append(_wandb(output, recipe, start))
    try:
        (output / "recipe.yaml").write_text(dump_recipe(recipe), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"output: {error}") from error
    return sinks


def _tensorboard(output: Path, start: int):
    """OUTPUT/tensorboard. What an earlier start wrote after the step `start` is taken back."""
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(output / "tensorboard", purge_step=start + 1 if start else None)

    def sink(step: int, numbers: dict[str, float]) -> None:
        for name, value in numbers.items():
            writer.add_scalar(name, value, step)
        writer.flush()

    return sink


def _wandb(output: Path, recipe: AnyRecipe, start: int):
    """A run named like the output folder; a resumed one goes on under its id. It ends with the process."""
    import wandb

    kept = output / "wandb" / "id"
    earlier = kept.read_text(encoding="utf-8") if start and kept.is_file() else None
    try:
        run = wandb.init(
            project=recipe.log.wandb, name=output.name, id=earlier, resume="allow", dir=output, config=as_dict(recipe),
            reinit="finish_previous", settings=wandb.Settings(console="off"),
        )  # fmt: skip
    except wandb.errors.Error as error:
        raise ConfigError(f"log.wandb: {error} (WANDB_MODE=offline needs neither an account nor a network)") from error
    kept.parent.mkdir(exist_ok=True)
    kept.write_text(run.id, encoding="utf-8")
    return lambda step, numbers: run.log(numbers, step=step)


def _drop_after(path: Path, step: int) -> None:
    kept = [row for row in read(path) if row["step"] <= step]
    partial = path.with_name(path.name + ".partial")
    partial.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
    partial.replace(path)
