"""Train a CLIP with SDS-CLIP. Read it from top to bottom.

    deepspeed fastsds/train.py --config configs/zero2.json       the student sharded by ZeRO, on CPU or GPUs
    python -m fastsds.train                                      plain torch, one device, no DeepSpeed

--config says how to shard (DeepSpeed's JSON), --recipe what to train (YAML; default: the embedded world), --set a.b=c
overrides one value. A step is a pure function of (recipe, step): data order, noise and timesteps are counted, not
drawn, so a resumed run is the same run.
"""

import os
import sys
import time

if __name__ == "__main__":  # run as a script, the folder `fastsds` itself is first on the path: take it off
    _here = os.path.dirname(os.path.abspath(__file__))
    sys.path[:] = [entry for entry in sys.path if os.path.abspath(entry) != _here]
    from importlib.util import find_spec

    if find_spec("fastsds") is None:  # not installed: the source tree
        sys.path.append(os.path.dirname(_here))

import argparse
import dataclasses
import math
import signal
from pathlib import Path

import torch

from fastsds import checkpoint, config, optimizer, profiling, sharding
from fastsds.config import ConfigError, Recipe
from fastsds.engine import device, ranks
from fastsds.metrics import Metrics, counts, describe

INTERRUPTED = 130


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise ConfigError(message)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = _Parser(prog="fastsds.train", description="Train a CLIP with SDS-CLIP.", allow_abbrev=False)
    parser.add_argument("--config", metavar="FILE", help="DeepSpeed's JSON: how to shard. Without it: plain torch")
    parser.add_argument("--recipe", metavar="FILE", help="what to train (YAML). Default: the embedded world")
    parser.add_argument("--set", metavar="KEY=VALUE", action="append", default=[], help="override one recipe value")
    parser.add_argument("--resume", metavar="latest|PATH", help="go on from a checkpoint")
    parser.add_argument("--output", metavar="DIR", help="override the recipe's output folder")
    parser.add_argument("--dry-run", action="store_true", help="check everything, print the run, write nothing")
    parser.add_argument("--profile", type=profiling.count, default=0, metavar="N", help="trace N steps into OUTPUT/profile")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # DeepSpeed's launcher passes it
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> int:
    # The recipe, and every check that needs no model.
    rank, world_size, _ = ranks()
    recipe = config.load_recipe(args.recipe, args.set)
    if args.output is not None:
        recipe = dataclasses.replace(recipe, output=args.output)
    sharded = config.load_deepspeed(args.config) if args.config else None
    config.check(recipe, world_size, sharded)
    stage = sharding.stage_of(sharded)
    output, loss, data = Path(recipe.output), recipe.loss, recipe.data
    resume = checkpoint.find(args.resume, output) if args.resume else None
    if holds_a_run(output) and (resume is None or output.resolve() not in resume.resolve().parents):
        hint = "go on with --resume latest" if checkpoint.steps(output) else "it has no checkpoint: remove it"
        raise ConfigError(f"output: {output} already holds a run; {hint}, or name another --output")
    place = torch.device("cpu") if args.dry_run else device()
    make_deterministic(place)

    # The frozen teacher, the student, the data.
    from fastsds.data.loader import Loader, SkipLog, ahead
    from fastsds.data.sources import open_source
    from fastsds.recipes.head import forget_sums, init_head
    from fastsds.recipes.sds_clip import SDSCLIP, teacher_parts
    from fastsds.student import make_student, save_student

    running = teacher_parts(loss, recipe.bank)
    parts = teacher_parts(loss, recipe.bank, recipe.head.init)  # and what the head's start asks
    teacher = bank = None
    if parts:
        from fastsds.teacher import Teacher

        teacher = Teacher.of(recipe, place, parts)
    if recipe.bank.path and loss.lambda_ != 0:
        from fastsds.teacher.bank import Bank

        bank = Bank(recipe)
    shape = (teacher or bank).latent_shape if teacher or bank else None
    student, trained = make_student(recipe.student, shape, place, recipe.seed)
    source = open_source(data, recipe.seed)
    count = len(source) if hasattr(source, "__len__") else None
    about = {"samples": count, "identity": None if count is None else source.identity()}
    if count is not None and data.batch > count:
        raise ConfigError(f"data.batch is {data.batch}, larger than the data: {data.source} has {count} samples")
    if bank:
        bank.attach(source, teacher if recipe.bank.refresh_every else None, rank, world_size)

    def batches(asked: tuple[str, ...], **how) -> Loader:
        how = {"rank": rank, "world": world_size, "reach": bank and bank.reach, "read": bank and bank.read, **how}
        return Loader(
            source, batch=data.batch, streams=data.streams, seed=recipe.seed, image_size=student.image_size,
            tokenize=student.tokenize, negatives=loss.negatives == "swapped", shuffled=loss.captions == "shuffled",
            teacher_size=teacher.image_size if "vae" in asked else None, device=place, max_skipped=data.max_skipped,
            **how,
        )  # fmt: skip

    # Where the run starts: a checkpoint, or the head's initialisation.
    objective = SDSCLIP(loss, teacher, recipe.seed, world_size, rank, student.head, recipe.teacher.micro_batch,
                        bank and bank.log_snr)
    saved = checkpoint.load(resume, recipe, about) if resume else None
    if saved is not None:
        checkpoint.check_engine(saved, recipe, stage, rank, world_size)
        checkpoint.put_weights(saved, student, trained)
    evaluate = make_evaluation(recipe)
    if args.dry_run:
        optimizer.build(student, recipe.optimizer)
        if rank == 0:
            print(describe(recipe, student, trained, teacher, source, world_size, stage))
        return 0
    started = {}
    if saved is None and shape is not None:
        kept = bank and recipe.head.init == "ridge"  # the latents are in the bank
        how = {"rank": 0, "world": 1, **({"read": bank.latents} if kept else {})}  # whole batches, whatever the ranks
        whole = lambda first, cursors: batches(parts, first=first, cursors=cursors, **how)  # noqa: E731
        latents = (lambda batch: batch.latents) if kept else None
        started = init_head(student, teacher, whole, recipe, source, latents=latents, rank=rank)

    # The engine; from here on the student is called only through it. The output folder is the first thing written.
    if saved is not None and rank == 0 and output.resolve() in resume.resolve().parents:
        SkipLog(output).go_back(saved.cursors)  # make_engine waits for it
    engine = sharding.make_engine(student, recipe, sharded)
    start = 0
    if saved is not None:
        start = saved.step
        checkpoint.put_state(saved, engine, objective, recipe)
    metrics = Metrics(output, rank, recipe, start)
    if rank == 0:
        forget_sums(output)
    metrics.note(f"{output}: {counts(student, trained)}; steps {start} to {recipe.steps} on {engine.name}")
    if started:
        metrics.row(split="head", step=0, init=recipe.head.init, **started)
    if teacher and teacher.acceleration:
        metrics.note(f"teacher: {teacher.acceleration}")
    stop = Interrupt()

    def save(step: int, cursors: torch.Tensor) -> Path:
        with metrics.pause():
            return checkpoint.save(output, step, engine, student, recipe, objective, about, engine.most(cursors))

    def measure(step: int) -> None:
        with metrics.pause():
            engine.module.eval()
            with torch.no_grad():
                evaluate(engine, step, metrics)
            engine.module.train()

    # The loop.
    engine.module.train()
    if start == 0:
        measure(0)
    images = data.batch * data.accumulation
    places = [(step, micro) for step in range(start, recipe.steps) for micro in range(data.accumulation)]
    skips = SkipLog(output)
    loader = batches(running, report=skips, refuse=stop.refuse, first=start * images, cursors=saved and saved.cursors)
    with stop, profiling.trace(output, args.profile, start, recipe.steps, rank) as mark:
        for (batch, cursors), (step, micro) in zip(ahead(loader, len(places), data.workers), places, strict=True):
            last = micro == data.accumulation - 1
            done = step + 1
            log = done % recipe.log_every == 0 or done == recipe.steps
            if micro == 0:
                optimizer.set_lr(engine.optimizer, rate := optimizer.schedule(step, recipe.steps, recipe.optimizer.warmup))
                seen: dict[str, list[torch.Tensor]] = {}
            out = engine(batch.pixels, batch.student_tokens)
            values = objective(out, batch, step, diagnose=log and last)
            engine.backward(values["loss"])
            engine.step()
            if log:
                for key, value in values.items():
                    seen.setdefault(key, []).append(value.detach().float())
            if not last:
                continue
            mark()
            if log:
                means = engine.mean(torch.stack([torch.stack(v).mean() for v in seen.values()])).tolist()
                row = dict(zip(seen, means, strict=True))
                metrics.train(done, images, **row, grad_norm=engine.grad_norm(), lr=rate * recipe.optimizer.lr)
                if not math.isfinite(row["loss"]):
                    raise FloatingPointError(f"the loss is {row['loss']} at step {done}; see {metrics.path}")
            if done < recipe.steps and recipe.eval.every and done % recipe.eval.every == 0:
                measure(done)
            stopped = engine.any(stop.asked)
            if stopped or (recipe.checkpoint_every and done % recipe.checkpoint_every == 0 and done < recipe.steps):
                where = save(done, cursors)
            if stopped and done < recipe.steps:
                refused = engine.any(stop.why is not None)
                engine.close()
                if refused:
                    why = stop.why or f"data.max_skipped is {data.max_skipped}, and more cannot be used: see {skips.path}"
                    raise ConfigError(f"{where} is complete, and --resume latest goes on where more may be skipped; {why}")
                metrics.note(f"stopped after step {done}; {where} is complete: same command with --resume latest goes on")
                return INTERRUPTED

    # The end: the student as a folder of its library.
    if start < recipe.steps:
        measure(recipe.steps)
        save(recipe.steps, cursors)
    weights, _ = engine.state(moments=False)
    if rank == 0:
        save_student(weights, student, output / "student")
        if bank:
            bank.close()
        metrics.note(f"done: {output / 'student'} ({student.family.loads}), {metrics.path}")
    engine.barrier()
    engine.close()
    return 0


def holds_a_run(output: Path) -> bool:
    return any((output / name).exists() for name in ("metrics.jsonl", "recipe.yaml", "checkpoints", "student"))


def make_deterministic(device: torch.device) -> None:
    """Deterministic algorithms where they cost nothing: on the CPU."""
    if device.type == "cpu":
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False


class Interrupt:
    """Ctrl-C or SIGTERM asks the loop to stop after its step; a second Ctrl-C stops at once. why: what the data end it for."""

    def __init__(self):
        self.asked, self.why, self.before = False, None, {}

    def __enter__(self):
        for number in (signal.SIGINT, signal.SIGTERM):
            self.before[number] = signal.signal(number, self.ask)
        return self

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def refuse(self, why: str):
        self.asked, self.why = True, why

    def ask(self, number, frame):
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = True


def make_evaluation(recipe: Recipe):
    """A function of (engine, step, metrics) that asks the recipe's suite. Every rank calls it: ZeRO-3 needs them all."""
    asked = recipe.eval
    if asked.suite == "none":
        return lambda engine, step, metrics: None
    from fastsds.evaluation.run import evaluate
    from fastsds.evaluation.scorer import ClipScorer
    from fastsds.evaluation.suite import load_suite

    try:
        suite = load_suite(asked.suite, asked.data, asked.items)
    except ConfigError as error:
        raise ConfigError(f"eval.suite, eval.data: {error}") from error
    return lambda engine, step, metrics: metrics.evaluation(step, evaluate(suite, ClipScorer(engine)))


def main(argv: list[str] | None = None) -> int:
    try:
        return run(parse(argv))
    except ConfigError as error:
        if ranks()[0]:  # one message for all ranks: rank 0 has the same one, and its exit ends the others
            time.sleep(10)
        print(f"error: {error}", file=sys.stderr)
        return 2
    except FloatingPointError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return INTERRUPTED


if __name__ == "__main__":
    code = main()
    if code in (0, INTERRUPTED) and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    sys.exit(code)
