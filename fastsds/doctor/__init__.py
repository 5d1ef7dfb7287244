"""`fastsds doctor`: what of this machine works, and a line to run for each thing that does not.

A check is a function that yields `Finding`s; what it says works has been run, not looked up. ok: works; -: does not apply here;
warn: a run may suffer; wrong: a run will fail. The exit code is 1 if something is wrong.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterator

from fastsds.doctor.compute import attention, bitsandbytes, compiler, deepspeed, gpu, triton
from fastsds.doctor.finding import WARN, WRONG, Finding, first_line, pip
from fastsds.doctor.places import disks, shared_memory
from fastsds.doctor.versions import kernels_folder, packages, python
from fastsds.progress import Line, clock

CHECKS: tuple[Callable[[], Iterator[Finding]], ...] = (
    python, packages, kernels_folder, gpu, attention, triton, bitsandbytes, deepspeed, compiler, disks, shared_memory,
)  # fmt: skip


def examine(checks=CHECKS, say=lambda line: None) -> Iterator[Finding]:
    """Run checks; one that cannot even begin is wrong itself."""
    for check in checks:
        say(check.__name__.replace("_", " "))
        try:
            yield from check()
        except Exception as error:  # a package that does not import
            missing = getattr(error, "name", None) if isinstance(error, ImportError) else None
            line = pip(missing.partition(".")[0], "--force-reinstall") if missing else "FASTSDS_VERBOSE=1 fastsds doctor"
            yield Finding(check.__name__.replace("_", " "), WRONG, first_line(error), line)


def report(findings: list[Finding]) -> str:
    """One aligned line a finding, and the line to run under each that needs one."""
    width = max(len("run:"), *(len(f.name) for f in findings)) + 2
    lines = []
    for found in findings:
        lines.append(f"{found.state:<6}{found.name:<{width}}{found.found}")
        if found.run:
            lines.append(f"{'':<6}{'run:':<{width}}{found.run}")
    count = {state: sum(f.state == state for f in findings) for state in (WRONG, WARN)}
    verdict = "everything works" if not any(count.values()) else f"{count[WRONG]} wrong, {count[WARN]} to know of"
    return "\n".join([*lines, "", verdict])


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="fastsds doctor", description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.parse_args(argv)
    line, began = Line(sys.stderr), time.monotonic()
    findings = list(examine(say=lambda what: line.say(f"doctor: {what} ({clock(time.monotonic() - began)})")))
    line.end()
    print(report(findings))
    return 1 if any(f.state == WRONG for f in findings) else 0
