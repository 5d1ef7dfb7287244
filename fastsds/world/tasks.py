"""The embedded world's cross-modal tasks, rendered from its scenes: entailment, questions, multiple choice with rationale.

Example i of a split is a function of (seed, split, i) alone, so a shorter split is the beginning of a longer one. Labels are
balanced by i, and the text of an example is drawn without its label. Splits: `train`, `dev` and `test` have the combinations
of colours and shapes that training has; `dev_shift` those held out for choosing, `shift` those held out for reporting.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache

import torch

from fastsds.config import ConfigError
from fastsds.data import Samples, Source, digest, pair_digest
from fastsds.data.tasks import Example, Task
from fastsds.data.tasks.files import ImageRef
from fastsds.data.tasks.snli_ve import CLASSES, Entailment
from fastsds.data.tasks.vcr import CHANCE, MultipleChoice
from fastsds.ops import Noise, Purpose, draw
from fastsds.world import scenes as world
from fastsds.world.scenes import CONTENTS, RELATIONS, SHAPES, TEMPLATES, Scenes, contents, draw_scenes, render, resize

SIZES = {"train": 10_000, "dev": 1000, "test": 2000, "dev_shift": 1000, "shift": 2000}
POOLS = {"train": "train", "dev": "train", "test": "train", "dev_shift": "dev", "shift": "test"}
NAMES = ("world_entailment", "world_questions", "world_choice")
COLOURS = tuple(world.COLOURS)
PLACES = (("left", "right"), ("right", "left"), ("above", "below"), ("below", "above"))  # of both objects, by relation
OPPOSITE = {"left": "right", "right": "left", "above": "below", "below": "above"}
ONE = ("a {0} {1}", "the {0} is {1}", "there is a {0} {1}")  # TEMPLATES, of one object
ANSWERS = (*COLOURS, *SHAPES, *OPPOSITE)
ASKED = {"colour": "what colour is {}", "shape": "what shape is {}", "place": "where is {}"}
_FIRST = 1 << 43  # scene ids of the tasks: no other scene has them


@dataclass(frozen=True)
class Picture(ImageRef):
    """A scene to render. scene: colours, shapes and relation; covered: which object has a card over it, or -1."""

    scene: tuple[int, int, int, int, int] = (0, 0, 0, 0, 0)
    covered: int = -1
    seed: int = 0
    number: int = 0


class _Rendered(Source):
    """The scenes of examples, many at a time."""

    def __init__(self, examples: Sequence[Example]):
        self.pictures, self.texts = [e.image for e in examples], [e.text for e in examples]
        self.seed = self.pictures[0].seed
        self.table = torch.tensor([(*p.scene, p.covered, p.number) for p in self.pictures], dtype=torch.int64)

    def __len__(self) -> int:
        return len(self.texts)

    def identity(self) -> str:
        found = [(p.name, p.seed, text) for p, text in zip(self.pictures, self.texts, strict=True)]
        return f"{digest(repr(found).encode()):x}"

    def load(self, ids: torch.Tensor, visits: torch.Tensor, size: int, second: int | None = None) -> Samples:
        pixels, said = _pixels(self.table[ids], self.seed), [self.texts[i] for i in ids.tolist()]
        digests = [pair_digest(digest(image.numpy().tobytes()), text) for image, text in zip(pixels, said, strict=True)]
        other = None if second is None else resize(pixels, second)
        return Samples(resize(pixels, size), said, digests=torch.tensor(digests), rows=ids, second=other)


def _pixels(rows: torch.Tensor, seed: int) -> torch.Tensor:
    scenes = Scenes(rows[:, 0:2], rows[:, 2:4], rows[:, 4], torch.zeros_like(rows[:, 4]))
    return render(scenes, seed, rows[:, 6], rows[:, 5])


class _Made(Task):
    def source(self, examples: Sequence[Example], workers: int = 0) -> Source:
        """As `Task.source`; nothing is decoded, so workers are of no use."""
        return _Rendered(examples)


class WorldEntailment(_Made, Entailment):
    """What a picture says of a sentence, where a grey card may lie over one of its two objects.

    A picture has two objects, of different colours and shapes. The sentence says what both are and how they stand, or what one
    place holds. entailment: all that it says is seen. contradiction: something that is seen is otherwise: the objects, their
    colours or their shapes are exchanged, or others are there. neutral: the card lies over an object that it speaks of, and
    what is seen allows it. So a sentence is true of one picture, false of a second and open for a third, and its words say
    nothing of its label. The card does say something: a sentence of one place always has one, over the other object unless
    neutral; one of both has none where it is entailed, and one in half of its contradictions. By it alone half can be told.
    """

    def prompts(self, example: Example) -> list[str]:
        """The sentence; that something is covered; the sentence turned round, "left" for "right": false where it is true."""
        turned = " ".join(OPPOSITE.get(word, word) for word in example.text.split())
        return [example.text, "something is covered", turned]


class WorldQuestions(_Made):
    """Questions of colour, shape and place, about an object told by what else is known of it."""

    def prompts(self, example: Example) -> list[str]:
        """What the question says with each answer, as a caption: "a red ring", "a ring left"."""
        known = [word for word in example.text.split() if word in ANSWERS]
        return [" ".join(["a", *sorted([*known, answer], key=ANSWERS.index)]) for answer in ANSWERS]


class WorldChoice(_Made, MultipleChoice):
    """What is at a place, of four objects; and which of four sentences about the whole picture shows it.

    Both colours and both shapes of the four occur twice, so that the choices say nothing of the answer. Answers of kind
    `presence` differ in what the picture has at all; of kind `binding` in which of its colours, shapes and places go together.
    """

    def prompts(self, example: Example) -> list[str]:
        """An answer at the place; a rationale as it is, a caption of the whole picture."""
        if example.about["part"] == "rationale":
            return list(example.choices)
        return [example.text.replace("what is", choice) for choice in example.choices]


def load(name: str, seed: int = 0, sizes: dict[str, int] | None = None) -> Task:
    """Make a task. Args: sizes: examples by split (of world_choice: questions, two examples each), beside `SIZES`'s."""
    if unknown := [s for s, n in (sizes or {}).items() if s not in SIZES or type(n) is not int or n < 1]:
        raise ConfigError(f"task {name}: sizes: {unknown[0]!r}, expected a size of at least 1 for some of {', '.join(SIZES)}")
    if not -(2**63) <= seed < 2**64:
        raise ConfigError(f"task {name}: seed is {seed}, expected an integer of 64 bits")
    make = {"world_entailment": _entailment, "world_questions": _questions, "world_choice": _choice}[name]
    splits = {s: make(_Draws(name, s, seed, n)) for s, n in (SIZES | (sizes or {})).items()}
    if name == "world_entailment":
        by, chance = ("label", "form", "change"), {"accuracy": 100 / 3}
        return WorldEntailment(name=name, classes=CLASSES, splits=splits, by=by, chance=chance)
    if name == "world_questions":
        chance = {"accuracy": 100 * (1 / len(COLOURS) + 1 / len(SHAPES) + 1 / len(OPPOSITE)) / 3}
        return WorldQuestions(name=name, classes=ANSWERS, splits=splits, by=("question_type",), chance=chance)
    return WorldChoice(name=name, classes=(), splits=splits, by=("kind",), chance=dict(CHANCE))


class _Draws:
    """The numbers of a split's examples, and pictures of them. Shapes: ids int64 [N]; u fp32 [N, 32] in (0, 1]."""

    def __init__(self, name: str, split: str, seed: int, n: int):
        task, self.name, self.split, self.seed = NAMES.index(name), name, split, seed
        self.pool = contents(POOLS[split])
        self.ids = _FIRST + (task << 40) + (list(POOLS).index(split) << 32) + torch.arange(n)
        self.u = Noise(seed, draw(Purpose.RENDER, 4 + task), self.ids).uniform(32)

    def pick(self, column: int, n: int) -> torch.Tensor:
        """One of n, uniformly. Shapes: -> int64 [N]."""
        return (self.u[:, column] * n).ceil().long() - 1

    def scenes(self, content: int, first: int) -> Scenes:
        """Scenes of the pool. Args: columns of u: that the content comes from, and the first of four for the rest."""
        return draw_scenes(self.pool[self.pick(content, len(self.pool))], self.u[:, first:])

    def example(self, k: int, scene: tuple, text: str, target: int, about: dict, covered=-1, choices=(), part="") -> Example:
        """Example k. Args: scene: what is rendered: colours, shapes, relation. part: of its id."""
        number, where = int(self.ids[k]), f"{self.name}/{self.split}/{k}"
        picture = Picture(where, where, lambda: _png(picture), 0, scene, covered, self.seed, number)
        return Example(where + part, picture, text, choices, target, about)


def _png(picture: Picture) -> bytes:
    from torchvision.io import encode_png

    row = torch.tensor([(*picture.scene, picture.covered, picture.number)])
    return encode_png(_pixels(row, picture.seed)[0]).numpy().tobytes()


def _noun(colour: int, shape: int) -> str:
    return f"{COLOURS[colour]} {SHAPES[shape]}"


def _content(scene: tuple) -> dict[str, str]:
    """The groups of what a text is about: its pair of colours and its pair of shapes."""
    colours, shapes = sorted(scene[0:2]), sorted(scene[2:4])
    return {"colours": "+".join(COLOURS[c] for c in colours), "shapes": "+".join(SHAPES[s] for s in shapes)}


def _rows(scenes: Scenes) -> list[tuple]:
    return [tuple(row) for row in torch.cat([scenes.colour, scenes.shape, scenes.relation[:, None]], dim=1).tolist()]


def _entailment(d: _Draws) -> list[Example]:
    said = d.scenes(4, 0)
    others = [replace(d.scenes(c, c + 1), relation=said.relation) for c in (12, 18, 24)]
    rows = [_rows(scenes) for scenes in (said, *others, *(said.swapped(kind) for kind in world.KINDS))]
    columns = zip(said.template.tolist(), d.pick(5, 2).tolist(), d.pick(6, 2).tolist(), d.pick(7, 2).tolist(), strict=True)
    examples = []
    for k, (template, place, card, hidden) in enumerate(columns):
        label, whole, change = k % 3, k // 3 % 2 == 0, (*world.KINDS, "content")[k // 6 % 4]
        scene = rows[0][k]
        nouns, places = [_noun(scene[j], scene[2 + j]) for j in (0, 1)], PLACES[scene[4]]
        text = TEMPLATES[template].format(nouns[0], RELATIONS[scene[4]], nouns[1])
        if not whole:
            text = ONE[template].format(nouns[place], places[place])
        covered = (place if label == 1 else 1 - place) if not whole else (-1, hidden, hidden if card else -1)[label]
        about = {"label": CLASSES[label], "form": "whole" if whole else "one", **_content(scene)}
        if label == 2:
            scene, about["change"] = _false(k, rows, change)
        examples.append(d.example(k, scene, text, label, about, covered))
    return examples


def _false(k: int, rows: list[list[tuple]], change: str) -> tuple[tuple, str]:
    """A scene of which the sentence of rows[0][k] is false at both places, and how it came about."""
    if change == "content":
        said = rows[0][k]
        for other in (rows[n][k] for n in (1, 2, 3)):
            if all((other[j], other[2 + j]) != (said[j], said[2 + j]) for j in (0, 1)):
                return other, change
        change = world.KINDS[0]
    return rows[4 + world.KINDS.index(change)][k], change


def _questions(d: _Draws) -> list[Example]:
    kinds, pool, chosen = list(ASKED), d.pool.tolist(), []
    having = [[[c for c in pool if n in CONTENTS[c][part]] for n in range(size)] for part, size in ((0, 8), (1, 6))]
    for k, u in enumerate(d.u[:, 4].double().tolist()):  # contents: for colour and shape some that have the answer
        of = pool if k % 3 == 2 else having[k % 3][k // 6 % len(having[k % 3])]
        chosen.append(of[math.ceil(u * len(of)) - 1])
    scenes, examples = _rows(draw_scenes(torch.tensor(chosen), d.u)), []
    for k, (scene, j, way) in enumerate(zip(scenes, d.pick(5, 2).tolist(), d.pick(6, 2).tolist(), strict=True)):
        kind, answer = k % 3, k // 6 % (8, 6, 4)[k % 3]
        if kind < 2:
            j = scene[2 * kind : 2 * kind + 2].index(answer)
        else:
            scene = (*scene[:4], answer ^ j)  # the relation that puts object j there
        colour, shape, place = COLOURS[scene[j]], f"the {SHAPES[scene[2 + j]]}", PLACES[scene[4]][j]
        thing = f"the {_noun(scene[j], scene[2 + j])}"
        known = ((shape, place), (colour, place), (thing, (shape, colour)[way]))[kind][k // 3 % 2]
        about = {"question_type": kinds[kind], **_content(scene)}
        target = answer + (0, len(COLOURS), len(COLOURS) + len(SHAPES))[kind]
        examples.append(d.example(k, scene, ASKED[kinds[kind]].format(known), target, about))
    return examples


def _choice(d: _Draws) -> list[Example]:
    scenes, orders = _rows(d.scenes(4, 0)), d.u[:, 8:32].argsort(dim=1, stable=True)
    columns = zip(scenes, d.pick(5, 2).tolist(), d.pick(6, 3).tolist(), orders.tolist(), strict=True)
    absent_from, examples = _absent(d.pool), []
    for k, (scene, j, template, order) in enumerate(columns):
        labels, kind, place = (k % 4, k // 4 % 4), ("presence", "binding")[k // 16 % 2], PLACES[scene[4]][j]
        here, there = ((scene[n], scene[2 + n]) for n in (j, 1 - j))
        absent, fits = absent_from(here, there)
        other, relation = absent[max(order, key=fits.__getitem__)], RELATIONS[scene[4] ^ j]  # of what is here to what is there
        answers = [f"a {_noun(*thing)}" for thing in _square(here, there if kind == "binding" else absent[order[0]])]
        rationales = [TEMPLATES[template].format(_noun(*here), relation, _noun(*of)) for of in _square(there, other)]
        text, question = f"what is {place}", f"{d.name}/{d.split}/{k}"
        for part, label, (right, *wrong) in zip(("answer", "rationale"), labels, (answers, rationales), strict=True):
            wrong = wrong[order[0] % 3 :] + wrong[: order[0] % 3]
            about = {"question": question, "part": part, "kind": kind, **_content(scene)}
            choices = (*wrong[:label], right, *wrong[label:])
            examples.append(d.example(k, scene, text, label, about, choices=choices, part=f"/{part}"))
            text = f"{text} {right}"
    return examples


def _absent(pool: torch.Tensor):
    """(here, there) -> the 24 things of other colours and shapes than these two, and how many of the four rationales that come
    of each tell of combinations that the pool has: else those that it never has would be known to be wrong without looking."""
    known = {CONTENTS[c] for c in pool.tolist()}

    @cache
    def absent(here: tuple[int, int], there: tuple[int, int]) -> tuple[list[tuple[int, int]], list[int]]:
        colours, shapes = ([n for n in range(size) if n not in (here[p], there[p])] for p, size in ((0, 8), (1, 6)))
        things = [(colour, shape) for colour in colours for shape in shapes]
        return things, [sum(_pair(here, of) in known for of in _square(there, thing)) for thing in things]

    return absent


def _square(right: tuple[int, int], wrong: tuple[int, int]) -> list[tuple[int, int]]:
    """All four things with a colour and a shape of two, the right one first."""
    return [(colour, shape) for colour in (right[0], wrong[0]) for shape in (right[1], wrong[1])]


def _pair(a: tuple[int, int], b: tuple[int, int]) -> tuple[tuple[int, int], tuple[int, int]]:
    """The content that two things make, as in `CONTENTS`."""
    return tuple(sorted((a[0], b[0]))), tuple(sorted((a[1], b[1])))
