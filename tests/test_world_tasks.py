"""The embedded world's tasks: labels that follow from the picture, words that do not tell them, splits that do not leak."""

from collections import Counter

import pytest
import torch

from fastsds.data.images import decode_image
from fastsds.data.loader import Loader
from fastsds.data.tasks import load_task
from fastsds.data.tasks.subsets import low_shot, shift_by
from fastsds.world import STUDENT, scenes
from fastsds.world.scenes import COLOURS, CONTENTS, SHAPES, Scenes, contents, render
from fastsds.world.tasks import NAMES, POOLS, SIZES

SMALL = {"train": 1800, "dev": 90, "test": 900, "dev_shift": 90, "shift": 360}
SIDES = {"left": 0, "right": 0, "above": 2, "below": 2}  # the axis of a place
FIRST = ("left", "above")


@pytest.fixture(scope="module")
def tasks():
    return {name: load_task(name, sizes=SMALL) for name in NAMES}


def every(task):
    return [(split, e) for split, of in task.splits.items() for e in of]


def objects(picture):
    """What is at the first place (left or above) and at the second: (colour, shape), or None under a card; and the axis."""
    c0, c1, s0, s1, relation = picture.scene
    both = [(list(COLOURS)[c0], SHAPES[s0]), (list(COLOURS)[c1], SHAPES[s1])]
    if picture.covered >= 0:
        both[picture.covered] = None
    return both[::-1] if relation % 2 else both, relation // 2 * 2


def things(words):
    """The (colour, shape) that follow one another in a text."""
    return [(a, b) for a, b in zip(words, words[1:]) if a in COLOURS and b in SHAPES]


def claims(text):
    """What a sentence says is at each place: {0 or 1: (colour, shape)}, and the axis it speaks of."""
    words = text.split()
    place = next(w for w in words if w in SIDES)
    if len(found := things(words)) == 1:
        return {0 if place in FIRST else 1: found[0]}, SIDES[place]
    return dict(zip((0, 1) if place in FIRST else (1, 0), found, strict=True)), SIDES[place]


def verdict(text, picture):
    """entailment, neutral or contradiction, from what is seen, and from that a picture's colours and shapes differ."""
    seen, axis = objects(picture)
    said, spoken = claims(text)
    assert spoken == axis
    hidden = [place for place in said if seen[place] is None]
    wrong = [place for place, thing in said.items() if seen[place] not in (None, thing)]
    wrong += [place for place in hidden if set(said[place]) & set(seen[1 - place])]
    return "contradiction" if wrong else "neutral" if hidden else "entailment"


def test_an_example_depends_on_seed_split_and_number_alone(tasks):
    for name in NAMES:
        shorter = load_task(name, sizes={split: 30 for split in SIZES})
        for split, of in shorter.splits.items():
            assert of == tasks[name].splits[split][: len(of)]
        other = load_task(name, seed=1, sizes={split: 30 for split in SIZES})
        assert [e.text for e in other.splits["test"]] != [e.text for e in shorter.splits["test"]]
    numbers = [e.image.number for task in tasks.values() for _, e in every(task)]
    assert len(set(numbers)) == 3 * sum(SMALL.values())  # a question of world_choice is two examples of one picture


def test_labels_follow_from_what_is_seen(tasks):
    task = tasks["world_entailment"]
    for _, e in every(task):
        assert verdict(e.text, e.image) == e.about["label"] == task.classes[e.target], e
        assert verdict(task.prompts(e)[0], e.image) == e.about["label"]
        if e.target == 0:
            assert verdict(task.prompts(e)[2], e.image) == "contradiction"
    kinds = Counter((e.about["label"], e.about["form"]) for e in task.splits["train"])
    assert set(kinds.values()) == {300}
    assert {e.about["change"] for e in task.splits["train"] if e.target == 2} == {*scenes.KINDS, "content"}
    covered = Counter((e.image.covered >= 0, e.target) for e in task.splits["train"])
    told = sum(max(covered[card, label] for label in range(3)) for card in (True, False)) / len(task.splits["train"])
    assert told == pytest.approx(0.5, abs=0.02)  # what knowing whether there is a card is worth


def test_questions_have_one_answer(tasks):
    task = tasks["world_questions"]
    for _, e in every(task):
        (first, second), axis = objects(e.image)
        words = e.text.split()
        at = {"left": first, "right": second} if axis == 0 else {"above": first, "below": second}
        named = [t for place, t in at.items() if set(words) & {place, *t}]
        assert len(named) == 1, e.text
        place = next(place for place, t in at.items() if t == named[0])
        right = {"colour": named[0][0], "shape": named[0][1], "place": place}[e.about["question_type"]]
        assert task.classes[e.target] == right, e
        said = task.prompts(e)[e.target].split()[1:]
        assert said == [w for w in (*named[0], place) if w in {right, *words}]
    targets = Counter(e.target for e in task.splits["train"])
    for part, size in ((range(8), 75), (range(8, 14), 100), (range(14, 18), 150)):
        assert all(abs(targets[c] - size) <= 1 for c in part)


def test_one_choice_of_four_is_true(tasks):
    task = tasks["world_choice"]
    for _, e in every(task):
        seen, axis = objects(e.image)
        place = e.text.split()[2]
        here = seen[0 if place in FIRST else 1]
        if e.about["part"] == "answer":
            true = [things(c.split()) == [here] for c in e.choices]
        else:
            true = [verdict(c, e.image) == "entailment" for c in e.choices]
            assert things(e.text.split()) == [here] and SIDES[place] == axis
        assert true.index(True) == e.target and sum(true) == 1 and len(set(e.choices)) == 4
        last = [things(c.split())[-1] for c in e.choices]  # the object in which the choices differ
        assert set(Counter(c for c, _ in last).values()) == set(Counter(s for _, s in last).values()) == {2}
        if e.about["kind"] == "binding" and e.about["part"] == "answer":
            assert {w for thing in last for w in thing} == {w for thing in seen for w in thing}
    labels = Counter((e.about["part"], e.about["kind"], e.target) for e in task.splits["test"])
    assert max(labels.values()) - min(labels.values()) <= 4


def test_combinations_stay_in_their_split(tasks):
    names, pools = list(COLOURS), {split: {CONTENTS[c] for c in contents(of).tolist()} for split, of in POOLS.items()}
    for task in tasks.values():
        for split, e in every(task):
            pool = pools[split]
            c0, c1, s0, s1, _ = e.image.scene
            assert (tuple(sorted((c0, c1))), tuple(sorted((s0, s1)))) in pool
            colours = tuple(names.index(c) for c in e.about["colours"].split("+"))
            assert (colours, tuple(SHAPES.index(s) for s in e.about["shapes"].split("+"))) in pool
    assert {POOLS["dev_shift"], POOLS["shift"]} == {"dev", "test"} and {POOLS[s] for s in ("train", "dev", "test")} == {"train"}


def test_a_card_hides_all_of_an_object_and_nothing_of_the_other():
    n = 576
    k, card = torch.arange(n), torch.ones(n, dtype=torch.long)
    shapes, colours, relation = torch.stack([k % 6, (k + 1) % 6], dim=1), torch.tensor([[0, 1]]).expand(n, 2), k // 24 % 4
    scene = Scenes(colours, shapes, relation, relation)
    other = Scenes(colours * 5, torch.stack([k % 6, (k + 2 + k // 6 % 4) % 6], dim=1), relation, relation)
    plain, covered = render(scene, 3, k), render(scene, 3, k, card)
    assert torch.equal(covered, render(other, 3, k, card)) and not torch.equal(plain, render(other, 3, k))
    assert torch.equal(plain, render(scene, 3, k, -card))
    red, green = ((torch.tensor(list(COLOURS.values())[c]) * 255)[:, None, None] for c in (0, 1))
    shown = [((pixels - red).abs().amax(1) < 40) for pixels in (plain, covered)]
    assert shown[0].flatten(1).any(1).all() and not (shown[0] & ~shown[1]).any()
    assert ((plain - green).abs().amax(1) < 40).any() and not ((covered - green).abs().amax(1) < 40).any()


def test_sources_give_what_the_pictures_are(tasks):
    for task in tasks.values():
        examples = task.splits["shift"][:12]
        source, ids = task.source(examples), torch.tensor([7, 0, 11])
        samples = source.load(ids, torch.zeros_like(ids), 32, 16)
        assert samples.captions == [examples[k].text for k in ids] and samples.second.shape == (3, 3, 16, 16)
        for pixels, k in zip(samples.pixels, ids.tolist(), strict=True):
            assert torch.equal(decode_image(examples[k].image.read(), [32])[0], pixels)
        assert source.identity() != task.source(examples[:-1]).identity() == task.source(task.splits["shift"][:11]).identity()
        loader = Loader(source, batch=4, streams=2, seed=0, image_size=32, tokenize=lambda t: torch.zeros(len(t), 1))
        batch, _ = next(loader)
        assert batch.captions == [examples[k].text for k in batch.ids.tolist()]


def test_texts_and_prompts_fit_the_worlds_tokenizer(tasks):
    import open_clip

    tokenize = open_clip.get_tokenizer(f"local-dir:{STUDENT}", context_length=64)
    for task in tasks.values():
        texts = {t for e in task.splits["train"][:300] for t in (e.text, *e.choices, *task.prompts(e))}
        assert (tokenize(sorted(texts)) == tokenize.tokenizer.eos_token_id).int().argmax(1).max() < 20


def test_low_shot_and_shift_take_them(tasks):
    few = low_shot(tasks["world_choice"], 0.01, seed=0).splits["train"]
    assert len(few) == 36 and set(Counter(e.about["question"] for e in few).values()) == {2}
    few = low_shot(tasks["world_entailment"], 0.01, seed=0).splits["train"]
    assert Counter(e.target for e in few) == {0: 6, 1: 6, 2: 6}
    shifted = shift_by(tasks["world_questions"], "shapes", share=0.6, seed=1)
    groups = {split: {e.about["shapes"] for e in of} for split, of in shifted.splits.items()}
    assert len(groups["train"]) == 9 and not groups["train"] & groups["test_shift"]


def bags(*sets):
    """Words and pairs of words that follow one another, of each set's texts. Shapes: -> [N, vocabulary] each."""
    words, found = {}, []
    for texts in sets:
        said = [text.split() for text in texts]
        found.append([[words.setdefault(w, len(words)) for w in (*of, *zip(of, of[1:]))] for of in said])
    return [torch.stack([torch.zeros(len(words)).index_fill_(0, torch.tensor(row), 1) for row in rows]) for rows in found]


def read_only(train, test, choices):
    """Accuracy of a logistic regression. Shapes: (x [N, V] or [N, choices, V], labels [N]) each."""
    model = torch.nn.Linear(train[0].shape[-1], 1 if choices else int(train[1].max()) + 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02, weight_decay=0.1)
    scores = (lambda x: model(x)[..., 0]) if choices else model
    for _ in range(60):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(scores(train[0]), train[1]).backward()
        optimizer.step()
    with torch.no_grad():
        return (scores(test[0]).argmax(1) == test[1]).float().mean().item()


@pytest.mark.parametrize("split", ["test", "shift"])
@pytest.mark.parametrize("name", NAMES)
def test_words_alone_do_not_tell_the_label(tasks, name, split):
    """A linear reader of words and their pairs: chance 33.3, 18.1 and 25 %, within three standard errors."""
    torch.manual_seed(0)
    task, choices = tasks[name], name == "world_choice"
    sets = [task.splits[part] for part in ("train", split)]
    texts = [[f"{e.text} {c}" for e in of for c in e.choices] if choices else [e.text for e in of] for of in sets]
    x = [of.unflatten(0, (-1, 4)) if choices else of for of in bags(*texts)]
    labels = [torch.tensor([e.target for e in of]) for of in sets]
    n, chance = len(labels[1]), (task.chance["answer"] if choices else task.chance["accuracy"]) / 100
    found = read_only(*zip(x, labels, strict=True), choices)
    print(f"{name}, {split}: {100 * found:.1f} % from {n} texts alone, chance {100 * chance:.1f} %")
    assert found < chance + 3 * (chance * (1 - chance) / n) ** 0.5
