"""A page from a benchmark run: `pytest benchmarks/ --benchmark-json=run.json; python benchmarks/report.py run.json > page.md`.

One row a case, the providers side by side: milliseconds (the device's own on CUDA, else wall), percent of a copy of the same
bytes in the same session, peak memory minus start, kernels launched. The last line is the ops' share of an SDS step.
"""

import json
import sys
from collections import defaultdict


def text(value):
    """A parameter as a reader writes it; pytest-benchmark wraps what JSON does not know."""
    if isinstance(value, (list, tuple)):
        return "x".join(map(str, value))
    return str(value).removeprefix("UNSERIALIZABLE[").removesuffix("]").removeprefix("torch.")


def milliseconds(run):
    extra = run["extra_info"]
    return extra["device_ms"]["median"] if "device_ms" in extra else run["stats"]["median"] * 1e3


def cell(run):
    extra = run["extra_info"]
    parts = [f"{milliseconds(run):.3g} ms"]
    if extra.get("bytes"):
        parts.append(f"{extra['percent_of_copy']:.2g} %")
    if "peak_memory" in extra:
        parts.append(f"{extra['peak_memory'] / 2**20:.0f} MiB")
    if "launches" in extra:
        parts.append(f"{extra['launches']} launches")
    return ", ".join(parts)


def page(data):
    machine, commit = data["machine_info"], data.get("commit_info", {})
    device = machine.get("gpu") or f"CPU, {machine['threads']} thread(s)"
    dirty = ", with changes" if commit.get("dirty") else ""
    versions = f"torch {machine['torch']}, triton {machine['triton']}"
    lines = [f"{device}; {versions}; commit {commit.get('id', 'unknown')[:12]}{dirty}.", ""]
    if not machine.get("gpu"):
        lines += ["On the CPU the ops run their twins in plain torch: nothing here says anything of the kernels.", ""]
    cases, providers = defaultdict(dict), {}
    for run in data["benchmarks"]:
        rest = dict(run["params"] or {})
        provider = rest.pop("provider", "ours")
        values = map(text, rest.values())
        cases[run["name"].split("[")[0].removeprefix("test_"), " ".join(values)][provider] = run
        providers[provider] = None
    lines += ["| op | case | " + " | ".join(providers) + " |", "|---" * (2 + len(providers)) + "|"]
    for (op, case), runs in cases.items():
        lines.append(f"| {op} | {case} | " + " | ".join(cell(runs[p]) if p in runs else "" for p in providers) + " |")
    share = cases.get(("share_of_a_step", ""))
    if share and {"unet_forward", "ours"} <= set(share):
        ours, network = (milliseconds(share[name]) for name in ("ours", "unet_forward"))
        lines += ["", f"Noise and loss are {100 * ours / (ours + network):.2g} % of a step of UNet forward, noise and loss."]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    with open(sys.argv[1], encoding="utf-8") as file:
        sys.stdout.write(page(json.load(file)))
