"""The model card of an exported student: where it comes from and what was measured, from the run's own files."""

import json
from pathlib import Path

import yaml

from fastsds.evaluation.statistics import paired_bootstrap
from fastsds.export.origin import Origin
from fastsds.history import Run, Score
from fastsds.provenance import commit, versions
from fastsds.student import HEAD_FILE
from fastsds.tables import as_markdown

PAPER = "https://arxiv.org/abs/2307.09233"
CLAIMS = (
    f"The method is SDS-CLIP ([arXiv 2307.09233]({PAPER})). What that paper claims (Winoground, ARO) is not reproduced on real "
    "data by this project; this page says what this run measured, and nothing else."
)
LOAD = {
    "open_clip": (
        "import open_clip\n"
        'model, preprocess = open_clip.create_model_from_pretrained("local-dir:{folder}")   # then model.eval()\n'
        'tokenizer = open_clip.get_tokenizer("local-dir:{folder}")'
    ),
    "hf": (
        "from transformers import {kind}, AutoProcessor\n"
        'model = {kind}.from_pretrained("{folder}").eval()\n'
        'processor = AutoProcessor.from_pretrained("{folder}")   # captions: padding="max_length", truncation=True'
    ),
}
CLEANING = (
    "open_clip repairs captions (ftfy, HTML entities) before its tokenizer reads them, transformers does not: clean those with "
    "curly quotes, entities or damaged text first."
)
HUB = (
    "Before you upload: write the repository's name into `text_cfg.hf_tokenizer_name` of `open_clip_config.json`; by `hf-hub:` "
    "open_clip looks for the tokenizer under that name."
)


def write(folder: Path, name: str, to: str, origin: Origin, checked: float, converted: bool) -> None:
    """Write README.md into an exported folder that is otherwise whole.

    Args: name: of the folder, when it is done. checked: the largest difference after the reload. converted: from the other
        library.
    """
    from huggingface_hub import ModelCard, ModelCardData

    repo, base = base_model(origin.recipe)
    data = ModelCardData(
        library_name={"hf": "transformers"}.get(to, to), pipeline_tag="zero-shot-image-classification", base_model=repo,
        tags=["clip", "sds-clip", "fastsds"],
    )  # fmt: skip
    kind, notes = "", []
    if to == "hf":
        (kind,) = json.loads((folder / "config.json").read_text(encoding="utf-8"))["architectures"]
    elif (folder / "tokenizer_config.json").is_file():
        notes.append(HUB)
    if converted:
        notes.append(CLEANING)
    if (folder / HEAD_FILE).is_file():
        notes.append(f"`{HEAD_FILE}` is h_w, the linear map from image features to the teacher's latents.")
    load = LOAD[to].format(folder=name, kind=kind)
    parts = [
        f"# {name}",
        f"A CLIP trained by fastsds from {base}. {CLAIMS}",
        "No licence is stated: whoever publishes this folder adds one (`license:` above) that its origins allow.",
        f"## Load it\n\n```python\n{load}\n```",
        *notes,
        "Checked when it was made: reloaded from this folder alone, the features of images and captions, their cosines and the "
        f"logit scale are the trained student's to {checked:.1e}.",
        "## Data", _data(origin),
        "## Recipe", _recipe(origin.recipe),
        "## Results", *_results(origin.run),
        "## Made with", _made(origin.state),
    ]  # fmt: skip
    ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(parts) + "\n").save(folder / "README.md")


def base_model(recipe: dict | None) -> tuple[str | None, str]:
    """The hub's name of what training started from, where it has one, and the same in words."""
    if recipe is None:
        return None, "a student of which this folder does not say more"
    model, pretrained = recipe["student"]["model"], recipe["student"].get("pretrained")
    for text in (pretrained, model):
        if text and text.startswith("hf-hub:"):
            return text.removeprefix("hf-hub:"), f"`{text}`"
    if model == "world":
        return None, "the embedded world's student"
    if pretrained is None:
        return None, f"`{_short(model)}`"
    from open_clip.pretrained import get_pretrained_cfg

    repo = "/".join(get_pretrained_cfg(model.replace("/", "-"), pretrained).get("hf_hub", "").split("/")[:2])
    return repo or None, f"`{model}`, `{_short(pretrained)}`"


def _data(origin: Origin) -> str:
    if origin.recipe is None:
        return "Not known."
    data, state = origin.recipe["data"], origin.state or {}
    rows = {"source": _short(data["source"])}
    rows |= {name: state[name] for name in ("samples", "identity") if state.get(name) is not None}
    rows |= {name: _short(data[name]) for name in ("split", "caption", "batch", "accumulation") if data.get(name) is not None}
    return as_markdown(["", "data"], [[name, str(value)] for name, value in rows.items()])


def _recipe(recipe: dict | None) -> str:
    if recipe is None:
        return "Not known."
    here = _short({**recipe, "output": Path(recipe["output"]).name})
    text = yaml.safe_dump(here, sort_keys=False, default_flow_style=None, allow_unicode=True, width=110)
    return f"Folders of the machine that trained are left out.\n\n```yaml\n{text}```"


def _short(value):
    """A value with every absolute path cut to its last name, and every command to the program."""
    if isinstance(value, dict):
        return {key: _short(v) for key, v in value.items()}
    if not isinstance(value, str):
        return value
    kind, colon, rest = value.partition(":")
    if colon and kind == "pipe":
        return f"pipe:{Path(rest.split()[0]).name if rest.split() else ''} ..."
    path = Path(rest if kind == "local-dir" else value)
    return f"{kind}:{path.name}" if kind == "local-dir" else path.name if path.is_absolute() else value


def _results(run: Run | None) -> list[str]:
    if run is None:
        return ["Not known."]
    parts = []
    if run.evaluations:
        last = run.evaluations[-1]
        first = next(row for row in run.evaluations if row["suite"] == last["suite"])  # a resumed run may have another
        start, end = run.scores(first), run.scores(last)
        steps = [f"step {row['step']}" for row in (first, last)]
        header = ["metric", *steps, "95 % interval", "difference", "95 % interval", "n"]
        paired = _differences(run, first, last)
        rows = [
            [key, f"{start[key].value:.1f}" if key in start else "-", f"{score.value:.1f}", _interval(score),
             *paired.get(key, ["-", "-"]), "-" if score.n is None else str(score.n)]
            for key, score in end.items()
        ]  # fmt: skip
        parts += [
            f"Suite `{last['suite']}`, in percent; intervals: bootstrap over the n items, differences on the same items.",
            as_markdown(header, rows),
        ]
    else:
        parts.append("The run made no evaluation (`eval.suite: none`).")
    if run.train:
        last = run.train[-1]
        named = [f"{k} {last[k]:.4g}" for k in ("loss", "clip", "sds", "lambda", "rho", "cosine", "grad_norm") if k in last]
        parts.append(f"Last row of training, step {last['step']}: {', '.join(named)}.")
    return parts


def _interval(score: Score) -> str:
    return "-" if score.low is None else f"[{score.low:.1f}, {score.high:.1f}]"


def _differences(run: Run, first: dict, last: dict) -> dict[str, list[str]]:
    """Last minus first, on the same items, where both kept them."""
    before, after, found = run.result(first), run.result(last), {}
    if first is last or before is None or after is None or before.about["fingerprint"] != after.about["fingerprint"]:
        return {}
    for key in after.measures:
        d = paired_bootstrap(after.values(key), before.values(key))
        found[key] = [f"{d.difference:+.1f}", f"[{d.low:+.1f}, {d.high:+.1f}]"]
    return found


def _made(state: dict | None) -> str:
    rows = [["exported", commit(), _listed(versions())]]
    if state is not None:
        engine = state["engine"]
        how = f"ZeRO {engine['stage']}" if engine["deepspeed"] else "plain torch"
        rows.insert(0, [f"trained to step {state['step']}, {how} on {engine['ranks']} rank(s)",
                        state.get("commit", "unknown"), _listed(state["versions"])])  # fmt: skip
    return as_markdown(["", "commit", "versions"], rows)


def _listed(found: dict[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in found.items())
