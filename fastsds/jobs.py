"""Run commands a few at a time, show one progress line for all, and keep what they gave.

A job owns a folder. It is finished when its results.json is there; a finished job with the same key is not run again,
an unfinished one starts anew. If a job fails, or Ctrl-C comes, all that runs is stopped before anything else.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from fastsds.config import ConfigError
from fastsds.progress import Line, clock

SLOTS = 2
GRACE = 20.0  # seconds a child has to stop by itself
TAIL = 30  # lines of a failed child's log


class Failed(Exception):
    """A job ended with an error; `code` is the exit code to hand on."""

    def __init__(self, text: str, code: int):
        super().__init__(text)
        self.code = code


@dataclass
class Job:
    """command() -> argv, asked once all of `needs` are done (None: nothing to run); then measure() -> results.

    key: what the results depend on besides the command; results.json of another key is never used.
    """

    name: str
    folder: Path
    command: Callable[[], list[str] | None]
    measure: Callable[[], dict] = dict
    needs: list["Job"] = field(default_factory=list)
    key: dict = field(default_factory=dict)
    results: dict | None = None
    reused: bool = False
    # while it runs
    argv: list[str] | None = None
    process: subprocess.Popen | None = None
    measuring: Future | None = None
    began: float = 0.0

    @property
    def log(self) -> Path:
        return self.folder / "log.txt"

    def fingerprint(self) -> dict:
        return json.loads(json.dumps({"command": (self.argv or [])[1:], **self.key}))

    def status(self) -> str:
        """What the progress line says of it: a trainer's last row, or the last line of the log."""
        if self.measuring is not None:
            return f"{self.name}: evaluating"
        rows = last_rows(self.folder / "run" / "metrics.jsonl", "train")
        if not rows:
            line = tail(self.log, 1)
            return f"{self.name}: {line[:60].strip() if 'step' in line or 'left' in line else 'starting'}"
        row, first = rows[-1], rows[0] if len(rows) > 1 else {"step": 0, "seconds": 0.0}
        total = [int(a.removeprefix("steps=")) for a in self.argv if a.startswith("steps=")][-1:]
        left = [(n - row["step"]) * (row["seconds"] - first["seconds"]) / (row["step"] - first["step"]) for n in total]
        of = f"/{total[0]}" if total else ""
        return f"{self.name}: step {row['step']}{of}, loss {row['loss']:.3f}" + "".join(f", left {clock(x)}" for x in left)


def run(jobs: list[Job], slots: int = SLOTS, fresh: bool = False) -> None:
    """Run all jobs, `slots` commands at a time, in order as far as their needs allow. fresh: finished ones again.

    Raises: Failed with the tail of the failed job's log. KeyboardInterrupt once everything is stopped.
    """
    waiting, running, line, worker = list(jobs), [], Line(), ThreadPoolExecutor(1)
    began = time.monotonic()
    before = {s: signal.signal(s, _interrupt) for s in (signal.SIGTERM, signal.SIGHUP)}
    try:
        while waiting or running:
            for job in list(waiting):
                busy = sum(other.process is not None for other in running)
                if any(need.results is None for need in job.needs):
                    continue
                job.argv = job.command() if job.argv is None else job.argv
                if _take_finished(job, fresh):
                    waiting.remove(job)
                    line.note(f"{job.name}: finished before, taken from {job.folder}")
                elif busy < slots:
                    waiting.remove(job)
                    running.append(job)
                    _start(job)
            for job in list(running):
                if job.process is not None and job.process.poll() is not None:
                    code, job.process = job.process.returncode, None
                    if code:
                        raise Failed(
                            f"{job.name} ended with exit code {code}. The end of {job.log}:\n{tail(job.log, TAIL)}", code
                        )
                if job.process is None and job.measuring is None:
                    job.measuring = worker.submit(job.measure)
                if job.measuring is not None and job.measuring.done():
                    job.results = _finish(job)
                    running.remove(job)
            line.say(_progress(jobs, running, time.monotonic() - began))
            time.sleep(0.1)
        line.end()
    finally:
        line.end()
        stop([job for job in running if job.process is not None])
        worker.shutdown(wait=True, cancel_futures=True)
        for number, handler in before.items():
            signal.signal(number, handler)


def stop(jobs: list[Job]) -> None:
    """Ask every child to stop, wait, and end those that do not."""
    for job in jobs:
        _signal(job, signal.SIGTERM)
    deadline = time.monotonic() + GRACE
    for job in jobs:
        try:
            job.process.wait(max(0.1, deadline - time.monotonic()))
        except (subprocess.TimeoutExpired, KeyboardInterrupt):  # a second Ctrl-C: at once
            deadline = 0.0
            _signal(job, signal.SIGKILL)
            job.process.wait()


def _signal(job: Job, number: int) -> None:
    try:
        os.killpg(job.process.pid, number)
    except ProcessLookupError:
        pass


def _interrupt(number, frame):
    raise KeyboardInterrupt


def _take_finished(job: Job, fresh: bool) -> bool:
    path = job.folder / "results.json"
    if fresh or not path.is_file():
        return False
    saved = json.loads(path.read_text(encoding="utf-8"))
    if saved.pop("key", None) != job.fingerprint():
        raise ConfigError(f"{path} is of other settings or weights; name another --output, or delete {job.folder}")
    job.results, job.reused = saved, True
    return True


def _start(job: Job) -> None:
    if job.folder.exists():
        if any(job.folder.iterdir()) and not (job.folder / "job.json").is_file():
            raise ConfigError(f"{job.folder} holds files that this command did not write; name another --output")
        shutil.rmtree(job.folder)
    job.folder.mkdir(parents=True)
    (job.folder / "job.json").write_text(json.dumps({"name": job.name, "command": job.argv}, indent=1) + "\n")
    job.began = time.monotonic()
    if job.argv is None:
        return
    one = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "MASTER_PORT": str(free_port()), "PYTHONUNBUFFERED": "1"}
    alone = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    with open(job.log, "wb") as log:
        job.process = subprocess.Popen(
            job.argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=alone | one, start_new_session=True
        )


def _finish(job: Job) -> dict:
    results = {"seconds_in_all": round(time.monotonic() - job.began, 1), **job.measuring.result()}
    partial = job.folder / "results.json.partial"
    partial.write_text(json.dumps({"key": job.fingerprint(), **results}, indent=1) + "\n", encoding="utf-8")
    partial.replace(job.folder / "results.json")
    return results


def _progress(jobs: list[Job], running: list[Job], seconds: float) -> str:
    done = sum(job.results is not None for job in jobs)
    return " | ".join([f"[{clock(seconds)}] {done}/{len(jobs)} done", *(job.status() for job in running)])


def last_rows(path: Path, split: str) -> list[dict]:
    """The complete rows of a split in the last 64 KiB of a metrics file."""
    try:
        with open(path, "rb") as file:
            file.seek(max(0, os.path.getsize(path) - 65536))
            lines = file.read().split(b"\n")[:-1]
    except OSError:
        return []
    rows = []
    for text in lines:
        try:
            rows.append(json.loads(text))
        except ValueError:  # the first one may be cut
            continue
    return [row for row in rows if row.get("split") == split]


def tail(path: Path, lines: int) -> str:
    try:
        text = Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    return "\n".join(text.replace("\r", "\n").rstrip().split("\n")[-lines:])


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]
