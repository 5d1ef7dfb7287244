"""VCR: a question about a film still with four answers (Q->A), and four rationales for the right one (QA->R).

    FOLDER/{train,val}.jsonl        annot_id, movie, img_fn, metadata_fn, objects, question, answer_choices, answer_label,
                                    rationale_choices, rationale_label
    FOLDER/vcr1images/IMG_FN

Each question is two examples, of parts `answer` and `rationale`: the second one's text has the right answer after the question.
A word of these texts is a string, or a list of indices into `objects`, written out by `sentence`. Three outcomes a question:
answer, rationale, and both (Q->AR: their conjunction). Boxes are not read. The test split has no labels, and is not read.
Source: Zellers et al. 2019, arXiv 1811.10830; visualcommonsense.com.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fastsds.config import ConfigError
from fastsds.data.rows import field, unique
from fastsds.data.tasks import Example, Outcomes, Task
from fastsds.data.tasks.files import ImageFiles, need, read_lines

PARTS = ("answer", "rationale")
CHOICES = 4
CLOSING = (".", ",", "?", "!", ";", ":", "'s", "n't", ")")  # no space before these


class MultipleChoice(Task):
    """Four answers and four rationales a question; `about["question"]` joins the two examples, `about["part"]` tells them."""

    def prompts(self, example: Example) -> list[str]:
        """The text, then the choice."""
        return [f"{example.text} {choice}" for choice in example.choices]

    def unit(self, example: Example) -> str:
        return example.about["question"]

    def outcomes(self, examples: Sequence[Example], predicted) -> Outcomes:
        """Answer, rationale and both, one each a question. Raises: ValueError also where a question lacks a part."""
        scores, parts = self.scores(examples, predicted), {}
        for example, score in zip(examples, scores.tolist(), strict=True):
            parts.setdefault(example.about["question"], {})[example.about["part"]] = (score, example.about)
        if (bad := next((q for q, of in parts.items() if set(of) != set(PARTS)), None)) is not None or (
            2 * len(parts) != len(examples)
        ):
            raise ValueError(f"examples: each question once with its answer and its rationale expected, not so of {bad}")
        answer, rationale = (np.array([of[part][0] for of in parts.values()], np.float64) for part in PARTS)
        about = [{k: v for k, v in of[PARTS[0]][1].items() if k not in ("part", "question")} for of in parts.values()]
        return Outcomes(list(parts), about, {"answer": answer, "rationale": rationale, "both": answer * rationale})


CHANCE = {"answer": 25.0, "rationale": 25.0, "both": 6.25}


def load(name: str, folder: Path, images: Path | None = None) -> MultipleChoice:
    """Read train and val. Args: images: the folder vcr1images. Raises: ConfigError that names file and row."""
    files, seen, splits = ImageFiles(folder / "vcr1images" if images is None else Path(images)), {}, {}
    for split in ("train", "val"):
        path = need(folder, f"{split}.jsonl")
        splits[split] = [e for where, row in read_lines(path) for e in _examples(where, row, files, seen)]
        if not splits[split]:
            raise ConfigError(f"{path}: no rows in it")
        files.check(path)
    return MultipleChoice(name=name, classes=(), splits=splits, chance=dict(CHANCE))


def sentence(where: str, words, objects: Sequence[str]) -> str:
    """Write a sentence out: `["Why", "is", [0, 2], "here", "?"]` -> "Why is person 1 and car here?".

    A reference becomes its object's name; people are always numbered, in the order of `objects` from 1, others where there are
    several of their name. Several references are joined by commas and "and". Raises: ConfigError for an index out of range.
    """
    if not isinstance(words, list) or not words:
        raise ConfigError(f"{where}: a list of words expected, found {words!r:.60}")
    said = ""
    for word in words:
        if isinstance(word, list):
            if bad := [i for i in word if not isinstance(i, int) or isinstance(i, bool) or not 0 <= i < len(objects)]:
                raise ConfigError(f"{where}: object {bad[0]!r}, expected an index in [0, {len(objects)}) of its objects")
            names = [_name(i, objects) for i in word]
            word = ", ".join(names[:-1]) + " and " * (len(names) > 1) + names[-1] if names else ""
        if not isinstance(word, str):
            raise ConfigError(f"{where}: a word or a list of objects expected, found {word!r:.60}")
        glued = word.startswith(CLOSING) or said.endswith("(") or not said
        said += word if glued else " " + word
    return said


def _name(i: int, objects: Sequence[str]) -> str:
    name = objects[i]
    return f"{name} {objects[: i + 1].count(name)}" if name == "person" or objects.count(name) > 1 else name


def _examples(where: str, row, files: ImageFiles, seen: dict) -> list[Example]:
    question, objects = field(where, row, "annot_id", str), field(where, row, "objects", list)
    unique(seen, question, where, "annot_id")
    if bad := [name for name in objects if not isinstance(name, str)]:
        raise ConfigError(f"{where}: objects: names expected, found {bad[0]!r:.60}")
    image = files.ref(field(where, row, "img_fn", str), where)
    text = sentence(f"{where}: question", field(where, row, "question", list), objects)
    movie, examples = field(where, row, "movie", str), []
    for part in PARTS:
        choices, label = field(where, row, f"{part}_choices", list), field(where, row, f"{part}_label", int)
        if len(choices) != CHOICES or not 0 <= label < CHOICES:
            found = f"{len(choices)} {part}_choices, {part}_label {label}"
            raise ConfigError(f"{where}: {found}; expected {CHOICES}, and one of 0 to {CHOICES - 1}")
        said = tuple(sentence(f"{where}: {part}_choices[{k}]", words, objects) for k, words in enumerate(choices))
        about = {"question": question, "part": part, "movie": movie, "image": image.name}
        examples.append(Example(f"{question}/{part}", image, text, said, label, about))
        text = f"{text} {said[label]}"
    return examples
