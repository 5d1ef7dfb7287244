"""Train what a recipe says: a CLIP with SDS-CLIP, a cross-modal student with CLIP-TD. Read it from top to bottom.

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
from fastsds.config import AnyRecipe, ConfigError
from fastsds.data.loader import SkipLog, ahead
from fastsds.distributed import INTERRUPTED, end
from fastsds.engine import device, ranks
from fastsds.metrics import Metrics, counts, describe
from fastsds.training import Training, before_of, kept_of, prepare, stage_before


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise ConfigError(message)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = _Parser(prog="fastsds.train", description="Train what a recipe says: SDS-CLIP or CLIP-TD.", allow_abbrev=False)
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
    output, before = Path(recipe.output), stage_before(recipe)
    begun = before is not None and args.resume == "latest" and not checkpoint.steps(output) and before_of(output).is_dir()
    resume = checkpoint.find(args.resume, output) if args.resume and not begun else None
    if holds_a_run(output) and (resume is None or output.resolve() not in resume.resolve().parents):
        what = f"all in it but {' and '.join(kept)}" if (kept := kept_of(output)) else "it"
        hint = "go on with --resume latest" if checkpoint.steps(output) else f"it has no checkpoint: remove {what}"
        raise ConfigError(f"output: {output} already holds a run; {hint}, or name another --output")
    place = torch.device("cpu") if args.dry_run else device()
    make_deterministic(place)

    # The stage before, where the recipe asks for one: a run of its own, which goes on from its own checkpoints.
    if before and not args.dry_run and not (resume and (before_of(output) / "student").is_dir()):
        first, prepared = before
        config.check(first, world_size, sharded)
        prepare(recipe, torch.device("cpu"), rank, world_size, dry=True)  # its own mistakes are said before
        made = checkpoint.steps(before_of(output))
        last = checkpoint.path_of(before_of(output), made[-1]) if made else None
        if code := train(first, prepared(first, place, rank, world_size), sharded, args, last):
            return code
    return train(recipe, prepare(recipe, place, rank, world_size, args.dry_run), sharded, args, resume)


def train(recipe: AnyRecipe, training: Training, sharded: dict | None, args: argparse.Namespace, resume: Path | None) -> int:
    # Where the run starts: a checkpoint, or what comes before the first step.
    rank, world_size, _ = ranks()
    output, data, stage = Path(recipe.output), recipe.data, sharding.stage_of(sharded)
    student, trained, objective = training.student, training.trained, training.objective
    saved = checkpoint.load(resume, recipe, training.about) if resume else None
    if saved is not None:
        checkpoint.check_engine(saved, recipe, stage, rank, world_size)
        checkpoint.put_weights(saved, student, trained)
    if args.dry_run:
        optimizer.build(student, recipe.optimizer)
        if rank == 0:
            print(describe(recipe, training, world_size, stage))
        return 0
    training.begin(resumed=saved is not None)

    # The engine; from here on the student is called only through it. The output folder is the first thing written.
    if saved is not None and rank == 0 and output.resolve() in resume.resolve().parents:
        SkipLog(output).go_back(saved.cursors)  # make_engine waits for it
    engine = sharding.make_engine(student, recipe, sharded)
    start = 0
    if saved is not None:
        start = saved.step
        checkpoint.put_state(saved, engine, objective, recipe)
    metrics = Metrics(output, rank, recipe, start)
    metrics.note(f"{output}: {counts(student, trained)}; steps {start} to {recipe.steps} on {engine.name}")
    training.begun(metrics)
    stop = Interrupt()

    def save(step: int, cursors: torch.Tensor) -> Path:
        with metrics.pause():
            about = training.about
            return checkpoint.save(output, step, engine, student, recipe, objective, about, engine.most(cursors))

    def measure(step: int) -> None:
        with metrics.pause():
            engine.module.eval()
            with torch.no_grad():
                training.evaluate(engine, step, metrics)
            engine.module.train()

    # The loop.
    engine.module.train()
    if start == 0:
        measure(0)
    images = data.batch * data.accumulation
    places = [(step, micro) for step in range(start, recipe.steps) for micro in range(data.accumulation)]
    skips = SkipLog(output)
    how = {"report": skips, "refuse": stop.refuse, "first": start * images, "cursors": saved and saved.cursors}
    loader = training.batches(**how)
    with stop, profiling.trace(output, args.profile, start, recipe.steps, rank) as mark:
        for (batch, cursors), (step, micro) in zip(ahead(loader, len(places), data.workers), places, strict=True):
            last = micro == data.accumulation - 1
            done = step + 1
            log = done % recipe.log_every == 0 or done == recipe.steps
            if micro == 0:
                optimizer.set_lr(engine.optimizer, rate := optimizer.schedule(step, recipe.steps, recipe.optimizer.warmup))
                seen: dict[str, list[torch.Tensor]] = {}
            out = engine(*batch.inputs)
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
        checkpoint.save_model(weights, student, output / "student", recipe)
        training.close()
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
    end(main())
