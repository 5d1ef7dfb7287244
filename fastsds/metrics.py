"""What a run tells about itself: metrics.jsonl, per-item outcomes, one status line, and what a dry run prints."""

import json
import shutil
import sys
import time
from contextlib import contextmanager
from pathlib import Path

from fastsds.config import Recipe, dump_recipe
from fastsds.progress import EVERY, clock
from fastsds.student import count_trained, size


class Metrics:
    """Rank 0 writes; the same calls on other ranks do nothing.

    On a resumed run the rows after its first step are dropped, so the file reads as if nothing had happened.
    """

    def __init__(self, output: Path, rank: int, steps: int, start: int = 0):
        self.silent, self.steps, self.start = rank != 0, steps, start
        self.path = Path(output) / "metrics.jsonl"
        self.tty = sys.stderr.isatty()
        self.began = self.marked = time.perf_counter()
        self.at, self.idle, self.said, self.width = start, 0.0, 0.0, 0
        if not self.silent and self.path.is_file():
            _drop_after(self.path, start)

    def row(self, **values) -> None:
        """Append one row and push it to the file."""
        if not self.silent:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(values) + "\n")

    def train(self, step: int, images_a_step: int, **values: float) -> None:
        """One training row, with the rate since the last one, and the status line."""
        now = time.perf_counter()
        busy = max(now - self.marked - self.idle, 1e-9)
        rate = (step - self.at) * images_a_step / busy
        self.marked, self.at, self.idle = now, step, 0.0
        self.row(split="train", step=step, **values, images_per_s=round(rate, 2), seconds=round(now - self.began, 3))
        left = (self.steps - step) * images_a_step / max(rate, 1e-9)
        parts = "  ".join(f"{k} {values[k]:.4g}" for k in ("loss", "clip", "sds", "lambda", "rho", "cosine") if k in values)
        self.say(f"step {step}/{self.steps}  {parts}  {rate:.0f} images/s  left {clock(left)}", step == self.steps)

    def evaluation(self, step: int, suite: str, values: dict[str, float], items: list[dict]) -> None:
        """One evaluation row, and items_STEP.jsonl beside it."""
        self.row(split="eval", step=step, suite=suite, **values)
        if not self.silent:
            text = "".join(json.dumps(item) + "\n" for item in items)
            (self.path.parent / f"items_{step}.jsonl").write_text(text, encoding="utf-8")
            self.note(f"step {step}/{self.steps}  {suite}: " + "  ".join(f"{k} {v:.4g}" for k, v in values.items()))

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


def counts(student, trained: list[str]) -> str:
    groups = count_trained(student, trained)
    listed = ", ".join(f"{group} {elements:,} in {tensors}" for group, (tensors, elements) in groups.items())
    total = sum(size(parameter) for parameter in student.parameters())
    return f"{sum(elements for _, elements in groups.values()):,} of {total:,} parameters train ({listed} tensors)"


def describe(recipe: Recipe, student, trained, teacher, source, world_size: int, stage: int | None) -> str:
    """What a dry run prints."""
    data, steps = recipe.data, recipe.steps
    frozen = sum(p.numel() for p in teacher.parameters()) if teacher else 0
    engine = "plain torch" if stage is None else f"ZeRO {stage}"
    images = data.batch * data.accumulation
    return (
        f"{dump_recipe(recipe)}\n"
        f"student: {counts(student, trained)}; teacher: {frozen:,}, frozen\n"
        f"trained: {' '.join(trained)}\n"
        f"engine: {engine} on {world_size} rank(s), {recipe.precision}, {recipe.optimizer.name}\n"
        f"contrastive batch {data.batch} = {data.batch // world_size} a rank x {world_size} rank(s); "
        f"optimizer step {images} images = {data.batch} x accumulation {data.accumulation}\n"
        f"{steps} steps = {images * steps:,} images = {images * steps / len(source):.2f} epochs of {len(source):,}\n"
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


def _drop_after(path: Path, step: int) -> None:
    kept = [row for row in read(path) if row["step"] <= step]
    partial = path.with_name(path.name + ".partial")
    partial.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
    partial.replace(path)
