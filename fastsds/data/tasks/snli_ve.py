"""SNLI-VE: does the picture entail the sentence, contradict it, or neither?

    FOLDER/snli_ve_{train,dev,test}.jsonl   gold_label, sentence2, pairID, and Flickr30K_ID or Flikr30kID (with .jpg)
    FOLDER/flickr30k_images/NAME.jpg        Flickr30k

Accuracy over three classes. A row whose gold_label is "-" (its annotators disagreed) is passed over, and counted in the notes.
Source: Xie et al. 2019, arXiv 1901.06706; github.com/necla-ml/SNLI-VE.
"""

from pathlib import Path

from fastsds.config import ConfigError
from fastsds.data.rows import field, unique
from fastsds.data.tasks import Example, Task
from fastsds.data.tasks.files import ImageFiles, need, read_lines

CLASSES = ("entailment", "neutral", "contradiction")
IDS = ("Flickr30K_ID", "Flikr30kID")  # of the two releases
UNDECIDED = "-"
TEMPLATES = ("{}", "it cannot be seen whether {}", "it is not true that {}")


class Entailment(Task):
    """Three classes for a picture and a sentence."""

    def prompts(self, example: Example) -> list[str]:
        """The sentence as true, as undecided and as false (`TEMPLATES`)."""
        return [template.format(example.text.rstrip(" .")) for template in TEMPLATES]

    def caption(self, example: Example) -> str | None:
        """The sentence, where the picture entails it."""
        return example.text if example.target == CLASSES.index("entailment") else None


def load(name: str, folder: Path, images: Path | None = None) -> Entailment:
    """Read the three splits. Args: images: the folder of Flickr30k's images. Raises: ConfigError that names file and row."""
    files = ImageFiles(folder / "flickr30k_images" if images is None else Path(images))
    splits, seen, undecided = {}, {}, {}
    for split in ("train", "dev", "test"):
        path = need(folder, f"snli_ve_{split}.jsonl")
        splits[split], undecided[split] = _read(path, files, seen)
        files.check(path)
    shown = ", ".join(f"{n} of {split}" for split, n in undecided.items())
    return Entailment(
        name=name,
        classes=CLASSES,
        splits=splits,
        by=("label",),
        chance={"accuracy": 100 / 3},
        notes=[f"rows without a gold label, passed over: {shown}"],
    )


def _read(path: Path, files: ImageFiles, seen: dict) -> tuple[list[Example], int]:
    examples, undecided = [], 0
    for where, row in read_lines(path):
        label, pair = field(where, row, "gold_label", str), field(where, row, "pairID", str)
        unique(seen, pair, where, "pairID")
        if label == UNDECIDED:
            undecided += 1
            continue
        if label not in CLASSES:
            raise ConfigError(f"{where}: gold_label is {label!r}, expected {', '.join(CLASSES)} or {UNDECIDED}")
        key = next((key for key in IDS if key in row), IDS[0])
        image = field(where, row, key, str)
        image = image if image.endswith(".jpg") else image + ".jpg"
        text = field(where, row, "sentence2", str)
        examples.append(
            Example(pair, files.ref(image, where), text, (), CLASSES.index(label), {"label": label, "image": image})
        )
    if not examples:
        raise ConfigError(f"{path}: no rows with a gold label in it")
    return examples, undecided
