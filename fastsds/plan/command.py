"""`fastsds plan`: what a recipe needs, before it is run: bytes of a rank, FLOP, images/s, the bank, the largest batch.

Nothing is read but configurations, nothing is fetched, nothing is allocated: docs/plan.md says how each number comes about.
"""

import argparse
import json
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

from fastsds import config, hub
from fastsds.config import ConfigError, Recipe
from fastsds.data.sources import PIPE
from fastsds.plan.cards import CARDS, FILLED
from fastsds.plan.planner import Planner
from fastsds.plan.states import not_counted
from fastsds.plan.table import size, table
from fastsds.progress import Line, clock

PAYS = 0.05  # of the peak: what saves less hardly pays
BUCKET = 50_000_000  # elements that are enough to reduce at a time
NAMES = {"adamw8bit": "8-bit Adam", "zero2": "ZeRO 2"}


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="fastsds plan", description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--recipe", metavar="FILE", help="what to train (YAML). Default: the embedded world")
    parser.add_argument("--config", metavar="FILE", help="DeepSpeed's JSON: how to shard. Without it: plain torch")
    parser.add_argument("--set", metavar="KEY=VALUE", action="append", default=[], help="override one recipe value")
    parser.add_argument("--ranks", type=int, default=1, metavar="N", help="processes, one GPU each (default 1)")
    parser.add_argument("--card", choices=[*CARDS, "cpu"], help="its memory and peak; cpu: a run without a GPU")
    parser.add_argument("--memory", type=float, metavar="GB", help="what a run may take of a card, in place of --card's")
    parser.add_argument("--peak-tflops", type=float, metavar="X", help="of one card, in place of --card's")
    parser.add_argument("--mfu", type=float, default=1.0, metavar="Y", help="the share of the peak that is reached (default 1)")
    parser.add_argument("--samples", type=int, metavar="N", help="image-caption pairs, where the data are not on this disk")
    parser.add_argument("--json", action="store_true", help="for programs")
    asked = parser.parse_args(argv)
    for name, wrong, expected in (
        ("ranks", asked.ranks < 1, "at least 1"), ("mfu", not 0 < asked.mfu <= 1, "above 0 and at most 1"),
        ("samples", asked.samples is not None and asked.samples < 1, "at least 1"),
        ("memory", asked.memory is not None and asked.memory <= 0, "above 0"),
        ("peak-tflops", asked.peak_tflops is not None and asked.peak_tflops <= 0, "above 0"),
    ):  # fmt: skip
        if wrong:
            raise ConfigError(f"--{name} is {getattr(asked, name.replace('-', '_'))}; expected {expected}")
    return asked


def main(argv: list[str]) -> int:
    asked, line, began = parse(argv), Line(sys.stderr), time.monotonic()
    recipe = config.load_recipe(asked.recipe, asked.set, only=Recipe)
    deepspeed = config.load_deepspeed(asked.config) if asked.config else None
    config.check(_without_missing(recipe), asked.ranks, deepspeed)
    say = lambda what: line.say(f"plan: {what} ({clock(time.monotonic() - began)})")  # noqa: E731
    with hub.offline():
        found = summary(Planner(recipe, deepspeed, asked.ranks, asked.card != "cpu", asked.samples, say), asked, deepspeed)
    line.end()
    print(json.dumps(found, indent=1) if asked.json else table(found))
    return 0


def _without_missing(recipe: Recipe) -> Recipe:
    """The recipe with what is not on this disk taken out: a plan does not need it."""
    changes = {"data": {"source": "world", "images": None}, "teacher": {"path": "world"}}
    for section, values in changes.items():
        part = getattr(recipe, section)
        for key in values:
            value = getattr(part, key)
            if value and Path(value).is_absolute() and "{" not in value and not Path(value).exists():
                recipe = replace(recipe, **{section: replace(part, **values)})
                break
    return recipe


def summary(planner: Planner, asked: argparse.Namespace, deepspeed: dict | None) -> dict:
    """All that a plan says, as plain values."""
    recipe, engine, student, teacher = planner.recipe, planner.engine, planner.student, planner.teacher
    batch, micro, mine = recipe.data.batch, recipe.teacher.micro_batch, recipe.data.batch // planner.engine.ranks
    planner.say("activations")
    phases, use, contrast = planner.phases(batch, micro), student.use(mine), student.contrast(batch)
    trained = sum(student.parameters[name] for name in student.trained)
    found = {
        "engine": f"{engine.name} on {engine.ranks} rank(s), {recipe.precision}, {recipe.optimizer.name}",
        "batch": {"contrastive": batch, "a_rank": mine, "accumulation": recipe.data.accumulation, "at_a_time": micro or mine},
        "parameters": {
            "student": sum(student.parameters.values()), "trained": trained, "head": planner.head_elements,
            **({f"teacher_{part}": teacher.parameters[part] for part in planner.loaded}),
        },
        "bytes_a_rank": {
            **{k: v for k, v in asdict(planner.held).items() if k not in ("second", "reduced", "stepping", "host")},
            **{f"teacher_{part}": n for part, n in planner.teacher_weights.items()},
            "captions": planner.captions, "batch": planner.batch_bytes(mine),
            "student_activations": use.held, "student_peak": use.peak, "contrast": contrast.held,
            "teacher_peak": planner.asked(micro or mine), "optimizer_step": planner.held.stepping,
        },
        "bytes_host": planner.held.host,
        "peak": {**asdict(phases), "all": phases.peak, "fullest": phases.fullest},
    }  # fmt: skip
    planner.say("FLOP")
    flop = planner.flop
    images = batch * recipe.data.accumulation
    found["flop_a_step"] = {**flop, "all": sum(flop.values())}
    peak = asked.peak_tflops or (CARDS[asked.card].tflops if asked.card in CARDS and recipe.precision == "bf16" else None)
    rate = peak and 1e12 * peak * asked.mfu * engine.ranks
    if rate:
        found["speed"] = {"tflops": peak, "mfu": asked.mfu, "images_per_s": rate * images / sum(flop.values())}
        found["speed"]["step_seconds"] = sum(flop.values()) / rate
    if teacher is not None and (recipe.bank.path or recipe.loss.gradient == "amortised"):
        planner.say("the bank")
        found["bank"] = dict(planner.bank)
        if rate and planner.rows:
            found["bank"]["seconds"] = planner.bank["flop"] / rate
    limit = 1e9 * asked.memory if asked.memory else FILLED * CARDS[asked.card].memory if asked.card in CARDS else None
    if limit:
        found["card"] = {"name": asked.card, "limit": limit, "fits": phases.peak <= limit}
        planner.say("the largest batch")
        found["card"]["largest_batch"] = planner.largest_batch(limit)
        if planner.running:
            planner.say("the largest micro-batch")
            found["card"]["largest_micro_batch"] = planner.largest_micro_batch(limit)
    found["saves"] = savings(planner, phases.peak)
    found["notes"] = notes(planner, asked, deepspeed, found["saves"])
    return found


def savings(planner: Planner, peak: int) -> dict[str, float]:
    """Bytes that 8-bit Adam and ZeRO 2 (its bucket no larger than needed) save of the peak, against AdamW and ZeRO 0."""
    batch, micro, engine = planner.recipe.data.batch, planner.recipe.teacher.micro_batch, planner.engine
    of = lambda **changes: planner.phases(batch, micro, replace(engine, **changes)).peak  # noqa: E731
    found = {"adamw8bit": of(optimizer="adamw") - of(optimizer="adamw8bit")}
    if engine.ranks > 1:
        small = engine.zero.model_copy(update={"reduce_bucket_size": enough(planner)})
        found["zero2"] = of(stage=0) - of(stage=2, zero=small)
    return {name: {"bytes": n, "of_peak": n / peak} for name, n in found.items()}


def enough(planner: Planner) -> int:
    return min(BUCKET, sum(map(sum, planner.student.groups)))


def notes(planner: Planner, asked: argparse.Namespace, deepspeed: dict | None, saves: dict) -> list[str]:
    """What to know beside the numbers, a line each."""
    recipe, engine, said = planner.recipe, planner.engine, []
    if planner.teacher is not None and planner.teacher.assumed:
        said.append(f"teacher {recipe.teacher.path} is not on this disk: the sizes of Stable Diffusion 1.x are assumed")
    words = [
        f"{NAMES[name]} saves {size(s['bytes'])}, {100 * s['of_peak']:.1f} % of the peak: "
        + ("it pays" if s["of_peak"] >= PAYS else "it hardly pays")
        for name, s in saves.items()
    ]
    said.append("; ".join(words) + ("" if engine.ranks > 1 else "; ZeRO has nothing to share out on one rank"))
    if engine.zero is not None and engine.stage > 0 and engine.zero.reduce_bucket_size > 2 * enough(planner):
        said.append(
            f"DeepSpeed's zero_optimization.reduce_bucket_size, {engine.zero.reduce_bucket_size:,} elements, takes "
            f"{size(engine.width * engine.zero.reduce_bucket_size)} of every rank; {enough(planner):,} are enough"
        )
    if deepspeed and (keys := not_counted(deepspeed)):
        said.append(f"not counted: what {', '.join(keys)} of the DeepSpeed file move elsewhere")
    compiled = {"teacher.compile": recipe.teacher.compile, "teacher.cuda_graph": recipe.teacher.cuda_graph}
    if names := [name for name, on in {**compiled, "student.compile": recipe.student.compile}.items() if on]:
        said.append(f"not counted: {', '.join(names)}; the activations are those of eager torch")
    if asked.card in CARDS and recipe.precision != "bf16" and not asked.peak_tflops:
        said.append("no images/s: a card's peak here is bf16's, and the recipe computes in fp32; give --peak-tflops")
    if planner.rows is None and recipe.loss.gradient == "amortised":
        pipe = recipe.data.source.startswith(PIPE)
        absent = "is not on this disk: --samples N gives the bank's size"
        why = "is read in its own order: no bank is made of it" if pipe else absent
        said.append(f"{recipe.data.source} {why}")
    return said

