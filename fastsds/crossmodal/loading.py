"""A cross-modal student from what a recipe says: found, built, filled with weights, tuned."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from fastsds import hub
from fastsds.config import ConfigError, StudentConfig
from fastsds.crossmodal import vilt
from fastsds.crossmodal.model import CrossModal, Family
from fastsds.crossmodal.saving import WEIGHTS_FILE, read_head
from fastsds.student.head import HEAD_FILE
from fastsds.student.hf import CONFIG_FILE, read_json
from fastsds.student.loading import COMPILE
from fastsds.student.tuning import apply_tuning

FAMILIES = {"vilt": vilt.load}  # model_type of config.json: (folder, meta) -> (model, family)
FETCHED = (("preprocessor_config.json",), ("tokenizer_config.json",), ("tokenizer.json", "vocab.txt"),
           (WEIGHTS_FILE, "pytorch_model.bin"))  # fmt: skip


def make_crossmodal(
    config: StudentConfig, classes: int | Sequence[str], place: str | torch.device = "cpu", seed: int = 0
) -> tuple[CrossModal, list[str]]:
    """The student that a recipe describes, and the names of its trained parameters: the head's always.

    Args: as `load_crossmodal`. On the meta device nothing is compiled.
    """
    if config.pretrained is not None:
        raise ConfigError(f"student.pretrained: {config.pretrained!r}, expected null: a cross-modal model has its own weights")
    student = load_crossmodal(config.model, classes, place, seed)
    trained = apply_tuning(student, config.tune, low_rank=config.lora, seed=seed, part="model")
    if config.checkpoint:
        student.family.checkpoint(student.model)
    if config.compile and torch.device(place).type != "meta":
        student.model.compile(mode=COMPILE[config.compile])
    return student, trained


def load_crossmodal(
    model: str | Path, classes: int | Sequence[str] | None = None, device: str | torch.device = "cpu", seed: int = 0
) -> CrossModal:
    """Load a cross-modal student in fp32.

    Args: model: a transformers folder, `hf-hub:ORG/NAME` or ORG/NAME, of which only what is not on this disk is fetched; or
        "world": the embedded world's, small, pretrained on its captions (fastsds/world/vilt.py). classes: of the head, their
        names in order or their number, none for one score a choice; None takes the folder's own head. device: "meta" reads
        no weights and no tokenizer. seed: of whatever is not loaded.
    Raises: ConfigError that names the file and what is wrong in it.
    """
    meta = torch.device(device).type == "meta"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        folder = _folder(str(model), meta)
        body, family = _read(folder, meta)
        saved = read_head(folder)
        if classes is None and saved is None:
            raise ConfigError(f"student {model}: no {HEAD_FILE}, so the number of classes must be given")
        with torch.device("meta" if meta else "cpu"):
            student = CrossModal(body, family, classes if saved is None else saved.answers)
    if saved is not None:
        if classes is not None:
            student.check_answers(classes, str(folder / HEAD_FILE), ": remove it, for a new head")
            if not student.answers and not isinstance(classes, int):
                student.answers = tuple(classes)
        own = {name: tensor for name, tensor in saved.state.items() if name.startswith("head.")}
        expected = {f"head.{name}": tensor.shape for name, tensor in student.head.state_dict().items()}
        for name in sorted(own.keys() | expected.keys()):
            if name not in own or own[name].shape != expected.get(name):
                found = tuple(own[name].shape) if name in own else "missing"
                raise ConfigError(f"{folder / HEAD_FILE}: tensor {name} is {found}, expected {tuple(expected.get(name, ()))}")
        student.head.load_state_dict({name.removeprefix("head."): tensor for name, tensor in own.items()})
    return student.to(device)


def _read(folder: Path, meta: bool) -> tuple[nn.Module, Family]:
    kind = read_json(folder / CONFIG_FILE).get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        expected = ", ".join(FAMILIES)
        raise ConfigError(f"{folder / CONFIG_FILE}: model_type is {kind!r}; expected a cross-modal model: {expected}")
    return FAMILIES[kind](folder, meta)


def _folder(model: str, meta: bool) -> Path:
    """The folder that a recipe's `student.model` names: the world's, a local one, or the hub's on this disk."""
    if model == "world":
        from fastsds import world

        return world.VILT
    folder = Path(model)
    if folder.is_dir():
        if not (folder / CONFIG_FILE).is_file():
            raise ConfigError(f"{folder}: {CONFIG_FILE} is missing (a transformers folder)")
        return folder
    repo = model.removeprefix(hub.HUB)
    if repo == model and (model.startswith((".", "/", "~")) or model.count("/") != 1):
        raise ConfigError(
            f"student.model: {model!r} is no folder; expected a transformers folder, {hub.HUB}ORG/NAME, or world"
        )
    where = f"student.model {model!r}" + ("" if model != repo else ", which is no folder")
    snapshot = hub.fetch(repo, (CONFIG_FILE,), where).parent
    for names in FETCHED[:1] if meta else FETCHED:
        hub.fetch(repo, names, where)
    return snapshot
