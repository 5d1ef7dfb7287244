"""The bank of amortised targets: what the teacher sees in the noised latents of real images, asked once.

    x0hat_nk = x0hat(z_t, t, c_n),   z_t = sqrt(abar_t) z_n + sqrt(1 - abar_t) eps        (Teacher.targets)

for image-caption pair n with VAE latent z_n, and K draws of (t, eps) that depend on (bank.seed, n, draw) alone. The targets do
not depend on the student: they serve every epoch, student, arm and seed, and training from them needs no teacher.

    BANK/cache/              latent [C, h, w] fp16, text [L, D] fp16 (the text encoder's answer), pair int64 (a digest)
    BANK/generation_0000/    x0hat [K, C, h, w] fp16, abar [K] fp32; from latent and text as they are stored

Visit v of a pair takes draw v mod K. With `refresh_every` e, generation g = v // e serves epochs g e .. (g + 1) e - 1 and its
draws are counted on from generation g - 1's; the trainer makes it under its own output when an epoch needs it, and keeps the
last two that it reads: a bank is only read by training, so runs share it.
"""

import argparse
import contextlib
import shutil
import sys
import time
from functools import partial
from pathlib import Path

import torch

from fastsds import config, ops
from fastsds.config import ConfigError, Recipe
from fastsds.data import Samples
from fastsds.progress import clock
from fastsds.schedule import level_range, timestep_range
from fastsds.teacher.loading import fingerprint
from fastsds.teacher.model import Teacher
from fastsds.teacher.shards import INDEX, Shards, check_same, fill, rows_a_shard

CHUNK = 32  # pairs a call of the teacher, where teacher.micro_batch does not say
CACHE = "cache"


class Bank:
    """A bank on disk, as a recipe uses it: targets where its gradient is amortised, else the captions' embeddings alone.

    latent_shape: (C, h, w). Open it, `attach` it to the data, then `read` it.
    """

    def __init__(self, recipe: Recipe):
        self.folder, self.settings, amortised = Path(recipe.bank.path), recipe.bank, recipe.loss.gradient == "amortised"
        self.refreshed = Path(recipe.output) / "bank"
        self.read = self.targets if amortised else self.latents if recipe.loss.gradient == "latents" else self.texts
        if not (self.folder / CACHE).is_dir():
            raise ConfigError(f"bank.path: {self.folder} holds no bank; `fastsds bank build` with the same recipe makes it")
        self.cache = Shards.open(self.folder / CACHE)
        wanted = _asked(recipe) if amortised else {"teacher": fingerprint(recipe.teacher.path)}
        check_same(self.folder, self.cache.about, {**self.cache.about, **wanted})
        self.latent_shape, self.log_snr = (tuple(self.cache.about.get(name, ())) for name in ("latent_shape", "log_snr"))
        self._generations: dict[int, Shards] = {}

    def attach(self, source, teacher: Teacher | None = None, rank: int = 0, world: int = 1) -> None:
        """Say what data the targets are read for, and who makes them anew.

        Args: teacher: with its UNet, where `refresh_every` asks for new targets; else None. rank, world: who shares that work.
        Raises: ConfigError if the bank is of other data, or not whole.
        """
        check_same(self.folder, self.cache.about, {**self.cache.about, "data": _identity(source)})
        self.teacher, self.rank, self.world = teacher, rank, world
        if self.cache.missing():
            raise self._unfinished(CACHE)
        if teacher is None and self.read == self.targets:
            self._generation(0)

    def reach(self, epoch: int) -> None:
        """Make the targets of an epoch where they are missing. Every rank calls it at the same batch, and does its share."""
        if self.settings.refresh_every and self.read == self.targets:
            self._generation(epoch // self.settings.refresh_every)

    def targets(self, ids: torch.Tensor, visits: torch.Tensor, samples: Samples) -> dict[str, torch.Tensor]:
        """The targets of pairs at visits, and their alpha-bar.

        Shapes: ids, visits [b] -> targets fp16 [b, C, h, w], abar fp32 [b].
        Raises: ConfigError if an image or a caption is not the one that its targets were made for.
        """
        rows = self._rows(samples)
        every, draws = self.settings.refresh_every, self.settings.draws
        generation = visits // every if every else torch.zeros_like(visits)
        column = (visits - generation * every) % draws
        x0hat, abar = torch.empty(len(rows), *self.latent_shape, dtype=torch.float16), torch.empty(len(rows))
        for g in generation.unique().tolist():
            of, shards = generation == g, self._generation(g)
            x0hat[of], abar[of] = (shards.read(name, rows[of], column[of]) for name in ("x0hat", "abar"))
        for g in [g for g in self._generations if g < generation.min() - 1]:  # no rank is a generation behind another
            self._drop(g)
            del self._generations[g]
        return {"targets": x0hat, "abar": abar}

    def texts(self, ids: torch.Tensor, visits: torch.Tensor, samples: Samples) -> dict[str, torch.Tensor]:
        """The captions' text embeddings. Shapes: ids [b] -> text fp16 [b, L, D]. Raises: as `targets`."""
        return {"text": self.cache.read("text", self._rows(samples))}

    def latents(self, ids: torch.Tensor, visits: torch.Tensor, samples: Samples) -> dict[str, torch.Tensor]:
        """The images' latents. Shapes: ids [b] -> latents fp16 [b, C, h, w]. Raises: as `targets`."""
        return {"latents": self.cache.read("latent", self._rows(samples))}

    def close(self) -> None:
        """Delete the targets that the run made for itself."""
        for g in range(1, 1 + max(self._generations, default=0)):
            self._drop(g)
        with contextlib.suppress(OSError):  # not there, or something else lies in it
            self.refreshed.rmdir()

    def _drop(self, g: int) -> None:
        if g > 0:  # generation 0 is the bank's, wherever that lies
            shutil.rmtree(_generation_folder(self.refreshed, g), ignore_errors=True)

    def _rows(self, samples: Samples) -> torch.Tensor:
        other = (self.cache.read("pair", samples.rows) != samples.digests).nonzero().flatten().tolist()
        if other:
            raise ConfigError(
                f"bank {self.folder}: pair {int(samples.rows[other[0]])}, {samples.captions[other[0]]!r}, has another image or "
                "caption than was asked about; build a bank of this data"
            )
        return samples.rows

    def _generation(self, g: int) -> Shards:
        if g not in self._generations:
            parent = self.refreshed if g else self.folder
            folder = _generation_folder(parent, g)
            if not (folder / INDEX).is_file() or Shards.open(folder).missing():
                if self.teacher is None:
                    raise self._unfinished(folder.name)
                fill_generation(parent, self.cache, self.teacher, g, self.rank, self.world)
            found = Shards.open(folder)
            found.check(self.cache)
            self._generations[g] = found
        return self._generations[g]

    def _unfinished(self, name: str) -> ConfigError:
        return ConfigError(f"bank {self.folder}: {name} is not whole; `fastsds bank build` with the same recipe goes on")


def build(recipe: Recipe, teacher: Teacher, source, rank: int = 0, world: int = 1) -> None:
    """Make the bank that a recipe names, or what of it is missing: the cache, then generation 0.

    Every process takes shards that no other has; rank 0 prints size and time first, and progress all the way.
    Raises: ConfigError for a bank of other settings, or too little disk.
    """
    folder, chunk, loss = Path(recipe.bank.path), recipe.teacher.micro_batch or CHUNK, recipe.loss
    try:
        timesteps = timestep_range(teacher.alphas_cumprod, loss.t, loss.log_snr, loss.shift)
    except ValueError as error:
        raise ConfigError(f"loss: {error}") from error
    about = {
        **_asked(recipe), "data": _identity(source), "latent_shape": list(teacher.latent_shape),
        "prediction_type": teacher.prediction_type, "dtype": str(teacher.dtype).removeprefix("torch."), "chunk": chunk,
        "timesteps": timesteps, "log_snr": level_range(teacher.alphas_cumprod, *timesteps),
    }  # fmt: skip
    a_row = 2 * recipe.bank.draws * torch.Size(teacher.latent_shape).numel()
    size = rows_a_shard(a_row, chunk, source.rows)
    cache = Shards.plan(folder / CACHE, about, source.rows, size)
    damaged: dict[int, str] = {}

    def ask(rows: torch.Tensor) -> dict[str, torch.Tensor]:
        samples = source.load_rows(rows, teacher.image_size)  # a damaged one keeps its place; training passes over it, too
        damaged.update({int(rows[k]): why for k, why in samples.damaged.items()})
        if len(damaged) > recipe.data.max_skipped * source.rows:
            shown = "".join(f"\n  {why}" for _, why in sorted(damaged.items())[:10])
            raise ConfigError(
                f"data.max_skipped is {recipe.data.max_skipped}, and {len(damaged)} of {source.rows:,} pairs cannot be used:"
                + shown
            )
        latent, text = teacher.encode(samples.pixels).half(), teacher.embed(samples.captions).half()
        return {"latent": latent, "text": text, "pair": samples.digests}

    if rank == 0:
        _announce(folder, cache, ask, teacher, a_row, world)
    cache = Shards.create(folder / CACHE, about, source.rows, size)
    fill(cache, ask, chunk, "bank: latents and captions", rank, world)
    if damaged:
        print(f"bank: {len(damaged)} pairs cannot be used, and training will pass over them, too", flush=True)
    fill_generation(folder, cache, teacher, 0, rank, world)


def _identity(source) -> str:
    if not hasattr(source, "__len__"):
        raise ConfigError("bank.path: this data.source can be read in its own order alone; expected data on disk")
    return source.identity()


def fill_generation(folder: Path, cache: Shards, teacher: Teacher, g: int, rank: int = 0, world: int = 1) -> None:
    """Make the targets of a generation, or what of them is missing. Raises: ConfigError for a target outside fp16."""
    shards = Shards.create(_generation_folder(folder, g), cache.about, cache.rows, cache.size)
    fill(shards, partial(_targets, cache, teacher, g), cache.about["chunk"], f"bank: targets, generation {g}", rank, world)


def _targets(cache: Shards, teacher: Teacher, g: int, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    about, place = cache.about, teacher.device
    z, text = cache.read("latent", ids).to(place, torch.float32), cache.read("text", ids).to(place, teacher.dtype)
    x0hat, abar = [], []
    for visit in range(g * about["draws"], (g + 1) * about["draws"]):
        t, noise = (
            ops.Noise(about["seed"], ops.draw(purpose, visit), ids.to(place))
            for purpose in (ops.Purpose.TIMESTEP, ops.Purpose.NOISE)
        )
        t = t.randint(*about["timesteps"])
        x0hat.append(teacher.targets(z, t, noise, text).half())
        abar.append(teacher.alphas_cumprod[t])
    found = torch.stack(x0hat, dim=1)
    if not found.isfinite().all():
        bad = ids[~found.cpu().flatten(1).isfinite().all(1)].tolist()
        raise ConfigError(f"bank: targets of samples {bad} are not finite in fp16; ask at a higher SNR (loss.log_snr, loss.t)")
    return {"x0hat": found, "abar": torch.stack(abar, dim=1)}


def _announce(folder: Path, cache: Shards, ask, teacher: Teacher, a_row: int, world: int) -> None:
    """Print size and time, from one chunk asked for that purpose. Raises: ConfigError if the disk is too small."""
    path = _generation_folder(folder, 0)
    targets = Shards.open(path) if (path / INDEX).is_file() else cache
    missing = sum(len(cache.span(shard)) for shard in cache.missing())
    absent = cache.rows if targets is cache else sum(len(targets.span(shard)) for shard in targets.missing())
    if not missing and not absent:
        return
    ids, chunk = torch.arange(min(cache.about["chunk"], cache.rows)), cache.about["chunk"]
    timed = {}
    for name in ("warm-up", "asked"):
        began = time.perf_counter()
        first = {key: value.cpu() for key, value in ask(ids).items()}  # waits for the device
        timed[name] = time.perf_counter() - began
    z, text = first["latent"].to(teacher.device, torch.float32), first["text"].to(teacher.device, teacher.dtype)
    t = torch.full((len(ids),), cache.about["timesteps"][0], device=teacher.device)
    for name in ("warm-up", "target"):
        began = time.perf_counter()
        float(teacher.targets(z, t, torch.zeros_like(z), text).sum())
        timed[name] = time.perf_counter() - began
    seconds = (missing * timed["asked"] + absent * cache.about["draws"] * timed["target"]) / chunk / world
    needed = missing * sum(v.numel() * v.element_size() for v in first.values()) // len(ids) + absent * a_row
    free = shutil.disk_usage(next(place for place in (folder, *folder.parents) if place.exists())).free
    print(
        f"bank {folder}: {cache.rows:,} samples x {cache.about['draws']} targets in {len(cache)} shards; {needed / 2**20:,.0f} "
        f"MiB to write, {free / 2**20:,.0f} free; about {clock(seconds)} on {world} x {teacher.device}", flush=True,
    )  # fmt: skip
    if needed > free:
        raise ConfigError(f"bank.path: {folder} has {free / 2**20:,.0f} MiB free, the bank needs {needed / 2**20:,.0f}")


def _asked(recipe: Recipe) -> dict:
    """What a recipe wants a bank to be, as an index says it."""
    loss = recipe.loss
    wanted = {"t": loss.t, "log_snr": loss.log_snr, "shift": loss.shift}
    return {
        "draws": recipe.bank.draws, "seed": recipe.bank.seed,
        **{f"loss.{key}": list(value) if isinstance(value, tuple) else value for key, value in wanted.items()},
        "teacher": fingerprint(recipe.teacher.path), "teacher.prediction_type": recipe.teacher.prediction_type,
    }  # fmt: skip


def _generation_folder(folder: Path, g: int) -> Path:
    return folder / f"generation_{g:04d}"


def main(argv: list[str]) -> int:
    """`fastsds bank build --recipe FILE --set KEY=VALUE`; several processes (torchrun) share the work."""
    parser = argparse.ArgumentParser(prog="fastsds bank", description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("action", choices=["build"], help="ask the teacher, or go on where it was stopped")
    parser.add_argument("--recipe", metavar="FILE", help="what is asked: teacher, bank, data, loss")
    parser.add_argument("--set", metavar="KEY=VALUE", action="append", default=[], help="override one recipe value")
    asked = parser.parse_args(argv)
    recipe = config.load_recipe(asked.recipe, asked.set, only=Recipe)
    config.check(recipe)
    if recipe.bank.path is None:
        raise ConfigError("bank.path is null; expected the folder to build in (--set bank.path=DIR)")
    if recipe.data.source == "world" and recipe.data.samples is None:
        raise ConfigError("data.samples is null, and the world is endless; expected how many samples (--set data.samples=8192)")
    from fastsds.data.sources import open_source
    from fastsds.engine import device, ranks

    rank, world, _ = ranks()
    teacher = Teacher.of(recipe, device())
    try:
        build(recipe, teacher, open_source(recipe.data, recipe.seed), rank, world)
    except KeyboardInterrupt:
        print("\nstopped; whole shards are kept, and the same command goes on", file=sys.stderr)
        return 130
    if rank == 0:
        print(f"bank {recipe.bank.path} is whole")
    return 0
