"""Where h_w starts: warm-up, and least squares that can be stopped, gone on with and trusted."""

import dataclasses

import numpy as np
import pytest
import runs
import tiny
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from fastsds.config import ConfigError, load_recipe
from fastsds.data import Batch
from fastsds.recipes import head as heads
from fastsds.recipes.head import forget_sums, images_asked, init_head
from fastsds.recipes.least_squares import Singular, Sums
from fastsds.recipes.sds_clip import teacher_pixels
from fastsds.student import LatentHead, apply_tuning, load_student
from fastsds.teacher import Teacher

D, OUTPUTS = 12, 64  # of tiny's student and teacher


class Source:
    """So many samples of tiny's pictures."""

    def __init__(self, n: int, name: str = "tiny"):
        self.n, self.name = n, name

    def __len__(self) -> int:
        return self.n

    def identity(self) -> str:
        return self.name


class Stream:
    """The batches of one sequence; `asked` says which were loaded, by their first sample, `stop` which one is not reached."""

    def __init__(self, size: int = 8, stop: int | None = None):
        self.size, self.stop, self.asked = size, stop, []

    def __call__(self, first: int, cursors):
        assert first == 0 or cursors.tolist() == [first]
        while first != self.stop:
            self.asked.append(first)
            yield self.batch(first), torch.tensor([first + self.size])
            first += self.size
        raise KeyboardInterrupt

    def batch(self, first: int) -> Batch:
        ids = torch.arange(first, first + self.size)
        pixels = torch.cat([tiny.pixels(1, seed=int(i)) for i in ids])
        return Batch(ids=ids, visits=torch.zeros_like(ids), pixels=pixels, captions=tiny.captions(self.size, seed=first))


def always(batch: Batch):
    return lambda first, cursors: iter(lambda: (batch, torch.tensor([0])), None)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    path = tmp_path_factory.mktemp("models")
    return {"teacher": tiny.save_teacher(path / "teacher"), "student": tiny.save_student(path / "student")}


@pytest.fixture(scope="module")
def teacher(folders):
    return Teacher.load(folders["teacher"])


@pytest.fixture
def new_student(folders):
    return lambda: load_student(folders["student"], latent_shape=tiny.LATENT)


@pytest.fixture
def recipe(folders, tmp_path):
    def make(*sets: str, batch: int = 8):
        paths = (f"teacher.path={folders['teacher']}", f"output={tmp_path / 'run'}", f"data.batch={batch}")
        return load_recipe(None, ["head.init=ridge", "head.samples=40", *paths, *sets])

    return make


def weights(student) -> list[torch.Tensor]:
    return [p.detach().clone() for p in student.head.parameters()]


def solved(new_student, teacher, recipe, stream=None, n: int = 1000, **more):
    """(head's weights, what init_head said) of a fresh student."""
    student = new_student()
    found = init_head(student, teacher, stream or Stream(recipe.data.batch), recipe, Source(n), **more)
    return weights(student), found


def features(student, teacher, first: int, last: int):
    """x [n, d] and y [n, CHW] of samples, as float64 of what the same batches of 8 give in fp32."""
    parts = [Stream().batch(first).pixels for first in range(0, last, 8)]
    with torch.no_grad():
        x = torch.cat([LatentHead.features(student(pixels).image_raw.double()) for pixels in parts])
    y = torch.cat([teacher.encode(pixels).double().flatten(1) for pixels in parts])
    return x[first:last].numpy(), y[first:last].numpy()


def r2(y: np.ndarray, fit: np.ndarray) -> float:
    return 1 - ((y - fit) ** 2).sum() / ((y - y.mean(axis=0)) ** 2).sum()


# least squares


@pytest.mark.parametrize("ridge", [0.0, 0.05])
def test_ridge_is_least_squares_in_float64(new_student, teacher, recipe, ridge):
    """Against lstsq of the stacked system, which squares no condition number; the third batch is cut."""
    student = new_student()
    samples, held = 20, 2
    found = init_head(student, teacher, Stream(), recipe(f"head.ridge={ridge}", "head.samples=20"), Source(1000))
    x, y = features(student, teacher, 0, samples)
    ones = np.ones((samples, 1))
    below = np.hstack([np.sqrt(samples * ridge) * np.eye(D), np.zeros((D, 1))])
    system, right = np.vstack([np.hstack([x, ones]), below]), np.vstack([y, np.zeros((D, OUTPUTS))])
    solution = np.linalg.lstsq(system, right, rcond=None)[0]
    np.testing.assert_allclose(student.head.linear.weight.detach().numpy(), solution[:-1].T, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(student.head.linear.bias.detach().numpy(), solution[-1], rtol=1e-5, atol=1e-6)
    assert found["r2"] == pytest.approx(r2(y, x @ solution[:-1] + solution[-1]), abs=1e-9) and 0.1 < found["r2"] < 1
    x, y = features(student, teacher, samples, samples + held)
    assert found["r2_held_out"] == pytest.approx(r2(y, x @ solution[:-1] + solution[-1]), abs=1e-9)
    assert (found["samples"], found["held_out"]) == (samples, held)


def test_sums_against_lstsq_and_a_known_answer():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(50, 7, generator=generator, dtype=torch.float64) * torch.logspace(-1, 1, 7, dtype=torch.float64)
    wanted = torch.randn(8, 3, generator=generator, dtype=torch.float64)
    exact = x @ wanted[:-1] + wanted[-1]
    noisy = exact + 0.3 * torch.randn(50, 3, generator=generator, dtype=torch.float64)
    for y in (exact, noisy):
        sums = Sums(7, 3)
        for rows in (slice(0, 11), slice(11, 11), slice(11, 50)):
            sums.add(x[rows], y[rows])
        solution, design = sums.solve(0.0), np.hstack([x.numpy(), np.ones((50, 1))])
        expected = np.linalg.lstsq(design, y.numpy(), rcond=None)[0]
        np.testing.assert_allclose(solution.numpy(), expected, rtol=1e-9, atol=1e-9)
        assert sums.count == 50
        assert sums.r2(solution) == pytest.approx(r2(y.numpy(), design @ expected), abs=1e-12)
        assert sums.r2(torch.zeros_like(solution)) < 0  # worse than the mean
        mean = torch.cat([torch.zeros(7, 3, dtype=torch.float64), y.mean(0, keepdim=True)])
        assert sums.r2(mean) == pytest.approx(0.0, abs=1e-12)


def test_ridge_has_the_unit_that_its_page_says(new_student, teacher):
    """The features' second moments have mean eigenvalue 1, and a direction whose eigenvalue is `ridge` is halved."""
    x, _ = features(new_student(), teacher, 0, 30)
    assert np.linalg.eigvalsh(x.T @ x / 30).mean() == pytest.approx(1.0, abs=1e-6)
    x, y, sums = torch.tensor([[2.0], [-2.0]]), torch.tensor([[6.0], [-6.0]]), Sums(1, 1)  # slope 3, second moment 4
    sums.add(x, y)
    torch.testing.assert_close(sums.solve(4.0), torch.tensor([[1.5], [0.0]], dtype=torch.float64))


def test_too_few_images_are_seen_on_those_held_out(new_student, teacher, recipe, capfd):
    """N at d: its own R^2 says nothing."""
    _, few = solved(new_student, teacher, recipe("head.samples=16", "head.ridge=1e-9"))
    assert "worse than the mean latent" in capfd.readouterr().err
    _, many = solved(new_student, teacher, recipe("head.samples=320", "head.ridge=1e-9"))
    assert few["r2"] > many["r2"] > many["r2_held_out"] > few["r2_held_out"] and few["r2_held_out"] < 0
    assert "R^2" in capfd.readouterr().err


@pytest.mark.parametrize("samples, available, fit, held", [(40, 1000, 40, 5), (40, 45, 40, 5), (40, 18, 16, 2), (40, 8, 8, 0)])
def test_few_data_are_shared_out(new_student, teacher, recipe, samples, available, fit, held):
    """The images that judge come after the others, never from a second visit."""
    stream, made = Stream(), recipe(f"head.samples={samples}")
    _, found = solved(new_student, teacher, made, stream, n=available)
    assert (found["samples"], found.get("held_out", 0)) == (fit, held) and ("r2_held_out" in found) == (held > 1)
    assert stream.asked == list(range(0, fit + held, 8)) and images_asked(made, available) == fit + held


def test_a_system_without_one_solution_is_refused(new_student, teacher, recipe):
    stream = Stream()
    message = "head.ridge is 0: 12 images do not determine h_w, whose input has 12 dimensions; expected .* head.samples"
    with pytest.raises(ConfigError, match=message):
        solved(new_student, teacher, recipe("head.ridge=0", "head.samples=12"), stream)
    assert not stream.asked  # said before anything is asked
    same = always(dataclasses.replace(Stream().batch(0), pixels=tiny.pixels(1).expand(8, -1, -1, -1)))
    student = new_student()
    before = weights(student)
    with pytest.raises(ConfigError, match="40 images do not determine h_w"):
        init_head(student, teacher, same, recipe("head.ridge=0"), Source(1000))
    assert all(map(torch.equal, before, weights(student)))
    sums = Sums(2, 1)
    sums.add(torch.tensor([[1.0, 2.0], [2.0, 4.0], [3.0, 6.0]]), torch.ones(3, 1))
    with pytest.raises(Singular):
        sums.solve(0.0)


def test_given_latents_take_the_place_of_the_vae(new_student, teacher, recipe):
    """What a bank's cache does: no VAE is needed, and fp16 latents give what they say."""
    made = recipe()
    ours, said = solved(new_student, teacher, made)
    forget_sums(made.output)
    without = Teacher.load(made.teacher.path, parts=("text",))
    given, again = solved(new_student, without, made, latents=lambda batch: teacher.encode(teacher_pixels(batch)))
    assert all(map(torch.equal, ours, given)) and said == again
    half, _ = solved(new_student, None, made, latents=lambda batch: teacher.encode(teacher_pixels(batch)).half())
    assert all(map(torch.equal, half, given))  # the kept sums are of given latents: taken up
    forget_sums(made.output)
    half, _ = solved(new_student, None, made, latents=lambda batch: teacher.encode(teacher_pixels(batch)).half())
    torch.testing.assert_close(half, given, rtol=1e-2, atol=1e-2)
    assert not all(map(torch.equal, half, given))


# the order of summation


def test_the_cut_into_batches_changes_rounding_alone(new_student, teacher, recipe):
    whole = {}
    for batch in (8, 5, 45):
        made = recipe(batch=batch)
        whole[batch] = solved(new_student, teacher, made)
        forget_sums(made.output)
    for batch in (5, 45):
        torch.testing.assert_close(whole[batch][0], whole[8][0], rtol=1e-4, atol=1e-5)
        assert whole[batch][1] == pytest.approx(whole[8][1], rel=1e-4)


@pytest.mark.parametrize("stop", [8, 24, 40])
@pytest.mark.parametrize("save_every", [0.0, 1e9])
def test_interrupted_and_resumed_is_uninterrupted_bit_for_bit(new_student, teacher, recipe, monkeypatch, stop, save_every):
    monkeypatch.setattr(heads, "SAVE_EVERY", save_every)
    made = recipe()
    expected = solved(new_student, teacher, made)
    forget_sums(made.output)
    with pytest.raises(KeyboardInterrupt):
        solved(new_student, teacher, made, Stream(stop=stop))
    resumed = Stream()
    again = solved(new_student, teacher, made, resumed)
    assert resumed.asked == list(range(0 if save_every else stop, 48, 8))
    assert all(map(torch.equal, expected[0], again[0])) and expected[1] == again[1]


def test_another_batch_size_goes_on_at_the_same_sample(new_student, teacher, recipe, monkeypatch):
    monkeypatch.setattr(heads, "SAVE_EVERY", 0.0)
    expected = solved(new_student, teacher, recipe())
    forget_sums(recipe().output)
    with pytest.raises(KeyboardInterrupt):
        solved(new_student, teacher, recipe(), Stream(stop=16))
    stream = Stream(12)
    again = solved(new_student, teacher, recipe(batch=12), stream)
    assert stream.asked == [16, 28, 40]
    torch.testing.assert_close(again[0], expected[0], rtol=1e-4, atol=1e-5)


def test_two_ranks_end_alike_wherever_they_took_up(new_student, teacher, recipe, monkeypatch, capfd):
    """Rank 0 writes and prints; rank 1 finds what rank 0 left at any moment, and neither changes a bit."""
    monkeypatch.setattr(heads, "SAVE_EVERY", 0.0)
    made = recipe()
    alone, _ = solved(new_student, teacher, made, rank=1)
    path = runs.Path(made.output) / "head" / "sums.safetensors"
    assert not path.exists() and not capfd.readouterr().err
    with pytest.raises(KeyboardInterrupt):
        solved(new_student, teacher, made, Stream(stop=24))
    late = Stream()
    from_middle, _ = solved(new_student, teacher, made, late, rank=1)
    first, _ = solved(new_student, teacher, made)
    after = Stream()
    from_end, _ = solved(new_student, teacher, made, after, rank=1)
    assert late.asked == [24, 32, 40] and after.asked == []
    for other in (from_middle, first, from_end):
        assert all(map(torch.equal, alone, other))


def test_the_kept_sums_serve_another_ridge_and_nothing_else(new_student, teacher, recipe, monkeypatch, capfd):
    monkeypatch.setattr(heads, "SAVE_EVERY", 0.0)
    made = recipe()
    solved(new_student, teacher, made)
    path = runs.Path(made.output) / "head" / "sums.safetensors"
    with safe_open(path, "pt") as file:
        kinds = {name: file.get_tensor(name).dtype for name in file.keys()}  # noqa: SIM118
        assert kinds.pop("cursors") == torch.int64 and set(kinds.values()) == {torch.float64}
        assert set(file.metadata()) == {"about"} and "ridge" not in file.metadata()["about"]
    assert load_file(path)["fit.xy"].shape == (D + 1, OUTPUTS)
    kept, stream = path.read_bytes(), Stream()
    capfd.readouterr()
    other, _ = solved(new_student, teacher, recipe("head.ridge=0.5"), stream)
    assert stream.asked == [] and "goes on from" in capfd.readouterr().err

    def asked(what: str, student=new_student, source="tiny", *sets: str) -> None:
        path.write_bytes(kept)
        stream = Stream()
        init_head(student(), teacher, stream, recipe(*sets), Source(1000, source))
        assert stream.asked == list(range(0, 48, 8)) or "samples" in what
        assert f"not used, it is of another {what}" in capfd.readouterr().err

    def trained():
        student = new_student()
        with torch.no_grad():
            student.clip.visual.conv1.weight[0, 0, 0, 0] += 1e-3
        return student

    asked("student", trained)
    asked("data", new_student, "others")
    asked("seed", new_student, "tiny", "seed=1")
    asked("samples", new_student, "tiny", "head.samples=41")
    asked("streams", new_student, "tiny", "data.streams=2")
    path.write_bytes(kept[: len(kept) // 2])
    again, _ = solved(new_student, teacher, recipe("head.ridge=0.5"))
    assert "not used, it cannot be read" in capfd.readouterr().err and all(map(torch.equal, other, again))
    forget_sums(made.output)
    assert not path.parent.exists()
    forget_sums(made.output)  # twice is as good


def test_sums_that_cannot_be_written_are_named(new_student, teacher, recipe):
    made = recipe()
    runs.Path(made.output).write_text("a file")
    with pytest.raises(ConfigError, match="sums.safetensors: cannot be written"):
        solved(new_student, teacher, made)


def test_progress_is_said_of_long_ones(new_student, teacher, recipe, monkeypatch, capfd):
    monkeypatch.setattr(heads, "EVERY", -1.0)
    solved(new_student, teacher, recipe())
    assert "head: ridge, 8 of 45 images, left 0:" in capfd.readouterr().err


# the other two


def test_warmup_trains_the_head_alone(new_student, teacher, recipe):
    student, other = new_student(), new_student()
    clip = [p.clone() for p in student.clip.parameters()]
    apply_tuning(student, "layernorm", head=False)
    made = recipe("head.init=warmup", "head.warmup_steps=60", "optimizer.head_lr=2e-2", "loss.gradient=latents")
    result = init_head(student, teacher, always(Stream().batch(0)), made, Source(1000))
    assert result["last"] < 0.7 * result["first"] and images_asked(made, 1000) == 480
    assert all(torch.equal(a, b) for a, b in zip(clip, student.clip.parameters(), strict=True))
    assert all(p.grad is None and not p.requires_grad for p in student.head.parameters())
    short = recipe("head.init=warmup", "head.warmup_steps=3")
    ranks = [solved(new_student, teacher, short, rank=rank)[0] for rank in range(2)]
    assert all(map(torch.equal, *ranks)) and not torch.equal(ranks[0][0], other.head.linear.weight)


def test_warmup_asks_the_unet_in_micro_batches(new_student, teacher, recipe):
    """As training does: the memory of a whole batch's graph, and another shape, are what they are for."""
    found, sizes = {}, {}
    for micro_batch in (0, 2):
        seen = []
        hook = teacher.unet.register_forward_hook(lambda _, args, out: seen.append(len(args[0])))  # noqa: B023
        how = ("head.init=warmup", "head.warmup_steps=2", "loss.gradient=full", f"teacher.micro_batch={micro_batch}")
        found[micro_batch], _ = solved(new_student, teacher, recipe(*how, batch=6))
        hook.remove()
        sizes[micro_batch] = seen
    assert sizes == {0: [6, 6], 2: [2] * 6}
    torch.testing.assert_close(found[2], found[0], rtol=1e-4, atol=1e-6)


def test_default_head_is_left_alone(new_student, recipe):
    made = recipe("head.init=default")
    student = new_student()
    before = weights(student)
    assert init_head(student, None, None, made, None) == {} and images_asked(made, 1000) == 0
    assert all(map(torch.equal, before, weights(student)))
    wrong = dataclasses.replace(made, head=dataclasses.replace(made.head, init="zeros"))
    with pytest.raises(ConfigError, match=r"head\.init"):
        init_head(student, None, None, wrong, None)


# in the trainer


def test_the_trainer_reports_the_head_and_forgets_the_sums(tmp_path, capfd):
    recipe = runs.write_recipe(tmp_path)
    sets = runs.sets("steps=2", "head.init=ridge", "head.samples=72", "data.samples=128")
    assert runs.train("--recipe", recipe, *sets, "--output", tmp_path / "run") == 0
    row = runs.rows(tmp_path / "run", "head")
    assert len(row) == 1 and row[0]["step"] == 0 and row[0]["init"] == "ridge"
    assert (row[0]["samples"], row[0]["held_out"]) == (72, 9) and row[0]["r2_held_out"] < row[0]["r2"]
    assert "head: ridge 0.001, R^2" in capfd.readouterr().err
    assert not (tmp_path / "run" / "head").exists()


def test_the_trainer_goes_on_with_a_head_that_was_stopped(tmp_path, monkeypatch):
    """And takes every batch of the sequence, accumulated ones too: the sums are of its first samples."""
    from fastsds.data.loader import Loader

    monkeypatch.setattr(heads, "SAVE_EVERY", 0.0)
    recipe, seen, load = runs.write_recipe(tmp_path), [], Loader.__next__
    argv = ["--recipe", recipe, *runs.sets("steps=2", "head.init=ridge", "head.samples=128"), "--output"]

    def watched(self):
        batch, cursors = load(self)
        seen.append(batch.ids.tolist())
        if len(seen) == 3 and not stopped:
            raise KeyboardInterrupt
        return batch, cursors

    monkeypatch.setattr(Loader, "__next__", watched)
    stopped = True
    assert runs.train(*argv, tmp_path / "whole") == 0
    assert [i for batch in seen[:5] for i in batch] == list(range(160))
    seen, stopped = [], False
    assert runs.train(*argv, tmp_path / "run") == 130
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["head"]
    seen, stopped = [], True
    assert runs.train(*argv, tmp_path / "run") == 0
    assert seen[0] == list(range(64, 96))
    for file in ("open_clip_model.safetensors", "head.safetensors"):
        a, b = (load_file(tmp_path / name / "student" / file) for name in ("whole", "run"))
        assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


