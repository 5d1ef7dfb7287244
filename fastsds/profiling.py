"""`train --profile N`: where the time of a step goes, as a trace that chrome://tracing and Perfetto open."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

WARMUP = 3  # steps before the first recorded one: compilation, caches, the profiler itself


def count(text: str) -> int:
    """A number of steps, from the command line."""
    if (steps := int(text)) < 0:
        raise ValueError
    return steps


@contextmanager
def trace(output: Path, steps: int, first: int, last: int, rank: int = 0) -> Iterator[Callable[[], None]]:
    """Record `steps` optimizer steps of a run on rank 0, after a warm-up, into OUTPUT/profile/steps_A_B.json.

    Args: first, last: the run goes from step `first` to `last`; the warm-up gives way where that is short. A run that stops
        earlier leaves what was recorded by then.
    Yields: a function to call after each optimizer step.
    """
    if not steps or rank or last <= first:
        yield lambda: None
        return
    from torch.profiler import ProfilerActivity, profile, schedule, supported_activities

    steps = min(steps, last - first)
    warm = min(WARMUP, last - first - steps)
    done = first

    def write(profiler) -> None:
        folder = Path(output) / "profile"
        folder.mkdir(parents=True, exist_ok=True)
        partial = folder / "partial.json"
        profiler.export_chrome_trace(str(partial))
        partial.replace(folder / f"steps_{first + warm + 1}_{done}.json")

    def mark() -> None:
        nonlocal done
        done += 1
        profiler.step()

    when = schedule(skip_first=max(0, warm - 1), wait=0, warmup=min(1, warm), active=steps, repeat=1)
    wanted = {ProfilerActivity.CPU, ProfilerActivity.CUDA} & supported_activities()
    with profile(activities=wanted, schedule=when, on_trace_ready=write, acc_events=True) as profiler:
        yield mark
