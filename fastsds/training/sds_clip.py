"""SDS-CLIP under the trainer: the frozen diffusion model or its bank, a CLIP, captioned images."""

import torch

from fastsds.config import ConfigError, Recipe
from fastsds.data.loader import Loader
from fastsds.data.sources import open_source
from fastsds.recipes.head import forget_sums, init_head
from fastsds.recipes.sds_clip import SDSCLIP, teacher_parts
from fastsds.student import make_student
from fastsds.training import Training, check_batch


class SDSCLIPTraining(Training):
    """Args: source: in place of `data.source`; key, named: what an error calls its batch and it."""

    def __init__(
        self, recipe: Recipe, place: torch.device, rank: int, world_size: int, source=None, key="data.batch", named=None
    ):
        super().__init__(recipe, place, rank, world_size)
        loss, data = recipe.loss, recipe.data
        self.parts = teacher_parts(loss, recipe.bank, recipe.head.init)  # what training asks, and the head's start
        self.running, self.teacher, self.bank, self.started = teacher_parts(loss, recipe.bank), None, None, {}
        if self.parts:
            from fastsds.teacher import Teacher

            self.teacher = Teacher.of(recipe, place, self.parts)
            self.frozen = sum(p.numel() for p in self.teacher.parameters())
        if recipe.bank.path and loss.lambda_ != 0:
            from fastsds.teacher.bank import Bank

            self.bank = Bank(recipe)
        self.shape = (self.teacher or self.bank).latent_shape if self.teacher or self.bank else None
        self.student, self.trained = make_student(recipe.student, self.shape, place, recipe.seed)
        self.source = open_source(data, recipe.seed) if source is None else source
        self.samples = len(self.source) if hasattr(self.source, "__len__") else None
        self.identity = None if self.samples is None else self.source.identity()
        check_batch(key, data.batch, named or data.source, self.samples)
        if self.bank:
            self.bank.attach(self.source, self.teacher if recipe.bank.refresh_every else None, rank, world_size)
        self.objective = SDSCLIP(loss, self.teacher, recipe.seed, world_size, rank, self.student.head,
                                 recipe.teacher.micro_batch, self.bank and self.bank.log_snr)  # fmt: skip
        self._evaluate = make_evaluation(recipe.eval)

    def begin(self, resumed: bool) -> None:
        """Initialise h_w, on whole batches in one order, whatever the ranks."""
        if resumed or self.shape is None:
            return
        kept = self.bank and self.recipe.head.init == "ridge"  # the latents are in the bank
        how = {"rank": 0, "world": 1, **({"read": self.bank.latents} if kept else {})}
        self.started = init_head(
            self.student, self.teacher, lambda first, cursors: self._loader(self.parts, first=first, cursors=cursors, **how),
            self.recipe, self.source, latents=(lambda batch: batch.latents) if kept else None, rank=self.rank,
        )  # fmt: skip

    def begun(self, metrics) -> None:
        if self.rank == 0:
            forget_sums(self.recipe.output)
        if self.started:
            metrics.row(split="head", step=0, init=self.recipe.head.init, **self.started)
        if self.teacher and self.teacher.acceleration:
            metrics.note(f"teacher: {self.teacher.acceleration}")

    def batches(self, **how) -> Loader:
        return self._loader(self.running, **how)

    def evaluate(self, engine, step: int, metrics) -> None:
        self._evaluate(engine, step, metrics)

    def close(self) -> None:
        if self.bank:
            self.bank.close()

    def _loader(self, asked: tuple[str, ...], **how) -> Loader:
        data, loss, bank = self.recipe.data, self.recipe.loss, self.bank
        how = {"rank": self.rank, "world": self.world_size, "reach": bank and bank.reach, "read": bank and bank.read, **how}
        return Loader(
            self.source, batch=data.batch, streams=data.streams, seed=self.recipe.seed, image_size=self.student.image_size,
            tokenize=self.student.tokenize, negatives=loss.negatives == "swapped", shuffled=loss.captions == "shuffled",
            teacher_size=self.teacher.image_size if "vae" in asked else None, device=self.place, max_skipped=data.max_skipped,
            **how,
        )  # fmt: skip


def make_evaluation(asked):
    """A function of (engine, step, metrics) that asks the suite of a recipe's `eval` section."""
    if asked.suite == "none":
        return lambda engine, step, metrics: None
    from fastsds.evaluation.run import evaluate
    from fastsds.evaluation.scorer import ClipScorer
    from fastsds.evaluation.suite import load_suite

    try:
        suite = load_suite(asked.suite, asked.data, asked.items)
    except ConfigError as error:
        raise ConfigError(f"eval.suite, eval.data: {error}") from error
    return lambda engine, step, metrics: metrics.evaluation(step, evaluate(suite, ClipScorer(engine)))
