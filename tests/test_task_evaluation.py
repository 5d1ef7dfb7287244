"""A cross-modal student asked a task: metrics against an independent count, any batch, any number of ranks."""

import json
import sys

import pytest
import tiny
import torch

from fastsds.config import ConfigError
from fastsds.crossmodal import load_crossmodal
from fastsds.data.tasks import load_task
from fastsds.evaluation.compare import difference
from fastsds.evaluation.results import load_result
from fastsds.evaluation.tasks import evaluate_task, first_units, measures_of
from fastsds.recipes.clip_td import reads

SIZES = {"train": 4, "dev": 37, "test": 30, "dev_shift": 4, "shift": 21}
WORLD = ("world_entailment", "world_questions", "world_choice")
SPLITS = ("dev", "shift")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.save_vilt(tmp_path_factory.mktemp("vilt"))


def asked(folder, name, seed=0):
    task = load_task(name, sizes=SIZES)
    return load_crossmodal(folder, classes=len(task.classes), seed=seed).eval(), task


@pytest.mark.parametrize("name", WORLD)
def test_metrics_are_an_independent_count_of_the_students_answers(folder, name, tmp_path):
    student, task = asked(folder, name)
    found = evaluate_task(student, task, SPLITS, batch=7)
    for split in SPLITS:
        right, parts, groups = [], {}, {}
        for example in task.splits[split]:
            pixels = task.source([example]).load_rows(torch.tensor([0]), student.image_size).pixels
            said = [reads(example)] if example.choices else list(reads(example))
            answer = int(student(pixels, student.tokenize(said)).logits[0].argmax())
            right.append(answer == example.target)
            parts.setdefault(example.about.get("question", example.id), {})[example.about.get("part")] = right[-1]
            for key in task.by:
                if key in example.about:
                    groups.setdefault(f"{key}={example.about[key]}", []).append(right[-1])
        if name == "world_choice":
            expected = {part: [of[part] for of in parts.values()] for part in ("answer", "rationale")}
            expected["both"] = [all(of.values()) for of in parts.values()]
        else:
            expected = {"accuracy": right, **{f"accuracy/{group}": of for group, of in groups.items()}}
        for metric, values in expected.items():
            assert found.metrics[f"{split}/{metric}"] == pytest.approx(100 * sum(values) / len(values), abs=1e-9), metric
        rows = [row["predicted"] for row in found.rows if row["about"]["split"] == split]
        own = task.metrics(task.outcomes(task.splits[split], [p for row in rows for p in row]))
        assert {f"{split}/{key}": pytest.approx(value) for key, value in own.items()}.items() <= found.metrics.items()
    found.save(tmp_path / "kept")
    again = load_result(tmp_path / "kept")
    assert again.metrics == found.metrics and again.headline == found.headline and again.rows == found.rows
    measures, headline = measures_of(task, SPLITS)
    assert set(measures) == set(found.metrics) and tuple(headline) == found.headline


@pytest.mark.parametrize("name", WORLD)
def test_whatever_the_batch(folder, name):
    student, task = asked(folder, name)
    one, many = (evaluate_task(student, task, ("dev",), batch=batch) for batch in (5, 64))
    assert one.rows == many.rows


def test_the_first_units_have_all_their_parts(folder):
    student, task = asked(folder, "world_choice")
    found = evaluate_task(student, task, ("dev",), examples=5)
    assert [row["id"] for row in found.rows] == [f"world_choice/dev/{k}" for k in range(5)]
    assert all(len(row["predicted"]) == 2 for row in found.rows) and len(first_units(task, "dev", 5)) == 10
    assert len(first_units(task, "dev", None)) == 74


def vqa(folder, n=5):
    """VQA v2 as it is released; ten people give as many of two answers as the question's number says."""
    from PIL import Image

    for first, sub in ((0, "train2014"), (100, "val2014")):
        questions, answers = [], []
        for k in range(n):
            (folder / sub).mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (20, 14), (40 * k, 10, 200)).save(folder / sub / f"COCO_{sub}_{k:012d}.jpg")
            own = {"question_id": first + k, "image_id": k}
            questions.append({**own, "question": f"what is {k}?"})
            said = [{"answer": "red" if j < k else "blue", "answer_id": j + 1} for j in range(10)]
            kind = {"question_type": "what is", "answer_type": "other", "multiple_choice_answer": "blue"}
            answers.append({**own, **kind, "answers": said})
        file = f"v2_OpenEnded_mscoco_{sub}_questions.json", f"v2_mscoco_{sub}_annotations.json"
        (folder / file[0]).write_text(json.dumps({"questions": questions}))
        (folder / file[1]).write_text(json.dumps({"annotations": answers}))
    (folder / "answers.txt").write_text("red\nblue\n")
    return load_task("vqa_v2", folder, answers=folder / "answers.txt")


def test_vqas_scores_are_soft(folder, tmp_path):
    task = vqa(tmp_path)
    student = load_crossmodal(folder, classes=2).eval()
    with torch.no_grad():  # it says "red" of everything
        student.head[-1].weight.zero_()
        student.head[-1].bias.copy_(torch.tensor([1.0, 0.0]))
    found = evaluate_task(student, task, ("val",))
    said = [[j < k for j in range(10)] for k in range(5)]  # VQA's rule over leave-one-out subsets of the ten
    rule = [sum(min(1, (sum(of) - of[j]) / 3) for j in range(10)) / 10 for of in said]
    assert found.metrics["val/accuracy"] == pytest.approx(100 * sum(rule) / 5)


def test_two_students_are_compared_on_the_same_units(folder):
    student, task = asked(folder, "world_entailment")
    other, _ = asked(folder, "world_entailment", seed=3)
    a, b = (evaluate_task(of, task, SPLITS) for of in (student, other))
    assert a.about["fingerprint"] == b.about["fingerprint"]
    assert a.about["fingerprint"] != evaluate_task(student, task, ("dev",)).about["fingerprint"]
    for metric in ("dev/accuracy", "shift/accuracy"):
        d = difference([a.outcomes["accuracy"]], [b.outcomes["accuracy"]], a.measures[metric])
        assert d.points == pytest.approx(a.metrics[metric] - b.metrics[metric])


def test_bad_input_is_one_error_that_names_it(folder, tmp_path):
    student, task = asked(folder, "world_entailment")
    with pytest.raises(ConfigError, match="split 'val', expected some of train, dev, test, dev_shift, shift"):
        evaluate_task(student, task, ("val",))
    task = vqa(tmp_path)
    (tmp_path / "val2014" / "COCO_val2014_000000000003.jpg").write_bytes(b"none")
    with pytest.raises(ConfigError, match="task vqa_v2, val: 103: "):
        evaluate_task(load_crossmodal(folder, classes=2).eval(), task, ("val",))


RANKS = """
import json, sys
import torch
sys.path.insert(0, sys.argv[1])
import test_task_evaluation as tests
rank = int(sys.argv[4])
torch.distributed.init_process_group("gloo", init_method=f"file://{sys.argv[3]}/store", rank=rank, world_size=2)
student, task = tests.asked(sys.argv[2], "world_choice")
found = tests.evaluate_task(student, task, tests.SPLITS, batch=16)
if rank == 1:
    open(f"{sys.argv[3]}/rows.json", "w").write(json.dumps(found.rows))
torch.distributed.barrier()
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_two_ranks_are_one(folder, tmp_path, root):
    """5 and 3 batches: one rank repeats its last."""
    import os
    import subprocess

    student, task = asked(folder, "world_choice")
    words = [sys.executable, "-c", RANKS, str(root / "tests"), str(folder), str(tmp_path)]
    env = {**os.environ, "PYTHONPATH": str(root)}
    both = [subprocess.Popen([*words, str(rank)], cwd=root, env=env) for rank in (0, 1)]
    assert [process.wait(120) for process in both] == [0, 0]
    assert json.loads((tmp_path / "rows.json").read_text()) == json.loads(json.dumps(evaluate_task(student, task, SPLITS).rows))
