"""A student from what a recipe says: found, built, filled with weights, tuned."""

from pathlib import Path

import torch

from fastsds.config import ConfigError, StudentConfig
from fastsds.hub import HUB
from fastsds.student import hf, openclip
from fastsds.student.head import HEAD_FILE, read_head
from fastsds.student.model import Student
from fastsds.student.tuning import apply_tuning
from fastsds.weights import first_line

COMPILE = {"default": None, "max-autotune": "max-autotune-no-cudagraphs"}  # a graph's outputs would not outlive its next run


def make_student(
    config: StudentConfig,
    latent_shape: tuple[int, int, int] | None = None,
    device: str | torch.device = "cpu",
    seed: int = 0,
) -> tuple[Student, list[str]]:
    """The student that a recipe describes, and the names of its trained parameters: the head's where there are latents.

    Tuned before it is compiled: what does not train is a constant to the compiler.
    Args: as `load_student`. On the meta device nothing is compiled.
    """
    student = load_student(config.model, config.pretrained, latent_shape, device, seed)
    trained = apply_tuning(student, config.tune, latent_shape is not None, config.lora, seed)
    if config.checkpoint:
        student.family.checkpoint(student.clip)
    if config.compile and torch.device(device).type != "meta":
        student.clip.compile(mode=COMPILE[config.compile])
    return student, trained


def load_student(
    model: str | Path,
    pretrained: str | None = None,
    latent_shape: tuple[int, int, int] | None = None,
    device: str | torch.device = "cpu",
    seed: int = 0,
) -> Student:
    """Load a student in fp32.

    Args: model: "world" (the embedded one), a folder in open_clip's or transformers' format (open_clip's, where it is
        both), a named open_clip architecture, or `hf-hub:ORG/NAME` (open_clip's). pretrained: of a named architecture: a
        tag, a local weights file or `hf-hub:ORG/NAME`; None: a random start. Only a tag or an `hf-hub:` name is ever
        fetched, and only what is not on this disk. latent_shape: (C, h, w) of the teacher; None takes the folder's own
        head, if it has one. device: "meta" reads no weights and no tokenizer, and needs none: names and shapes alone.
        seed: of whatever is not loaded (the head; a random start).
    Raises: ConfigError that names the file and what is wrong in it.
    """
    device = torch.device(device)
    folder = _folder(model)
    if folder is not None and pretrained is not None:
        raise ConfigError(f"student.pretrained: {pretrained!r}, but {folder} has its own weights; expected null")
    if pretrained is not None and str(model).startswith(HUB):
        raise ConfigError(f"student.pretrained: {pretrained!r}, but {model} has its own weights; expected null")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if folder is not None and not (folder / openclip.CONFIG_FILE).is_file():
            clip, family = hf.load(folder, device.type == "meta")
        else:
            clip, family = openclip.load(str(model), pretrained, folder, device.type == "meta")
        saved = read_head(folder) if folder is not None else None
        if latent_shape is None and saved is not None:
            latent_shape = saved[0]
        with torch.device("meta" if device.type == "meta" else "cpu"):
            student = Student(clip, family, latent_shape)
    if saved is not None:
        shape, state = saved
        if shape != student.latent_shape or state["linear.weight"].shape != student.head.linear.weight.shape:
            raise ConfigError(
                f"{folder / HEAD_FILE}: head for latents {shape}, but the teacher's latents are {tuple(latent_shape)}"
            )
        student.head.load_state_dict(state)
    if family.tokenizer is not None:
        _check_text(student)
    return student.to(device)


def _folder(model: str | Path) -> Path | None:
    """The local folder that a recipe's `student.model` names; None: a name that open_clip or the hub knows."""
    import open_clip

    text = str(model)
    if text == "world":
        from fastsds import world

        return Path(world.STUDENT)
    if text.startswith(HUB):
        return None
    folder = Path(text.removeprefix("local-dir:"))
    if folder.is_dir():
        if not any((folder / name).is_file() for name in (openclip.CONFIG_FILE, hf.CONFIG_FILE)):
            raise ConfigError(
                f"{folder}: {openclip.CONFIG_FILE} is missing (an open_clip folder), and so is {hf.CONFIG_FILE} (transformers)"
            )
        return folder
    if text.replace("/", "-") in open_clip.list_models():
        return None
    if text.startswith(("local-dir:", ".", "/", "~")) or "/" in text:
        raise ConfigError(f"student.model: folder {folder} does not exist")
    raise ConfigError(f"student.model: {text!r} is neither a folder nor an open_clip model (see open_clip.list_models())")


def _check_text(student: Student) -> None:
    """Raise unless the text tower pools the end token of short, long and odd captions, and knows every token."""
    family = student.family
    entries, end, pooled = family.pooling(student.clip)
    try:
        tokens = student.tokenize(["a red ring", "word " * 200, "naïve 雪 \N{SNOWMAN}"])
    except Exception as error:
        raise ConfigError(f"{family.where}: its tokenizer fails on a caption: {first_line(error)}") from error
    if entries is not None and int(tokens.max()) >= entries:
        raise ConfigError(f"{family.where}: token {int(tokens.max())} is past the text tower's {entries} entries")
    if pooled is None or end is None:
        return
    is_end = tokens == end
    if not bool(is_end.any(dim=1).all()) or not torch.equal(pooled(tokens), is_end.int().argmax(dim=1)):
        raise ConfigError(
            f"{family.where}: its text tower does not pool the tokenizer's end token {end}; expected the highest id "
            "where it pools the highest (open_clip's pool_type 'argmax'), else eos_id (transformers: eos_token_id) to be it"
        )
