"""One line that says how far a long job is."""

import os
import shutil
import sys
import time
from collections.abc import Iterable, Iterator

EVERY = 5.0  # seconds between lines where the output is no terminal


class Line:
    """One line that is rewritten on a terminal, and repeated every few seconds elsewhere."""

    def __init__(self, stream=None):
        self.stream = stream or sys.stdout
        self.tty, self.said, self.width = self.stream.isatty(), -EVERY, 0

    def say(self, text: str) -> None:
        now = time.monotonic()
        if now - self.said < (0.3 if self.tty else EVERY):
            return
        self.said = now
        if not self.tty:
            print(text, file=self.stream, flush=True)
            return
        text = text[: max(20, shutil.get_terminal_size().columns - 1)]
        print("\r" + text.ljust(self.width), end="", file=self.stream, flush=True)
        self.width = len(text)

    def note(self, text: str) -> None:
        self.end()
        print(text, file=self.stream, flush=True)

    def end(self) -> None:
        if self.width:
            print("\r" + " " * self.width + "\r", end="", file=self.stream, flush=True)
            self.width = 0


def watched(items: Iterable, text: str) -> Iterator:
    """The items one after another; where that takes longer than a few seconds, rank 0 says how many it has had."""
    began, line, first = time.monotonic(), Line(sys.stderr), os.environ.get("RANK", "0") == "0"
    of = f" of {len(items):,}" if hasattr(items, "__len__") else ""
    for k, item in enumerate(items):
        if first and time.monotonic() - began > EVERY:
            left = (len(items) - k) * (time.monotonic() - began) / k if of and k else None
            line.say(f"{text}: {k:,}{of}" + ("" if left is None else f", left {clock(left)}"))
        yield item
    line.end()


def clock(seconds: float) -> str:
    minutes, seconds = divmod(int(max(seconds, 0)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
