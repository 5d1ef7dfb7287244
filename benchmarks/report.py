"""Keep benchmark runs, and make pages and the README's tables from what is kept.

    pytest benchmarks/ --benchmark-json=run.json
    python benchmarks/report.py keep run.json NAME     results/NAME.json: the run without machine names and single timings
    python benchmarks/report.py                        results/NAME.md of each, and the README's tables between their marks
    python benchmarks/report.py check                  exit code 1 if any of them says something else

A page: one row a case, providers side by side: milliseconds (the device's own on CUDA, else wall), percent of a copy of the
same bytes in the same session, peak memory minus start, kernels launched. Where providers took turns, a table a case: times
beside the first provider's and beside the floor, the FLOP at the matrix product's speed of that session.
"""

import json
import re
import sys
from collections import defaultdict
from pathlib import Path

RESULTS = Path(__file__).resolve().parent / "results"
README = RESULTS.parents[1] / "README.md"
MACHINE = ("gpu", "torch", "triton", "threads", "python_version")
BLOCKS = {"activations": "test_activations", "ablation": "test_ablation", "step": "test_step"}  # README's mark -> benchmark
FED = (500, 3000)  # images/s: an `sds` step, and an `amortised` one, on one large GPU
SPLIT = ("student", "teacher forward", "teacher backward", "loss ops", "optimizer", "data", "idle")


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


def table(head, rows):
    """Markdown; columns that no row fills are left out."""
    used = [i for i, name in enumerate(head) if not i or any(row[i] for row in rows)]
    pick = [[row[i] for i in used] for row in (head, *rows)]
    return ["| " + " | ".join(pick[0]) + " |", "|---" * len(used) + "|", *("| " + " | ".join(row) + " |" for row in pick[1:])]


def size(count):
    return "" if count is None else f"{count / 2**30:.2f} GiB" if count >= 2**29 else f"{count / 2**20:.1f} MiB"


def side_by_side(run):
    """The providers of one case."""
    providers = run["extra_info"]["providers"]
    first = providers[0]
    held = next((key for key in ("held", "peak_memory") if any(key in row for row in providers)), None)
    head = ["", "ms", "time of the first", "samples/s", "TFLOP/s", "of the peak", "floor, ms", "held for backward"]
    head[-1] = "peak memory" if held == "peak_memory" else head[-1]
    rows = []
    for row in providers:
        name = row["provider"]
        memory = "" if held not in row else size(row[held])
        if held in row and held in first and row is not first:
            memory += f" (x {row[held] / first[held]:.2f})"
        if "skipped" in row:
            rows.append([name, row["skipped"], *[""] * (len(head) - 3), memory])
            continue
        beside = f"x {row['ms'] / first['ms']:.2f}" if "ms" in row and "ms" in first else ""
        timed = [""] * 6 if "ms" not in row else [
            f"{row['ms']:.3g}", beside, f"{row['samples_per_s']:.3g}", f"{row['tflop_per_s']:.3g}",
            f"{row['percent_of_peak']:.2g} %", f"{row['floor_ms']:.3g}",
        ]  # fmt: skip
        rows.append([name, *timed, memory])
    lines = table(head, rows)
    if any("split" in row for row in providers):
        shares = [
            [row["provider"], *(f"{100 * row['split'].get(part, 0) / sum(row['split'].values()):.0f} %" for part in SPLIT)]
            for row in providers
            if "split" in row
        ]
        lines += ["", *table(["share of a step", *SPLIT], shares)]
    return lines


def feeding(runs):
    """Providers of images: the rate of a core, and the cores that a step needs."""
    rows = []
    for run in runs:
        rate = run["extra_info"]["images"] / run["stats"]["median"]
        core = rate / run["extra_info"]["cores"]
        needed = (f"{wanted / core:.1f}" if wanted > core / 10 else "under 0.1" for wanted in FED)
        rows.append([run["params"]["provider"], f"{rate:,.0f}", f"{core:,.0f}", *needed])
    return table(["", "images/s", "of a core", *(f"cores for {wanted:,} images/s" for wanted in FED)], rows)


def heading(data):
    machine, commit = data["machine_info"], data.get("commit_info", {})
    device = machine.get("gpu") or f"CPU, {machine['threads']} thread(s)"
    dirty = ", with changes" if commit.get("dirty") else ""
    versions = f"torch {machine['torch']}, triton {machine['triton']}"
    return f"{device}; {versions}; commit {commit.get('id', 'unknown')[:12]}{dirty}."


def case_name(run):
    params = {key: value for key, value in (run["params"] or {}).items() if key != "provider"}
    return run["name"].split("[")[0].removeprefix("test_"), " ".join(map(text, params.values()))


def page(data):
    lines = [heading(data), ""]
    if not data["machine_info"].get("gpu"):
        lines += ["On the CPU the ops run their twins in plain torch: nothing here says anything of the kernels.", ""]
    cases, providers = defaultdict(dict), {}
    for run in data["benchmarks"]:
        if "providers" in run["extra_info"] or "images" in run["extra_info"]:
            continue
        provider = (run["params"] or {}).get("provider", "ours")
        cases[case_name(run)][provider] = run
        providers[provider] = None
    if cases:
        rows = [[op, case, *(cell(runs[p]) if p in runs else "" for p in providers)] for (op, case), runs in cases.items()]
        lines += table(["op", "case", *providers], rows)
    share = cases.get(("share_of_a_step", ""))
    if share and {"unet_forward", "ours"} <= set(share):
        ours, network = (milliseconds(share[name]) for name in ("ours", "unet_forward"))
        lines += ["", f"Noise and loss are {100 * ours / (ours + network):.2g} % of a step of UNet forward, noise and loss."]
    for run in data["benchmarks"]:
        if "providers" in run["extra_info"]:
            title = " ".join(case_name(run)).replace("_", " ").strip()
            lines += ["", f"**{title}**: {run['extra_info'].get('of', '')}".rstrip(": "), "", *side_by_side(run)]
    fed = [run for run in data["benchmarks"] if "images" in run["extra_info"]]
    if fed:
        lines += ["**images from disk** to uint8 pixels", "", *feeding(fed)]
    return "\n".join(lines) + "\n"


def keep(path, name):
    """Write results/NAME.json: what the pages need of a run."""
    data = json.loads(Path(path).read_text(encoding="utf-8"))
    kept = {
        "machine_info": {key: data["machine_info"].get(key) for key in MACHINE},
        "commit_info": {key: data.get("commit_info", {}).get(key) for key in ("id", "dirty")},
        "benchmarks": [
            {
                "name": run["name"], "params": run["params"], "extra_info": run["extra_info"],
                "stats": {key: run["stats"][key] for key in ("median", "iqr", "rounds")},
            }
            for run in data["benchmarks"]
        ],
    }  # fmt: skip
    (RESULTS / f"{name}.json").write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")


def blocks(runs):
    """The README's tables: of each benchmark in BLOCKS the run on a GPU, where there is one."""
    found = {}
    for data in sorted(runs, key=lambda data: bool(data["machine_info"].get("gpu"))):
        for run in data["benchmarks"]:
            found[run["name"].split("[")[0]] = (data, run)
    for mark, name in BLOCKS.items():
        if name in found:
            data, run = found[name]
            yield mark, "\n".join([f"{run['extra_info'].get('of', '')} {heading(data)}".strip(), "", *side_by_side(run)])


def generated(readme):
    """Path -> the text that belongs there."""
    runs = {path: json.loads(path.read_text(encoding="utf-8")) for path in sorted(RESULTS.glob("*.json"))}
    files = {path.with_suffix(".md"): page(data) for path, data in runs.items()}
    whole = readme.read_text(encoding="utf-8")
    measured = dict(blocks(runs.values()))
    for mark in BLOCKS:
        pattern = re.compile(rf"(<!-- {mark} -->\n).*?(<!-- /{mark} -->)", re.DOTALL)
        if mark in measured and not pattern.search(whole):
            raise SystemExit(f"error: {readme} has no block <!-- {mark} -->")
        block = f"{measured[mark]}\n" if mark in measured else ""  # nothing was measured, so nothing is said
        whole = pattern.sub(lambda found, block=block: f"{found[1]}{block}{found[2]}", whole)
    return {**files, readme: whole}


def main(argv):
    if argv[:1] == ["keep"] and len(argv) == 3:
        keep(*argv[1:])
    elif argv not in ([], ["check"]):
        raise SystemExit(__doc__)
    said = generated(README)
    if stray := [page.name for page in sorted(RESULTS.glob("*.md")) if page not in said]:
        raise SystemExit(f"error: {RESULTS}: no run behind {', '.join(stray)}: keep its run, or delete it")
    differs = [path for path in said if not path.is_file() or path.read_text(encoding="utf-8") != said[path]]
    for path in differs:
        print(f"{'differs from its results: ' if argv == ['check'] else 'written: '}{path.relative_to(README.parent)}")
        if argv != ["check"]:
            path.write_text(said[path], encoding="utf-8")
    return int(argv == ["check"] and bool(differs))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
