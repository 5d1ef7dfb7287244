"""`fastsds export`: a trained student as a folder that open_clip or transformers loads, checked, with a model card.

    OUT/open_clip_config.json, open_clip_model.safetensors      --to open_clip
    OUT/config.json, model.safetensors, processor files         --to hf
    OUT/README.md, tokenizer files, head.safetensors (--head)

The folder is written under another name, reloaded there by the plain library with the network off, compared, and renamed:
what has its name is right.
"""

import argparse
import contextlib
import json
import shutil
from pathlib import Path

from fastsds import hub, quiet
from fastsds.config import ConfigError
from fastsds.durable import sync
from fastsds.export import card, check, hf
from fastsds.export.origin import Origin, find
from fastsds.student import CONFIG_FILE, HEAD_FILE, WEIGHTS_FILE, load_student, save_student

FORMATS = ("open_clip", "hf")


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="fastsds export", description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("source", metavar="RUN", help="a run's folder, one of its checkpoints, or a student's folder")
    parser.add_argument("--to", required=True, choices=FORMATS, help="open_clip, or hf: transformers (ViT towers)")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="the folder to make; empty, or not there yet")
    parser.add_argument("--head", action="store_true", help="with head.safetensors, the latent head h_w")
    args = parser.parse_args(argv)
    worst = export(find(args.source), args.to, args.out, args.head)
    print(f"{args.out}: reloaded and compared, largest difference {worst:.1e}")
    return 0


def export(origin: Origin, to: str, out: Path, head: bool = False) -> float:
    """Write a student's folder in a format, or nothing.

    Returns: the largest difference between its features and the reloaded ones, at most `check.TOLERANCE`.
    Raises: ConfigError that names the feature the format lacks, or what differs.
    """
    out = Path(out)
    if not out.name or (out.exists() and (not out.is_dir() or any(out.iterdir()))):
        raise ConfigError(f"--out: {out} is there and not empty, or has no name; expected a new folder")
    if origin.recipe and origin.recipe.get("recipe") == "clip_td":
        raise ConfigError(f"{origin.student}: a cross-modal student, which transformers loads as it is; expected a CLIP")
    student = load_student(origin.student)
    if head and student.head is None:
        raise ConfigError(f"--head: {origin.student} has no {HEAD_FILE}")
    source = "open_clip" if (origin.student / CONFIG_FILE).is_file() else "hf"
    partial = out.with_name(f".partial_{out.name}")
    made = [folder for folder in out.parents if not folder.exists()]  # from the innermost
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        ours, size = check.of_student(student), student.image_size
        with quiet.loading():
            WRITERS[source, to](origin.student, student, partial)
            if head:
                shutil.copyfile(origin.student / HEAD_FILE, partial / HEAD_FILE)
            del student  # one model at a time
            theirs = _reloaded(partial, to, size, out)
        worst = check.compare(ours, theirs, f"{out} ({to})")
        card.write(partial, out.resolve().name, to, origin, worst, converted=source != to)
        mode = (partial / "README.md").stat().st_mode  # safetensors' own is for the owner alone
        for path in partial.iterdir():
            path.chmod(mode)
        for path in [*partial.rglob("*"), partial]:
            sync(path)
        partial.replace(out)
    except OSError as error:
        raise ConfigError(f"--out: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        with contextlib.suppress(OSError):  # done, or something else lies in it
            for folder in made:
                folder.rmdir()
    return worst


def _reloaded(folder: Path, to: str, size: int, out: Path) -> check.Answer:
    try:
        return (check.of_open_clip if to == "open_clip" else check.of_transformers)(folder, size)
    except Exception as error:  # of whatever kind a library has
        why = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConfigError(f"{out} ({to}): written, it does not load: {why}") from error


def _same(source: Path, student, out: Path) -> None:
    """In the library it is from: the CLIP without the head."""
    state = {name: tensor for name, tensor in student.state_dict().items() if name.startswith("clip.")}
    save_student(state, student, out)


def _open_clip(source: Path, student, out: Path) -> None:
    """open_clip to open_clip. What it would look up elsewhere is refused: the folder is to load by itself."""
    text = json.loads((source / CONFIG_FILE).read_text(encoding="utf-8"))["model_cfg"]["text_cfg"]
    if text.get("hf_model_name"):
        raise ConfigError(
            f"{source}: text_cfg.hf_model_name is {text['hf_model_name']!r}: open_clip reads that tower's configuration from "
            "elsewhere, so no folder of it loads by itself"
        )
    _same(source, student, out)


def _to_hf(source: Path, student, out: Path) -> None:
    """open_clip to transformers, by way of plain open_clip."""
    import open_clip

    config = json.loads((source / CONFIG_FILE).read_text(encoding="utf-8"))
    hf.refuse(config["model_cfg"], config.get("preprocess_cfg", {}), str(source))
    name = f"local-dir:{source}"
    with hub.offline():
        clip, tokenizer = open_clip.create_model(name), open_clip.get_tokenizer(name)
    model, processor = hf.to_transformers(clip, tokenizer, str(source))
    for part in (model, processor, processor.image_processor):
        part.save_pretrained(out)


def _to_open_clip(source: Path, student, out: Path) -> None:
    """transformers to open_clip."""
    from safetensors.torch import save_file

    config, state, tokenizer = hf.to_open_clip(source)
    save_file(state, out / WEIGHTS_FILE)
    tokenizer.save_pretrained(out)
    (out / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


WRITERS = {
    ("open_clip", "open_clip"): _open_clip,
    ("open_clip", "hf"): _to_hf,
    ("hf", "hf"): _same,
    ("hf", "open_clip"): _to_open_clip,
}
