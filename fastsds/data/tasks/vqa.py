"""VQA v2, and VQA-CP v2: open-ended questions about COCO's images, each answered by ten people.

    vqa_v2      FOLDER/v2_OpenEnded_mscoco_{train,val}2014_questions.json   {"questions": [{question_id, image_id, question}]}
                FOLDER/v2_mscoco_{train,val}2014_annotations.json           {"annotations": [{question_id, image_id,
                                                    question_type, answer_type, multiple_choice_answer, answers: [{answer}]}]}
    vqa_cp_v2   FOLDER/vqacp_v2_{train,test}_{questions,annotations}.json   the lists themselves, each row with its coco_split
    both        FOLDER/{train,val}2014/COCO_{train,val}2014_000000000042.jpg

The classes are answers, normalised: those that at least `min_count` training questions have as their most frequent one, by
count and then by letter; or those of a file. A target has the soft accuracy of each class that somebody gave (answers.py): what
a predicted class earns is the official accuracy. A question whose answers are all outside the classes has an empty target.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fastsds.config import ConfigError
from fastsds.data.rows import field, read_json, read_text, unique
from fastsds.data.tasks import Example, Task
from fastsds.data.tasks.answers import PEOPLE, normalised, soft_accuracy
from fastsds.data.tasks.files import ImageFiles, need, rows_of

FILES = {
    "vqa_v2": {
        split: (f"v2_OpenEnded_mscoco_{split}2014_questions.json", f"v2_mscoco_{split}2014_annotations.json", f"{split}2014")
        for split in ("train", "val")
    },
    "vqa_cp_v2": {
        split: (f"vqacp_v2_{split}_questions.json", f"vqacp_v2_{split}_annotations.json", None) for split in ("train", "test")
    },
}
COCO = ("train2014", "val2014")
TEMPLATE = "{choice}"


@dataclass(kw_only=True)
class Questions(Task):
    """Open-ended questions with shared answers. template: of a prompt, with {choice} and, if wanted, {text}.

    Without {text} the prompts are every example's, the same object, so that a CLIP encodes them once.
    """

    template: str = TEMPLATE

    def __post_init__(self):
        self._shared = tuple(self.template.format(text="", choice=choice) for choice in self.classes)

    def prompts(self, example: Example) -> Sequence[str]:
        """The template filled with each class."""
        if "{text}" not in self.template:
            return self._shared
        return [self.template.format(text=example.text, choice=choice) for choice in self.classes]

    def caption(self, example: Example) -> str | None:
        """The question with its best answer."""
        return None if example.answer is None else f"{example.text} {self.classes[example.answer]}"


def load(
    name: str,
    folder: Path,
    images: Path | None = None,
    answers: Path | None = None,
    min_count: int = 9,
    template: str = TEMPLATE,
) -> Questions:
    """Read the two splits of a release.

    Args: images: the folder of train2014 and val2014. answers: a file of classes, one a line or a JSON list; None: those of the
        training questions above min_count. template: see `Questions`.
    Raises: ConfigError that names file and row, also where questions and annotations do not match.
    """
    try:
        said = {template.format(text="a", choice=choice) for choice in "bc"}
    except (LookupError, ValueError, AttributeError):
        said = set()
    if len(said) < 2:
        raise ConfigError(f"task {name}: template is {template!r}, expected a text with {{choice}} and, if wanted, {{text}}")
    files = ImageFiles(folder if images is None else Path(images))
    seen, read = {}, {}
    for split, (questions, annotations, coco) in FILES[name].items():
        asked = _questions(need(folder, questions), coco, files, seen)
        files.check(folder / questions)
        read[split] = _annotated(need(folder, annotations), folder / questions, asked)
    classes = _counted(read["train"], min_count, folder) if answers is None else _listed(Path(answers))
    number = {answer: k for k, answer in enumerate(classes)}
    splits = {split: [_example(row, number) for row in rows] for split, rows in read.items()}
    outside = ", ".join(f"{sum(not e.target for e in of)} of {split}" for split, of in splits.items())
    return Questions(
        name=name,
        classes=classes,
        splits=splits,
        by=("answer_type", "question_type"),
        notes=[f"{len(classes)} answers; questions with none of them, which earn nothing: {outside}"],
        template=template,
    )


def _questions(path: Path, coco: str | None, files: ImageFiles, seen: dict) -> dict[int, tuple]:
    found = {}
    for where, row in rows_of(path, "questions"):
        number, image = field(where, row, "question_id", int), field(where, row, "image_id", int)
        unique(seen, number, where, "question_id")
        part = coco or field(where, row, "coco_split", str)
        if part not in COCO:
            raise ConfigError(f"{where}: coco_split is {part!r}, expected {' or '.join(COCO)}")
        ref = files.ref(f"{part}/COCO_{part}_{image:012d}.jpg", where)
        found[number] = (where, image, ref, field(where, row, "question", str))
    if not found:
        raise ConfigError(f"{path}: no questions in it")
    return found


def _annotated(path: Path, questions: Path, asked: dict[int, tuple]) -> list[tuple]:
    """(question_id, image, question, answers' counts, the most frequent one, about), in the order of the questions."""
    found, seen = {}, {}
    for where, row in rows_of(path, "annotations"):
        number, image = field(where, row, "question_id", int), field(where, row, "image_id", int)
        unique(seen, number, where, "question_id")
        if number not in asked:
            raise ConfigError(f"{where}: question_id {number} is none of {questions.name}")
        if image != asked[number][1]:
            raise ConfigError(f"{where}: image_id {image}, but {asked[number][0]} has {asked[number][1]}")
        given = [field(f"{where}: answers[{k}]", a, "answer", str) for k, a in enumerate(field(where, row, "answers", list))]
        if len(given) != PEOPLE:
            raise ConfigError(f"{where}: {len(given)} answers, expected {PEOPLE}")
        about = {key: field(where, row, key, str) for key in ("question_type", "answer_type")}
        best = normalised(field(where, row, "multiple_choice_answer", str))
        found[number] = (Counter(map(normalised, given)), best, about)
    if missing := next((where for number, (where, *_) in asked.items() if number not in found), None):
        raise ConfigError(f"{missing}: {len(asked) - len(found)} questions have no annotation in {path}; this is the first")
    return [(number, ref, text, *found[number]) for number, (_, _, ref, text) in asked.items()]


def _example(row: tuple, classes: dict[str, int]) -> Example:
    number, image, text, given, _, about = row
    target = {classes[answer]: soft_accuracy(n) for answer, n in given.items() if answer in classes}
    return Example(str(number), image, text, (), target, about)


def _counted(rows: list[tuple], min_count: int, folder: Path) -> tuple[str, ...]:
    counts = Counter(best for *_, best, _ in rows)
    counts.pop("", None)  # what is left of an answer that was an article alone
    kept = sorted((answer for answer, n in counts.items() if n >= min_count), key=lambda answer: (-counts[answer], answer))
    if len(kept) < 2:
        raise ConfigError(f"{folder}: {len(kept)} answers have at least {min_count} training questions; lower min_count")
    return tuple(kept)


def _listed(path: Path) -> tuple[str, ...]:
    listed = read_json(path) if path.suffix == ".json" else [line for line in read_text(path).split("\n") if line.strip()]
    if not isinstance(listed, list) or not all(isinstance(answer, str) and answer.strip() for answer in listed):
        raise ConfigError(f"{path}: a list of answers expected")
    seen: dict[str, str] = {}
    for i, answer in enumerate(listed):
        unique(seen, normalised(answer), f"{path}: row {i + 1}", "answer")
    if len(seen) < 2:
        raise ConfigError(f"{path}: at least two answers expected, found {len(seen)}")
    return tuple(seen)
