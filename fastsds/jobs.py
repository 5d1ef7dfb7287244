"""Run commands a few at a time, show one progress line for all, and keep what they gave.

A job owns a folder. It is finished when its done.json is there; a finished job with the same key is not run again, an
unfinished one goes on if it says how, or starts anew. When Ctrl-C comes, or a job fails and `keep_going` is off, all that runs
is stopped before anything else.
"""

import fcntl
import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from fastsds.config import ConfigError
from fastsds.progress import Line, clock

ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
PLACES = (ONE_THREAD, ONE_THREAD)  # what the environment of each command that runs at a time adds
GRACE = 20.0  # seconds a child has to stop by itself
TAIL = 30  # lines of a failed child's log


class Failed(Exception):
    """A job ended with an error; `code` is the exit code to hand on."""

    def __init__(self, text: str, code: int):
        super().__init__(text)
        self.code = code


@dataclass(eq=False)
class Job:
    """command() -> argv, asked once all of `needs` are done (None: nothing to run); then measure() -> results.

    key: what the results depend on besides the command and the needs; done.json of another key is never used. files() -> name
    and text of what is written before the command starts. go_on() -> what to add to the command of one that was cut off (None:
    it starts anew, in an empty folder).
    """

    name: str
    folder: Path
    command: Callable[[], list[str] | None]
    measure: Callable[[], dict] = dict
    needs: list["Job"] = field(default_factory=list)
    key: dict = field(default_factory=dict)
    files: Callable[[], dict[str, str]] = dict
    go_on: Callable[[], list[str] | None] = lambda: None
    results: dict | None = None
    reused: bool = False
    # while it runs
    place: int | None = None
    process: subprocess.Popen | None = None
    measuring: Future | None = None
    began: float = 0.0
    spent: float = 0.0  # seconds of the command

    @cached_property
    def argv(self) -> list[str] | None:
        return self.command()

    @property
    def log(self) -> Path:
        return self.folder / "log.txt"

    def fingerprint(self) -> dict:
        needs = [hashlib.sha256(json.dumps(need.fingerprint()).encode()).hexdigest()[:16] for need in self.needs]
        return json.loads(json.dumps({"command": (self.argv or [])[1:], **self.key, "needs": needs}))

    def finished(self) -> bool:
        """Whether its results are there; then they are read. Raises: ConfigError if they are of another key."""
        path = self.folder / "done.json"
        if not path.is_file():
            return False
        saved = json.loads(path.read_text(encoding="utf-8"))
        if saved.pop("key", None) != self.fingerprint():
            raise ConfigError(f"{path} is of other settings or weights; name another --output, or delete {self.folder}")
        self.results, self.reused = saved, True
        return True

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


@contextmanager
def claim(folder: Path, by: str, fresh: bool = False) -> Iterator[int]:
    """Have a folder to oneself, and to what one starts: the lock is held until the last of them has ended, killed or not.

    Args: by: the command, which the folder remembers. fresh: it deletes what is there, so that has to be its own.
    Returns: what `run` hands on. Raises: ConfigError if another has it, or it cannot be written, or is another command's.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / ".lock", "a+")  # noqa: SIM115
    except OSError as error:
        raise ConfigError(f"{error.filename}: {error.strerror}; expected a folder that can be written, by --output") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"{folder} is in use: another command works there, or what an earlier one started still runs; wait for it"
            ) from None
        lock.seek(0)
        if fresh and (other := lock.read()) not in ("", by):
            raise ConfigError(f"{folder} has the runs of `{other}`, and this command begins anew; name another --output")
        lock.truncate(0)
        lock.write(by)
        lock.flush()
        yield lock.fileno()


def run(
    jobs: list[Job], places: Sequence[dict[str, str]] = PLACES, fresh: bool = False, keep_going: bool = False,
    lock: int | None = None,
) -> None:  # fmt: skip
    """Run all jobs, a command in each place at a time, in order as far as their needs allow.

    Args: places: what to add to the environment of the command that runs there. fresh: finished ones again. keep_going: a job
        that fails ends only those that need it. lock: of `claim`.
    Raises: Failed with the tail of each failed job's log. KeyboardInterrupt once everything is stopped.
    """
    waiting, running, line, worker = list(jobs), [], Line(), ThreadPoolExecutor(1)
    began, failed = time.monotonic(), {}
    before = {s: signal.signal(s, _interrupt) for s in (signal.SIGTERM, signal.SIGHUP)}
    try:
        while waiting or running:
            for job in list(waiting):
                if any(need in failed for need in job.needs):
                    waiting.remove(job)
                    failed[job] = None
                    line.note(f"{job.name}: left out, what it needs failed")
                    continue
                if any(need.results is None for need in job.needs):
                    continue
                free = [k for k in range(len(places)) if k not in [other.place for other in running]]
                if not fresh and job.finished():
                    waiting.remove(job)
                    line.note(f"{job.name}: finished before, taken from {job.folder}")
                    continue
                if job.argv is None or free:
                    waiting.remove(job)
                    running.append(job)
                    job.place = None if job.argv is None else free[0]
                    if not fresh and _is_other(job):
                        line.note(f"{job.name}: what was cut off is of other settings or weights, and is begun anew")
                    _start(job, {} if job.place is None else places[job.place], () if lock is None else (lock,), fresh)
            for job in list(running):
                try:
                    _advance(job, worker)
                except Failed as error:
                    if not keep_going:
                        raise
                    failed[job] = error
                    line.note(f"{job.name}: FAILED, see {job.log}; the others go on")
                if job.results is not None or job in failed:
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
    if errors := [error for error in failed.values() if error is not None]:
        raise Failed("\n\n".join(map(str, errors)), max(error.code for error in errors))


def _advance(job: Job, worker: ThreadPoolExecutor) -> None:
    """Take a running job as far as it is. Raises: Failed."""
    if job.process is not None and job.process.poll() is not None:
        code, job.process, job.place, job.spent = job.process.returncode, None, None, time.monotonic() - job.began
        if code:
            raise Failed(f"{job.name} ended with exit code {code}. The end of {job.log}:\n{tail(job.log, TAIL)}", code)
    if job.process is None and job.measuring is None:
        job.measuring = worker.submit(_timed, job.measure)
    if job.measuring is not None and job.measuring.done():
        try:
            job.results = _finish(job)
        except ConfigError as error:
            raise Failed(f"{job.name}: {error}", 2) from error
        except Exception as error:  # a bug, or a disk that is full: the log has the whole of it
            with open(job.log, "a", encoding="utf-8") as log:
                traceback.print_exception(error, file=log)
            said = f"{job.name}: {type(error).__name__}: {error}. The end of {job.log}:"
            raise Failed(f"{said}\n{tail(job.log, TAIL)}", 1) from error


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


def _start(job: Job, env: dict[str, str], kept_open: tuple[int, ...], fresh: bool) -> None:
    words, kept = [], job.folder / "job.json"
    if job.folder.exists():
        if any(job.folder.iterdir()) and not kept.is_file():
            raise ConfigError(f"{job.folder} holds files that this command did not write; name another --output")
        more = job.go_on() if kept.is_file() and not fresh and not _is_other(job) else None
        if more is None:
            _empty(job.folder, kept)
        else:
            words = more
    job.folder.mkdir(parents=True, exist_ok=True)
    kept.write_text(json.dumps(_about(job), indent=1) + "\n", encoding="utf-8")
    for name, text in job.files().items():
        (job.folder / name).write_text(text, encoding="utf-8")
    job.began = time.monotonic()
    if job.argv is None:
        return
    alone = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    env = {**alone, "MASTER_PORT": str(free_port()), "PYTHONUNBUFFERED": "1", **env}
    with open(job.log, "ab") as log:
        job.process = subprocess.Popen(
            [*job.argv, *words], stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=env, start_new_session=True,
            pass_fds=kept_open,
        )  # fmt: skip


def _about(job: Job) -> dict:
    return {"name": job.name, "command": job.argv, "key": job.fingerprint()}


def _is_other(job: Job) -> bool:
    """Whether what lies in a job's folder was started with other settings."""
    kept = job.folder / "job.json"
    return kept.is_file() and _object(kept) != _about(job)


def _empty(folder: Path, last: Path) -> None:
    """Delete what is in a folder. last: goes last, so that what a Ctrl-C leaves is known for one's own."""
    for path in [*(path for path in folder.iterdir() if path != last), last]:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _object(path: Path) -> dict | None:
    """What a JSON file says; None where a full disk or a kill cut it."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return None


def _timed(measure: Callable[[], dict]) -> tuple[dict, float]:
    began = time.monotonic()
    return measure(), time.monotonic() - began


def _finish(job: Job) -> dict:
    """Keep what a job gave, and the seconds of its command and its measuring, without its wait for others'."""
    measured, seconds = job.measuring.result()
    results = {"seconds_in_all": round(job.spent + seconds, 1), **measured}
    partial = job.folder / "done.json.partial"
    partial.write_text(json.dumps({"key": job.fingerprint(), **results}, indent=1) + "\n", encoding="utf-8")
    partial.replace(job.folder / "done.json")
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
