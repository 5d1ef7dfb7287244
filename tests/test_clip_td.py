"""CLIP-TD's mathematics in float64: alignment, selection, confidence, the task's loss, the whole objective."""

import math
import random
from types import SimpleNamespace

import pytest
import tiny
import torch

from fastsds.config import ConfigError
from fastsds.crossmodal import CrossModalOutput, load_crossmodal
from fastsds.data.tasks import Example
from fastsds.recipes import clip_td
from fastsds.recipes.clip_td import CLIPTD, Projected, TeacherTargets, add_projections

F64 = torch.float64


def rand(*shape, seed=0, dtype=F64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def spans(draw, length, tokens):
    """Some stretches of a text, special tokens among them."""
    found = []
    for _ in range(tokens):
        a, b = sorted(draw.randint(0, length) for _ in range(2))
        found.append(None if a == b or draw.random() < 0.2 else (a, b))
    return found


# alignment


def test_text_is_the_mean_weighted_by_shared_characters():
    draw = random.Random(3)
    student = [spans(draw, 20, draw.randint(1, 7)) for _ in range(30)]
    teacher = [spans(draw, 20, draw.randint(1, 9)) for _ in range(30)]
    features = rand(30, 12, 5)  # CLIP pads beyond its last span
    found, said = clip_td.align_text(student, teacher, features)
    assert found.shape == (30, max(map(len, student)), 5) and said.shape == found.shape[:2] and said.dtype == torch.bool
    for b, own in enumerate(student):
        for j in range(found.shape[1]):
            at = own[j] if j < len(own) else None
            shared = [len(set(range(*(at or (0, 0)))) & set(range(*(t or (0, 0))))) for t in teacher[b]]
            assert said[b, j] == (sum(shared) > 0)
            expected = sum((n * features[b, k] for k, n in enumerate(shared)), torch.zeros(5, dtype=F64)) / max(1, sum(shared))
            torch.testing.assert_close(found[b, j], expected, rtol=1e-12, atol=1e-12)


def test_equal_tokens_keep_their_features():
    own = [[None, (0, 1), (2, 5), None]]
    features = rand(1, 4, 3)
    found, said = clip_td.align_text(own, own, features)
    assert said.tolist() == [[False, True, True, False]] and torch.equal(found[0, 1:3], features[0, 1:3])


def bilinear(picture, rows, columns):
    """At the centres of rows x columns cells of the same square, clamped at the edge; by hand."""
    height, width, out = len(picture), len(picture[0]), []
    for r in range(rows):
        for c in range(columns):
            y = min(max((r + 0.5) * height / rows - 0.5, 0), height - 1)
            x = min(max((c + 0.5) * width / columns - 0.5, 0), width - 1)
            y0, x0 = min(int(y), height - 1), min(int(x), width - 1)
            y1, x1 = min(y0 + 1, height - 1), min(x0 + 1, width - 1)
            v, u = y - y0, x - x0
            top = (1 - u) * picture[y0][x0] + u * picture[y0][x1]
            out.append((1 - v) * top + v * ((1 - u) * picture[y1][x0] + u * picture[y1][x1]))
    return out


GRIDS = [((2, 2), (4, 4)), ((7, 7), (12, 12)), ((3, 5), (4, 2)), ((4, 4), (1, 1)), ((1, 1), (3, 3))]


@pytest.mark.parametrize(("grid", "to"), GRIDS)
def test_patches_are_resampled_at_the_students_centres(grid, to):
    features = rand(2, math.prod(grid), 3)
    found = clip_td.align_patches(features, grid, to)
    assert found.shape == (2, math.prod(to), 3)
    for b in range(2):
        for d in range(3):
            expected = bilinear(features[b, :, d].unflatten(0, grid).tolist(), *to)
            torch.testing.assert_close(found[b, :, d], torch.tensor(expected, dtype=F64), rtol=1e-12, atol=1e-12)
    constant = clip_td.align_patches(torch.full((1, math.prod(grid), 1), 3.7, dtype=F64), grid, to)
    torch.testing.assert_close(constant, torch.full_like(constant, 3.7), rtol=1e-14, atol=0)
    assert clip_td.align_patches(features, grid, grid) is features


# selection


def brute_choice(relevance, there, k, mass, scale):
    """Sort what is there by relevance, then by place; take k, or as few as reach the share."""
    ranked = sorted((place for place in range(len(there)) if there[place]), key=lambda place: (-relevance[place], place))
    if k is not None:
        return ranked[:k]
    if mass is None:
        return sorted(ranked)
    top = max((relevance[p] for p in ranked), default=0.0)
    total, have, taken = sum(math.exp(scale * (relevance[p] - top)) for p in ranked), 0.0, []
    for place in ranked:
        taken.append(place)
        have += math.exp(scale * (relevance[place] - top)) / total
        if have >= mass - 1e-9:
            break
    return taken


@pytest.mark.parametrize("how", [{}, {"k": 1}, {"k": 3}, {"mass": 0.01}, {"mass": 0.5}, {"mass": 0.9}, {"mass": 1.0}])
@pytest.mark.parametrize("scale", [1.0, 20.0])
def test_selection_is_a_brute_force_choice(how, scale):
    draw = torch.Generator().manual_seed(5)
    for n in (3, 8, 17):
        relevance = torch.randint(-3, 4, (40, n), generator=draw).double() / 4  # many ties
        there = torch.rand(40, n, generator=draw) < 0.7
        there[:, :3] = True  # k can be had
        if "k" not in how:
            there[0] = False
        found = clip_td.choose(relevance, there, [f"row {b}" for b in range(40)], scale=scale, **how)
        assert found.dtype == torch.int64
        for b in range(40):
            expected = brute_choice(relevance[b].tolist(), there[b].tolist(), how.get("k"), how.get("mass"), scale)
            assert found[b].tolist() == expected + [-1] * (found.shape[1] - len(expected)), (b, how)


def test_more_than_there_are_is_one_error_that_names_the_row():
    there = torch.tensor([[True] * 4, [True, True, False, False], [False] * 4])
    with pytest.raises(ConfigError, match="^pair 7, text: k is 3, but 2 of its tokens can be chosen; expected a lower k$"):
        clip_td.choose(torch.zeros(3, 4), there, ["pair 3, text", "pair 7, text", "pair 9, text"], k=3)


def test_relevance_is_the_cosine():
    x, of = rand(4, 6, 5), rand(4, 5, seed=1)
    expected = [[float(t @ o / (t.norm() * o.norm())) for t in row] for row, o in zip(x, of, strict=True)]
    torch.testing.assert_close(clip_td.relevance(x, of), torch.tensor(expected, dtype=F64), rtol=1e-12, atol=1e-12)


def test_targets_have_unit_mean_square():
    x = clip_td.unit_mean_square(rand(4, 6, 7))
    torch.testing.assert_close(x.square().mean(-1), torch.ones(4, 6, dtype=F64))


# the task


def example(target, choices=(), text="what is left", name="e"):
    return Example(name, None, text, choices, target, {})


def test_what_the_student_reads():
    assert clip_td.reads(example(1)) == ("what is left",)
    assert clip_td.reads(example(1, ("a ring", "a cross"))) == ("what is left a ring", "what is left a cross")


def test_labels():
    assert clip_td.labels_of([example(2), example(0)], 3).tolist() == [2, 0]
    scores = clip_td.labels_of([example({1: 0.3, 4: 1.0}), example({})], 5)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, torch.tensor([[0, 0.3, 0, 0, 1.0], [0.0] * 5]))


def test_task_loss_of_one_answer_and_of_scores():
    logits = rand(4, 5) * 3
    labels = torch.tensor([0, 4, 2, 2])
    expected = sum(-z[y] + math.log(sum(math.exp(v) for v in z)) for z, y in zip(logits.tolist(), labels.tolist())) / 4
    assert float(clip_td.task_loss(logits, labels)) == pytest.approx(expected, rel=1e-12)
    scores = torch.rand(4, 5, generator=torch.Generator().manual_seed(1), dtype=F64)
    total = 0.0
    for z, s in zip(logits.flatten().tolist(), scores.flatten().tolist(), strict=True):
        p = 1 / (1 + math.exp(-z))
        total -= s * math.log(p) + (1 - s) * math.log(1 - p)
    assert float(clip_td.task_loss(logits, scores)) == pytest.approx(total / 4, rel=1e-12)


def test_probability_of_the_true_answer():
    logits = (rand(4, 5) * 3).requires_grad_()
    p = logits.softmax(1)
    found = clip_td.answer_probability(logits, torch.tensor([0, 4, 2, 2]))
    torch.testing.assert_close(found, p[range(4), [0, 4, 2, 2]].detach())
    scores = torch.ones(4, 5)
    whole = clip_td.answer_probability(logits, scores)
    assert not found.requires_grad and not whole.requires_grad and (whole <= 1).all() and (whole > 1 - 1e-6).all()


@pytest.mark.parametrize("dtype", [F64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", clip_td.WEIGHTS)
def test_confidence_is_bounded_and_a_constant(kind, dtype):
    edges = torch.tensor([0.0, 1e-40, 1e-20, 1e-3, 0.5, 1.0], dtype=dtype)
    teacher, student = (x.flatten().requires_grad_() for x in torch.meshgrid(edges, edges, indexing="ij"))
    w = clip_td.confidence(kind, teacher, student)
    assert not w.requires_grad and w.isfinite().all() and (0 <= w).all() and (w <= 1).all()
    if kind == "none":
        assert (w == 1).all()
    elif kind == "teacher":
        assert torch.equal(w, teacher.detach())
    else:
        both = (teacher == student) & (teacher >= 1e-20)
        assert (w[both] == 0.5).all() and (w[teacher == 0] == 0).all()
        expected = (teacher.double() / (teacher.double() + student.double()))[teacher + student >= 1e-20].detach()
        torch.testing.assert_close(w[teacher + student >= 1e-20].double(), expected, rtol=3 * torch.finfo(dtype).eps, atol=0)


# the objective


def targets(b=5, k=3, d=4, lt=6, lv=9, seed=0, dtype=F64):
    draw = torch.Generator().manual_seed(seed)
    index = [torch.stack([torch.randperm(n, generator=draw)[:k] for _ in range(b)]) for n in (lt, lv)]
    index[0][0, 1:] = -1  # only one word
    index[1][1] = -1  # nothing at all
    text, visual = (rand(b, k, d, seed=seed + s, dtype=dtype) for s in (1, 2))
    p = torch.rand(b, generator=draw, dtype=dtype)
    return TeacherTargets(text, index[0], visual, index[1], p, torch.tensor([[lt, lv]] * b))


def output(b=5, d=4, lt=6, lv=9, classes=3, seed=3, dtype=F64):
    shapes = (b, lt, d), (b, lv, d), (b, 8), (b, classes)
    return Projected(*(rand(*shape, seed=seed + k, dtype=dtype).requires_grad_() for k, shape in enumerate(shapes)))


def loss(objective, out, labels, told=None):
    return objective(out, SimpleNamespace(labels=labels, targets=told))


DISTANCES = {
    "l1": lambda s, t: sum(abs(a - b) for a, b in zip(s, t, strict=True)) / len(s),
    "l2": lambda s, t: sum((a - b) ** 2 for a, b in zip(s, t, strict=True)) / len(s),
    "cosine": lambda s, t: 1 - sum(a * b for a, b in zip(s, t)) / math.sqrt(sum(a * a for a in s) * sum(b * b for b in t)),
}


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("weight", clip_td.WEIGHTS)
def test_the_whole_loss_is_the_formula(distance, weight):
    out, told, labels, beta = output(), targets(), torch.tensor([0, 2, 1, 1, 0]), 0.7
    found = loss(CLIPTD(beta, weight, distance), out, labels, told)
    task, sides = 0.0, {"text": 0.0, "visual": 0.0}
    for b, y in enumerate(labels.tolist()):
        z = out.logits[b].tolist()
        p = math.exp(z[y]) / sum(map(math.exp, z))
        task -= math.log(p) / 5
        p_t = float(told.probability[b])
        w = {"none": 1.0, "teacher": p_t, "relative": p_t / (p_t + p)}[weight]
        for side, index in (("text", told.text_index), ("visual", told.visual_index)):
            chosen = [(place, k) for k, place in enumerate(index[b].tolist()) if place >= 0]
            for place, k in chosen:
                d = DISTANCES[distance](getattr(out, side)[b, place].tolist(), getattr(told, side)[b, k].tolist())
                sides[side] += w * d / len(chosen) / 5
    assert float(found["task"]) == pytest.approx(task, rel=1e-9)
    assert {side: float(found[side]) for side in sides} == pytest.approx(sides, rel=1e-9)
    assert float(found["loss"].detach()) == pytest.approx(task + beta * sum(sides.values()), rel=1e-9)
    assert found["share_text"] == pytest.approx((4 * 3 + 1) / 6 / 5) and found["share_visual"] == pytest.approx(4 * 3 / 9 / 5)


def test_the_whole_loss_of_scores_is_the_formula():
    """Where answers have scores p is their mean over the student's softmax, and the task's loss binary."""
    out, told, beta = output(), targets(), 0.7
    scores = torch.tensor([[1.0, 0.3, 0], [0, 0, 0], [1, 1, 1], [0, 0.9, 0.6], [0.3, 0, 0]])
    found = loss(CLIPTD(beta, "relative", "l1"), out, scores, told)
    task, pull = 0.0, 0.0
    for b, row in enumerate(scores.double().tolist()):
        z = out.logits[b].tolist()
        task += sum(math.log1p(math.exp(v)) - s * v for v, s in zip(z, row, strict=True)) / 5
        p = sum(math.exp(v) * s for v, s in zip(z, row, strict=True)) / sum(map(math.exp, z))
        p_t = float(told.probability[b])
        for side, index in (("text", told.text_index), ("visual", told.visual_index)):
            chosen = [(place, k) for k, place in enumerate(index[b].tolist()) if place >= 0]
            for place, k in chosen:
                d = DISTANCES["l1"](getattr(out, side)[b, place].tolist(), getattr(told, side)[b, k].tolist())
                pull += p_t / (p_t + p) * d / len(chosen) / 5
    assert float(found["loss"].detach()) == pytest.approx(task + beta * pull, rel=1e-9)


@pytest.mark.parametrize("distance", DISTANCES)
def test_gradients_reach_the_student_alone(distance):
    """Of the chosen tokens and the logits, by finite differences; w, from the student's own logits, carries none."""
    told = TeacherTargets(*(x.requires_grad_() if x.is_floating_point() else x for x in targets()))
    out, labels, objective = output(), torch.tensor([0, 2, 1, 1, 0]), CLIPTD(0.7, "relative", distance)
    loss(objective, out, labels, told)["loss"].backward()
    assert told.text.grad is None and told.visual.grad is None and told.probability.grad is None and out.pooled.grad is None
    untouched = torch.ones(5, 6, dtype=torch.bool)
    for b, row in enumerate(told.text_index.tolist()):
        untouched[b, [place for place in row if place >= 0]] = False
    assert not out.text.grad[untouched].any() and out.text.grad[~untouched].abs().sum(-1).gt(0).all()
    task_alone = output()
    clip_td.task_loss(task_alone.logits, labels).backward()
    torch.testing.assert_close(out.logits.grad, task_alone.logits.grad)  # nothing comes through w
    step = 1e-6
    for side in ("text", "visual"):
        for place in [(0, int(told.text_index[0, 0]), 1), (2, int(told.visual_index[2, 0]), 3)]:
            place = (place[0], min(place[1], getattr(out, side).shape[1] - 1), place[2])
            values = []
            for sign in (1, -1):
                moved = {name: getattr(out, name).detach().clone() for name in out._fields}
                moved[side][place] += sign * step
                values.append(float(loss(objective, Projected(**moved), labels, told)["loss"]))
            assert (values[0] - values[1]) / (2 * step) == pytest.approx(float(getattr(out, side).grad[place]), abs=1e-7)


def test_halves_of_a_batch_average_to_the_whole():
    """What two ranks do, each with half."""
    out, told, labels, objective = output(b=6), targets(b=6), torch.tensor([0, 2, 1, 1, 0, 2]), CLIPTD(0.7)
    whole = loss(objective, out, labels, told)
    parts = []
    for rows in (slice(0, 3), slice(3, 6)):
        half = Projected(*(x[rows] for x in out))
        parts.append(loss(objective, half, labels[rows], TeacherTargets(*(x[rows] for x in told))))
    for key in whole:
        torch.testing.assert_close(sum(part[key] for part in parts) / 2, whole[key], msg=lambda text, key=key: f"{key}: {text}")


def test_beta_0_asks_no_teacher():
    out = CrossModalOutput(*output())
    found = loss(CLIPTD(0.0), out, torch.tensor([0, 2, 1, 1, 0]))
    assert set(found) == {"loss", "task", "p_student"} and found["loss"] == found["task"]
    for wrong in ((out, targets()), (output(), None)):
        with pytest.raises(ValueError, match="expected targets, and a training student with projections"):
            loss(CLIPTD(0.5), wrong[0], torch.tensor([0, 2, 1, 1, 0]), wrong[1])


@pytest.mark.parametrize(("how", "says"), [
    ((-1.0,), "beta: -1.0, expected a number of at least 0"), ((math.nan,), "beta: nan"),
    ((1.0, "most"), "weight: 'most', expected none, teacher, relative"), ((1.0, "none", "l3"), "distance: 'l3', expected"),
])  # fmt: skip
def test_settings_are_checked(how, says):
    with pytest.raises(ConfigError) as error:
        CLIPTD(*how)
    assert says in str(error.value)
    assert CLIPTD(1.0).state_dict() == {}


@pytest.mark.parametrize("pooled", [False, True])
def test_projections_train_with_the_student_and_rest_at_inference(pooled, tmp_path):
    student = load_crossmodal(tiny.save_vilt(tmp_path / "vilt"), classes=3)
    add_projections(student, 5, pooled, seed=3)
    pixels, tokens = tiny.pixels(2, student.image_size), student.tokenize(["a red ring", "a cross"])
    out = student.train()(pixels, tokens)
    plain = student.eval()(pixels, tokens)
    assert type(out) is Projected and type(plain) is CrossModalOutput and torch.equal(out.logits, plain.logits)
    for name, x in (("text", plain.text), ("visual", plain.visual)):
        x = plain.pooled[:, None] if pooled else x
        linear = student.projections[name]
        torch.testing.assert_close(getattr(out, name), x @ linear.weight.T + linear.bias)
    again = load_crossmodal(tmp_path / "vilt", classes=3)
    add_projections(again, 5, pooled, seed=3)
    assert torch.equal(again.projections["text"].weight, student.projections["text"].weight)
    assert not torch.equal(student.projections["visual"].weight, student.projections["text"].weight)
