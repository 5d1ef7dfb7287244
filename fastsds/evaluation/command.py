"""`fastsds eval`: a model, or two, on standard suites, or on a task: values with their errors, and paired differences.

    fastsds eval --model ViT-B-32-quickgelu:openai --suite winoground=data/winoground --suite sugarcrepe=data/sugarcrepe
    fastsds eval --model runs/mine --baseline ViT-B-32-quickgelu:openai --suite winoground,sugarcrepe --data data
    fastsds eval --model runs/td --task snli_ve=data/snli_ve --split test
    fastsds eval --compare evaluations/runs_mine evaluations/ViT-B-32-quickgelu_openai
    fastsds eval --list

Every result is kept in OUTPUT/MODEL/SUITE, with an outcome an item, and is not made again. docs/evaluation.md says where the
data come from, and how the table is read.
"""

import argparse
import inspect
import os
import sys
from pathlib import Path

import torch

from fastsds.config import ConfigError
from fastsds.evaluation import named, task_command
from fastsds.evaluation.compare import compare
from fastsds.evaluation.results import RESULT, Result, load_result
from fastsds.evaluation.run import evaluate
from fastsds.evaluation.suite import LOADERS, MADE, Suite, load_suite, options_of, suite_names
from fastsds.evaluation.table import FORMATS, Shown

OUTPUT = Path("evaluations")
OF_DIFFUSION = ("teacher", "steps", "log_snr", "weighting", "stop", "correction")


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="fastsds eval", description=__doc__.split("\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("--model", metavar="M", help=named.WANTED)
    add("--baseline", metavar="M", help="another model: the table then has paired differences, model - baseline")
    add("--suite", action="append", default=[], metavar="NAME[=PATH]", help="may be repeated; or NAME,NAME,... with --data")
    add("--data", type=Path, metavar="PATH", help="where suites without a PATH lie: PATH/NAME if that is there, else PATH")
    add("--task", metavar="NAME[=PATH]", help="in place of suites: a task, of a cross-modal student's folder (docs/tasks.md)")
    add("--split", action="append", default=[], metavar="NAME", help="of the task; may be repeated")
    add("--option", action="append", default=[], metavar="[SUITE.]NAME=VALUE", help="of the suites that have it, or the task")
    add("--scorer", default="clip", metavar="S", help="clip (default); diffusion, a teacher; or MODULE:NAME of your own")
    add("--precision", choices=tuple(named.AUTOCAST), default="fp32", help="in which models compute (default fp32)")
    add("--batch", type=int, metavar="N", help="images, or captions, at a time; of diffusion, pairs")
    add("--workers", type=int, metavar="N", help="threads that decode images")
    add("--output", type=Path, default=OUTPUT, metavar="DIR", help=f"results are kept in DIR/MODEL/SUITE (default {OUTPUT})")
    add("--compare", nargs=2, type=Path, metavar="RESULT", help="two kept results, or folders of some; no model, no data")
    add("--format", choices=tuple(FORMATS), default="table", help="what is printed (default table)")
    add("--all", action="store_true", help="all metrics in the table, not the headline ones alone")
    add("--list", action="store_true", help="print the suites, and the data that each wants")
    of = parser.add_argument_group("of --scorer diffusion")
    of.add_argument("--teacher", metavar="PATH", help="a diffusers folder, a .safetensors file, hf-hub:ORG/NAME, or world")
    of.add_argument("--steps", type=int, metavar="N", help="draws of timestep and noise an item")
    of.add_argument("--log-snr", type=float, nargs=2, metavar=("LOW", "HIGH"), help="the band that timesteps are drawn from")
    of.add_argument("--weighting", metavar="W", help="of the timesteps' errors (default uniform)")
    of.add_argument("--stop", type=float, metavar="RISK", help="drop candidates early, at this risk of another choice")
    of.add_argument("--correction", metavar="C", help="unconditional: minus the error without a caption")
    return parser.parse_args(argv)


def check(asked: argparse.Namespace) -> None:
    """Raise ConfigError for options that do not go together."""
    for name, least in (("batch", 1), ("workers", 1)):
        if (value := getattr(asked, name)) is not None and value < least:
            raise ConfigError(f"--{name} {value}: expected at least {least}")
    diffusion = asked.scorer == "diffusion"
    if asked.scorer not in ("clip", "diffusion") and ":" not in asked.scorer:
        raise ConfigError(f"--scorer {asked.scorer}: expected clip, diffusion, or MODULE:NAME")
    for name in OF_DIFFUSION:
        if not diffusion and getattr(asked, name) is not None:
            raise ConfigError(f"--{name.replace('_', '-')}: of --scorer diffusion alone")
    if asked.task is not None:
        return task_command.check(asked)
    if asked.split:
        raise ConfigError("--split: of --task alone")
    if diffusion and asked.teacher is None:
        raise ConfigError("--scorer diffusion: expected --teacher, the diffusion model that scores")
    if diffusion and asked.model is not None:
        raise ConfigError(f"--model {asked.model}: --scorer diffusion scores by --teacher; name a CLIP as --baseline")
    if diffusion and asked.precision == "fp16":
        raise ConfigError("--precision fp16: expected fp32 or bf16 with --scorer diffusion")
    if asked.scorer == "clip" and asked.model is None:
        raise ConfigError(f"--model: expected {named.WANTED}")
    if not asked.suite:
        raise ConfigError(f"--suite: expected one or more of {', '.join(suite_names())} (fastsds eval --list says more)")


def load_suites(asked: argparse.Namespace) -> list[Suite]:
    """The suites of the command line, read. Raises: ConfigError."""
    paths: dict[str, Path | None] = {}
    known: dict[str, dict[str, type]] = {}
    for text in asked.suite:
        name, equals, path = text.partition("=")
        for one in [name] if equals else name.split(","):
            if one in known:
                raise ConfigError(f"--suite {one}: it is named twice")
            known[one] = options_of(one)
            paths[one] = Path(path).expanduser() if equals else None if one in MADE else _lies(one, asked.data)
    options: dict[str, dict] = {name: {} for name in known}
    for text in asked.option:
        key, equals, value = text.partition("=")
        of, _, key = key.rpartition(".")
        having = [name for name in known if of in ("", name) and key in known[name]]
        if not equals or not having:
            there = "; ".join(f"{name}: {', '.join(of)}" for name, of in known.items())
            raise ConfigError(f"--option {text}: expected NAME=VALUE or SUITE.NAME=VALUE of an option that is there ({there})")
        for name in having:
            try:
                options[name][key] = int(value) if known[name][key] is int else value
            except ValueError as error:
                raise ConfigError(f"--option {text}: expected a whole number") from error
    return [load_suite(name, path, **options[name]) for name, path in paths.items()]


def _lies(name: str, data: Path | None) -> Path | None:
    return data / name if data is not None and (data / name).exists() else data


def evaluated(asked: argparse.Namespace) -> list[Shown]:
    """Evaluate what was asked for, one model after the other. Every rank calls it."""
    from fastsds.engine import device

    if asked.task is not None:
        return task_command.evaluated(asked, device())
    suites, place = load_suites(asked), device()
    models = [asked.model, *([asked.baseline] if asked.baseline is not None else [])]
    found: list[list[Result]] = []
    for model in models:
        scorer = named.scorer(asked, model, place)
        found.append([])
        for suite in suites:
            folder = asked.output / named.folder(str(scorer.name)) / suite.name
            if hasattr(scorer, "forecast") and _first() and not (folder / RESULT).is_file():
                print(scorer.forecast(suite), file=sys.stderr, flush=True)
            found[-1].append(evaluate(suite, scorer, folder))
    return [Shown(*results, *[None] * (2 - len(models)), suite) for *results, suite in zip(*found, suites, strict=True)]


def kept(a: Path, b: Path) -> list[Shown]:
    """Results that were kept, of the suites that both folders have. Raises: ConfigError if there is none."""
    of_a, of_b = ({result.suite: result for result in map(load_result, _results(folder))} for folder in (a, b))
    both = [suite for suite in of_a if suite in of_b]
    if not both:
        raise ConfigError(f"--compare: {a} has {', '.join(of_a)}, and {b} has {', '.join(of_b)}: no suite in both")
    return [Shown(of_a[suite], of_b[suite]) for suite in both]


def _results(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise ConfigError(f"--compare: {folder} is not a folder")
    inside = [] if (folder / RESULT).is_file() else sorted(file.parent for file in folder.glob(f"*/{RESULT}"))
    return inside or [folder]


def listed() -> str:
    """The suites, with what each one's module says of its data."""
    lines, of = [], {}
    for name in suite_names():
        of.setdefault(inspect.getmodule(LOADERS[name]), []).append(name)
    for module, names in of.items():
        title, _, rest = module.__doc__.partition("\n\n")
        layout = next((part for part in rest.split("\n\n") if part.startswith("    ")), "") if names[0] not in MADE else ""
        options = ", ".join(dict.fromkeys(option for name in names for option in options_of(name)))
        lines += [", ".join(names), f"  {' '.join(title.split())}", *layout.splitlines(), f"    options: {options}", ""]
    return "\n".join([*lines, "docs/evaluation.md says where the data come from."])


def _first() -> bool:
    return os.environ.get("RANK", "0") == "0"


def main(argv: list[str]) -> int:
    asked = parse(argv)
    if asked.list:
        print(listed())
        return 0
    if (asked.compare or asked.task is not None) and asked.format == "clip_benchmark":
        raise ConfigError("--format clip_benchmark: its shape takes the suite's data; expected --suite, or table or json")
    if not asked.compare:
        check(asked)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        torch.distributed.init_process_group("gloo")
    try:
        shown = kept(*asked.compare) if asked.compare else evaluated(asked)
    except KeyboardInterrupt:
        print("\nstopped; what is scored is kept, and the same command goes on", file=sys.stderr)
        return 130
    if not _first():
        return 0
    every = asked.all or asked.format == "json"
    pairs = [([one.result], [one.baseline]) for one in shown if one.baseline is not None]
    for d in compare(pairs, every):
        next(one for one in shown if one.result.suite == d.suite).differences[d.metric] = d
    print(FORMATS[asked.format](shown, asked.all))
    return 0
