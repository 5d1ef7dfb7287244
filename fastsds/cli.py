"""The `fastsds` command. Each subcommand is a module with `main(argv) -> exit code`, imported when it is asked for."""
import importlib
import sys

import fastsds
from fastsds.config import ConfigError

COMMANDS = {
    "bank": ("fastsds.teacher.bank", "build: ask the teacher once about a data set, for training from its targets alone"),
    "check-teacher": ("fastsds.check_teacher", "does the teacher read captions, at which noise: go or no-go before training"),
    "demo": ("fastsds.demo", "train the embedded world with and without the teacher, and compare the two"),
    "doctor": ("fastsds.doctor", "what of this machine works, and a line to run for each thing that does not"),
    "eval": ("fastsds.evaluation.command", "one model, or two, on suites or a task: values with errors, paired differences"),
    "export": ("fastsds.export", "a trained student as an open_clip or transformers folder, checked, with a model card"),
    "plan": ("fastsds.plan.command", "what a recipe needs: bytes of a rank, FLOP, images/s, the bank, the largest batch"),
    "report": ("fastsds.report", "draw runs: curves, residual by noise band, evaluations with intervals"),
    "reproduce": ("fastsds.reproduce.command", "backbones x arms x seeds x suites from one file, ending in a paper's table"),
    "train": ("fastsds.train", "train a recipe; with several ranks use `deepspeed fastsds/train.py`"),
}


def usage() -> str:
    lines = ["usage: fastsds COMMAND [arguments]", "", "commands (fastsds COMMAND --help says more):"]
    width = max(map(len, COMMANDS))
    lines += [f"  {name:<{width}} {text}" for name, (_, text) in COMMANDS.items()]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Run one subcommand; returns the exit code: 0, or 2 for a mistake in what the user gave."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        print(usage())
        return 0 if argv else 2
    if argv[0] == "--version":
        print(f"fastsds {fastsds.__version__}")
        return 0
    if argv[0] not in COMMANDS:
        print(f"error: unknown command {argv[0]!r}; expected one of {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    try:
        return importlib.import_module(COMMANDS[argv[0]][0]).main(argv[1:]) or 0
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def script() -> None:
    """The process that is this command: `main`, and its end."""
    code = main()
    if "torch" in sys.modules:
        importlib.import_module("fastsds.distributed").end(code)
    sys.exit(code)


if __name__ == "__main__":
    script()
