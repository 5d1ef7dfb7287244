"""Does the teacher tell a right caption from a swapped one, at which noise, and on what h_w says? Before money is spent.

    fastsds check-teacher --recipe R        a few hundred pairs of the recipe's data; exit code 0: go, 1: no-go

For each pair, band of log SNR and draw, one (t, eps) is shared by the right caption, the swapped one and another picture's, on
the real VAE latent and, where the student has a head, on h_w(f(x)). What a swapped caption is: the source's own wrong caption
(the embedded world has them), or evaluation/swapped_caption.py's. What follows from the errors: evaluation/preference.py.
"""

import argparse
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from fastsds import config
from fastsds.config import ConfigError, Recipe
from fastsds.data import Batch
from fastsds.data.loader import Loader
from fastsds.data.sources import open_source
from fastsds.engine import device
from fastsds.evaluation import preference
from fastsds.evaluation.diffusion_score import pair_scores, timesteps_and_noise
from fastsds.evaluation.preference import CAPTIONS, Band
from fastsds.evaluation.swapped_caption import swapped_caption
from fastsds.progress import Line, clock
from fastsds.recipes.head import init_head, weights_digest
from fastsds.recipes.sds_clip import teacher_pixels
from fastsds.schedule import log_snr
from fastsds.student import HEAD_FILE, Student, make_student
from fastsds.teacher import Teacher
from fastsds.teacher.loading import fingerprint

CHUNK = 32  # latents a call of the UNet, where teacher.micro_batch does not say
VISIT = 1 << 26  # the check's draws are none that training makes
FEWEST = 8  # pairs
REAL, HEAD = "real latents", "h_w(f(x))"


@dataclass
class Pairs:
    """ids [N]; captions [N] of (right, swapped, another's); z [N, latents, C, h, w]: real, and h_w(f(x)) if there is a head."""

    ids: torch.Tensor
    captions: list[tuple[str, str, str]]
    z: torch.Tensor
    left_out: int  # captions that cannot be swapped
    seen: int  # pairs that the head was made from, too


class Walk:
    """The recipe's batches in the trainer's order. It remembers how far the head went, so that the pairs are other ones."""

    def __init__(self, recipe: Recipe, source, teacher: Teacher, student: Student | None, place: torch.device):
        data = recipe.data
        self.how = dict(
            batch=min(data.batch, len(source)), streams=data.streams, seed=recipe.seed, device=place,
            max_skipped=data.max_skipped, teacher_size=teacher.image_size, negatives=data.source == "world",
            image_size=student.image_size if student else teacher.image_size,
            tokenize=student.tokenize if student else lambda captions: torch.zeros(len(captions), 1, dtype=torch.int64),
        )  # fmt: skip
        self.source, self.first, self.cursors = source, 0, None

    def __call__(self, first: int, cursors: torch.Tensor | None):
        batch = self.how["batch"]
        self.first, self.cursors = -(-first // batch) * batch, cursors  # what is kept ends within a batch
        return iter(self)

    def __iter__(self):
        for batch, cursors in Loader(self.source, **self.how, first=self.first, cursors=self.cursors):
            self.first, self.cursors = self.first + len(batch), cursors
            yield batch, cursors


def head_of(recipe: Recipe, teacher: Teacher, source, place: torch.device) -> tuple[Student | None, Walk]:
    """The student with the head that its folder has, or that `recipe.head` makes of the data; None where it has none."""
    there = (Path(str(recipe.student.model).removeprefix("local-dir:")) / HEAD_FILE).is_file()
    if recipe.head.init == "default" and not there:
        return None, Walk(recipe, source, teacher, None, place)
    if recipe.head.init == "warmup" and (recipe.loss.gradient == "amortised" or recipe.loss.lambda_ == 0):
        raise ConfigError("head.init is warmup, which asks the teacher for L_SDS; expected ridge here (--set head.init=ridge)")
    student = make_student(recipe.student, teacher.latent_shape, place, recipe.seed)[0].eval()
    walk = Walk(recipe, source, teacher, student, place)
    init_head(student, teacher, walk, recipe, source)
    return student, walk


def collect(walk: Walk, teacher: Teacher, student: Student | None, wanted: int) -> Pairs:
    """Take the next pairs whose captions can be swapped, each image once. Raises: ConfigError if the data have too few."""
    found: dict[int, tuple[str, str]] = {}
    made, latents, left_out, seen, looked = walk.first > 0, [], 0, 0, 0
    for batch, _ in walk:
        chosen = []
        for k, sample in enumerate(batch.ids.tolist()):
            if sample in found or len(found) == wanted:
                continue
            right = batch.captions[k]
            swapped = batch.negatives[k] if batch.negatives else swapped_caption(right)
            if swapped is None or len(teacher.tokens([right, swapped]).unique(dim=0)) == 1:  # the same as far as it reads
                left_out += 1
                continue
            found[sample] = right, swapped
            chosen.append(k)
            seen += made and bool(batch.visits[k])
        if chosen:
            latents.append(_latents(teacher, student, batch)[chosen].cpu())
        looked += len(batch)
        if len(found) == wanted or looked >= len(walk.source):
            break
    captions = list(found.values())
    if len(captions) < FEWEST or len({right for right, _ in captions}) < 2:
        raise ConfigError(
            f"data.source: of {looked} captions {len(captions)} can be swapped; expected at least {FEWEST}, of two things with "
            "a word such as on, under, left of, next to between them"
        )
    triples = [(right, swapped, _another(captions, k)) for k, (right, swapped) in enumerate(captions)]
    return Pairs(torch.tensor(list(found)), triples, torch.cat(latents), left_out, seen)


def measure(teacher: Teacher, pairs: Pairs, bands: list[Band], draws: int, chunk: int, seed: int, rows: "Rows") -> np.ndarray:
    """Errors of every pair: those that `rows` has, all others asked for and added to it. Ctrl-C loses a chunk at most.

    Shapes: -> float64 [N, 2 (eps, x0), bands, 3 captions, latents].
    """
    line, n, place = Line(), len(pairs.ids), teacher.device
    each = len(CAPTIONS) * pairs.z.shape[1]
    size = max(1, chunk // each)  # pairs a call: cut alike, whatever is there already
    starts = [start for start in range(0, n, size) if any(k not in rows.errors for k in range(start, min(start + size, n)))]
    began = time.monotonic()
    for done, start in enumerate(starts, 1):
        part = slice(start, min(start + size, n))
        z, ids = pairs.z[part].to(place), pairs.ids[part].to(place)
        text = teacher.embed([c for triple in pairs.captions[part] for c in triple]).unflatten(0, (-1, len(CAPTIONS)))
        if done == 1:
            for _ in range(2):
                began = time.monotonic()
                _errors(teacher, z, text, ids, bands[0], 0, draws, seed).cpu()  # waits for the device
            calls = len(starts) * len(bands) * draws
            line.note(
                f"check-teacher: {n} pairs x {each} questions x {len(bands)} bands x {draws} draws: {calls:,} calls of the "
                f"UNet with {size * each} latents, about {clock(calls * (time.monotonic() - began))} on {place}"
            )
            began = time.monotonic()
        asked = []
        for b, band in enumerate(bands):
            terms = [_errors(teacher, z, text, ids, band, k, draws, seed, b * draws) for k in range(draws)]
            asked.append(torch.stack(terms).mean(dim=0))
        rows.add(start, pairs.ids[part].tolist(), pairs.captions[part], torch.stack(asked, dim=2).cpu().numpy())
        left = (len(starts) - done) * (time.monotonic() - began) / done
        line.say(f"check-teacher: {part.stop} of {n} pairs, left {clock(left)}")
    line.end()
    return np.stack([rows.errors[k] for k in range(n)])


def _errors(teacher: Teacher, z, text, ids, band: Band, draw: int, draws: int, seed: int, first: int = 0) -> torch.Tensor:
    """One draw's errors of eps and of x0hat. Shapes: z [b, I, C, h, w], text [b, 3, L, D] -> float64 [b, 2, 3, I]."""
    t, eps = timesteps_and_noise(teacher, ids, VISIT + first + draw, (band.first, band.last), draw, draws, seed)
    of_eps = -pair_scores(teacher, z, text, t, eps).double()
    snr = log_snr(teacher.alphas_cumprod)[t].exp().view(-1, 1, 1)
    return torch.stack([of_eps, of_eps / snr], dim=1)


@torch.no_grad()
def _latents(teacher: Teacher, student: Student | None, batch: Batch) -> torch.Tensor:
    """Shapes: [B, 1 or 2, C, h, w]."""
    real = teacher.encode(teacher_pixels(batch))
    return torch.stack([real] if student is None else [real, student(batch.pixels).z.to(real)], dim=1)


def _another(captions: list[tuple[str, str]], k: int) -> str:
    """The caption of the nearest pair before the k-th, or else after it, that says something else."""
    order = [*range(k - 1, -1, -1), *range(k + 1, len(captions))]
    return next(captions[j][0] for j in order if captions[j][0] != captions[k][0])


class Rows:
    """A .jsonl file: what was asked, then a row a pair. Raises: ConfigError if it is of something else."""

    def __init__(self, path: Path, about: dict):
        self.path, about = path, json.loads(json.dumps(about))
        try:
            whole = list(_whole(path.read_text(encoding="utf-8"))) if path.exists() else [{"about": about}]
            said = whole[0].get("about", {}) if whole else {}
            for key in about:
                if said.get(key) != about[key]:
                    raise ConfigError(f"--out {path}: no check, or one of another {key}; delete it, or name another file")
            self.errors = {row["pair"]: np.array(row["errors"]) for row in whole[1:]}
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_name(path.name + ".partial")
            partial.write_text("".join(json.dumps(row) + "\n" for row in whole), encoding="utf-8")
            partial.replace(path)
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"--out {path}: {error}") from error

    def add(self, start: int, ids: list[int], captions: list[tuple[str, str, str]], errors: np.ndarray) -> None:
        new = ""
        for k, sample in enumerate(ids, start):
            if k not in self.errors:
                self.errors[k] = errors[k - start]
                said = dict(zip(CAPTIONS, captions[k - start], strict=True))
                new += json.dumps({"pair": k, "id": sample, **said, "errors": self.errors[k].tolist()}) + "\n"
        try:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(new)
        except OSError as error:
            raise ConfigError(f"--out {self.path}: {error}; the rows before are kept") from error


def _whole(text: str):
    """The rows of a file whose last line may be cut."""
    for line in text.splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            return
        if isinstance(row, dict):
            yield row


def run(recipe: Recipe, wanted: int, count: int, draws: int, out: Path | None) -> dict:
    """Measure, print what was found, and return it as --json writes it."""
    place = device()
    teacher = Teacher.of(recipe, place)
    source = open_source(recipe.data, recipe.seed)
    data = source.identity()
    try:
        bands = preference.bands_of(teacher.alphas_cumprod.cpu(), count)
    except ValueError as error:
        raise ConfigError(f"--bands {count}: {error}; expected fewer") from error
    student, walk = head_of(recipe, teacher, source, place)
    about = {
        "teacher": fingerprint(recipe.teacher.path), "prediction_type": teacher.prediction_type, "dtype": str(teacher.dtype),
        "data": data, "seed": recipe.seed, "bands": count, "draws": draws, "chunk": recipe.teacher.micro_batch,
        "start": walk.first, "streams": recipe.data.streams,
        "student": weights_digest(student, head=True) if student else None,
    }  # fmt: skip
    rows = Rows(out or Path(recipe.output) / "check_teacher.jsonl", about)
    pairs = collect(walk, teacher, student, wanted)
    errors = measure(teacher, pairs, bands, draws, recipe.teacher.micro_batch or CHUNK, recipe.seed, rows)
    of = {
        latents: {wrong: preference.compare(errors, wrong, k, count) for wrong in CAPTIONS[1:]}
        for k, latents in enumerate((REAL, HEAD)[: errors.shape[-1]])
    }
    head = of.get(HEAD, {}).get("swapped")
    verdict = preference.judge(bands, of[REAL]["swapped"], of[REAL]["another's"], head)
    for latents, found in of.items():
        print(f"\n{latents}: the right caption against the swapped one")
        print(preference.table(bands, found["swapped"], found["another's"], verdict.bands if latents == REAL else ()))
    print(f"\n{len(pairs.ids)} pairs, {pairs.left_out} captions left out because they cannot be swapped; {rows.path}")
    if pairs.seen:
        print(f"the data are few: h_w was made from {pairs.seen} of the pairs, too, and reads them better than others")
    if head is None:
        print("h_w(f(x)) is not measured: student.model has no head and head.init makes none (--set head.init=ridge does)")
    print(f"{preference.needed(len(pairs.ids), count)}\n\n{verdict.text}")
    line = preference.recipe_line(verdict) if verdict.go else None
    if line:
        print(line)
    return {
        "about": about, "pairs": len(pairs.ids), "left_out": pairs.left_out, "seen": pairs.seen, "go": verdict.go,
        "text": verdict.text, "log_snr": verdict.span, "set": line, "train_in": verdict.bands,
        "bands": [band._asdict() for band in bands],
        "outcomes": {key: {wrong: [o._asdict() for o in x] for wrong, x in found.items()} for key, found in of.items()},
    }  # fmt: skip


def main(argv: list[str]) -> int:
    """`fastsds check-teacher --recipe FILE --set KEY=VALUE`."""
    parser = argparse.ArgumentParser(prog="fastsds check-teacher", description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--recipe", metavar="FILE", help="teacher, student, head and data. Default: the embedded world")
    parser.add_argument("--set", metavar="KEY=VALUE", action="append", default=[], help="override one recipe value")
    parser.add_argument("--pairs", type=int, default=400, help="image-caption pairs (default %(default)s)")
    parser.add_argument("--bands", type=int, default=8, help="equal bands of the schedule's log SNR (default %(default)s)")
    parser.add_argument("--draws", type=int, default=2, help="timesteps and noises a pair and band (default %(default)s)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="a row a pair; the same command goes on there. Default: "
                        "OUTPUT/check_teacher.jsonl")  # fmt: skip
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures")
    asked = parser.parse_args(argv)
    for name, least in (("pairs", FEWEST), ("bands", 1), ("draws", 1)):
        if getattr(asked, name) < least:
            raise ConfigError(f"--{name} {getattr(asked, name)}: expected at least {least}")
    recipe = config.load_recipe(asked.recipe, asked.set, only=Recipe)
    config.check(recipe)
    try:
        found = run(recipe, asked.pairs, asked.bands, asked.draws, asked.out)
    except KeyboardInterrupt:
        print("\nstopped; what is scored is kept, and the same command goes on", file=sys.stderr)
        return 130
    if asked.json:
        try:
            asked.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"--json {asked.json}: {error}") from error
    return 0 if found["go"] else 1
