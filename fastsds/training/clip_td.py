"""CLIP-TD under the trainer: a frozen CLIP, a cross-modal student, a task's examples. And the stage before: CLIP adapted."""

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from fastsds.config import CLIPTDRecipe, ConfigError, DataConfig, EvalConfig, LossConfig, Recipe, StudentConfig
from fastsds.crossmodal import make_crossmodal
from fastsds.data import Samples
from fastsds.data.loader import Loader
from fastsds.data.tasks import Task
from fastsds.data.tasks.opening import open_task
from fastsds.data.tasks.subsets import TRAIN
from fastsds.recipes.clip_targets import Selection, TargetCache, captioned, examples_digest
from fastsds.recipes.clip_td import CLIPTD, TeacherTargets, add_projections, labels_of, reads
from fastsds.recipes.clip_tokens import ClipTokens
from fastsds.student import load_student
from fastsds.training import Training, before_of, check_batch, targets_of
from fastsds.training.sds_clip import SDSCLIPTraining


@dataclass
class TaskBatch:
    """One rank's part of one batch.

    Shapes: ids, visits int64 [b]; pixels uint8 [b, 3, S, S]; tokens int64 [b, L], or [b, choices, L]; labels as
    `clip_td.labels_of`. targets: what CLIP says of them, or None.
    """

    ids: torch.Tensor
    visits: torch.Tensor
    pixels: torch.Tensor
    tokens: torch.Tensor
    labels: torch.Tensor
    targets: TeacherTargets | None = None

    @property
    def inputs(self) -> tuple[torch.Tensor, ...]:
        """What the student is called with; of several choices, token features are of the right one."""
        return (self.pixels, self.tokens, *([self.labels] if self.tokens.ndim == 3 else []))


class TaskLoader(Loader):
    """Batches of a task's examples. Args: read: the targets of (ids, visits, samples), or None; classes: of labels."""

    def __init__(self, task: Task, examples: list, *, workers: int = 0, classes: int = 0, **how):
        super().__init__(task.source(examples, workers), **how)
        self.examples, self.classes = examples, classes

    def _made(self, ids: torch.Tensor, visits: torch.Tensor, samples: Samples, told: list[str]) -> TaskBatch:
        examples = [self.examples[row] for row in samples.rows.tolist()]
        read = [reads(example) for example in examples]
        texts = read if examples[0].choices else [text for (text,) in read]
        targets = self.read(ids, visits, samples) if self.read else None
        made = (ids, visits, samples.pixels, self.tokenize(texts), labels_of(examples, self.classes))
        return TaskBatch(*(x.to(self.device) for x in made), None if targets is None else targets.to(self.device))


class CLIPTDTraining(Training):
    """Args: dry: only to be described: the adaptation has not run."""

    def __init__(self, recipe: CLIPTDRecipe, place: torch.device, rank: int, world_size: int, dry: bool = False):
        super().__init__(recipe, place, rank, world_size)
        data, loss, targets = recipe.data, recipe.loss, recipe.targets
        self.task = open_task(data, recipe.seed)
        self.examples = self.task.splits[TRAIN]
        if unknown := [split for split in recipe.eval.splits if split not in self.task.splits]:
            raise ConfigError(f"eval.splits: {unknown[0]!r}, expected some of {', '.join(self.task.splits)}")
        self.samples = len(self.examples)
        check_batch("data.batch", data.batch, f"{data.task}, {TRAIN},", self.samples)
        self.student, self.trained = make_crossmodal(recipe.student, self.task.classes, place, recipe.seed)
        self.objective, self.cache = CLIPTD(loss.beta, loss.weight, loss.distance), None
        if loss.beta:
            selection = Selection(targets.select, targets.k, targets.mass)
            teacher = ClipTokens(load_teacher(recipe, place, dry))
            self.frozen = sum(p.numel() for p in teacher.clip.parameters())
            before = {name for name, _ in self.student.named_parameters()}
            add_projections(self.student, teacher.width, targets.select == "pooled", recipe.seed)
            self.trained += [name for name, _ in self.student.named_parameters() if name not in before]
            if not (dry and recipe.adaptation.steps):  # else another CLIP will be asked
                folder = Path(targets.path) if targets.path else targets_of(recipe.output)
                self.cache = TargetCache(folder, self.task, self.examples, teacher, self.student, selection)
        self.identity = self.cache.about["examples"] if self.cache else examples_digest(self.task, self.examples)

    def begin(self, resumed: bool) -> None:
        """Ask CLIP about the examples that it was not asked about before."""
        if self.cache:
            self.cache.build(self.recipe.data.workers, self.rank, self.world_size)
            self.cache.teacher = None  # nobody asks it again

    def begun(self, metrics) -> None:
        for note in self.task.notes:
            metrics.note(f"{self.task.name}: {note}")

    def batches(self, **how) -> TaskLoader:
        data, student = self.recipe.data, self.student
        return TaskLoader(
            self.task, self.examples, workers=data.workers, classes=student.classes, batch=data.batch, streams=data.streams,
            seed=self.recipe.seed, image_size=student.image_size, tokenize=student.tokenize, rank=self.rank,
            world=self.world_size, device=self.place, max_skipped=data.max_skipped, read=self.cache and self.cache.read, **how,
        )  # fmt: skip

    def evaluate(self, engine, step: int, metrics) -> None:
        asked, data = self.recipe.eval, self.recipe.data
        if asked.splits:
            from fastsds.evaluation.tasks import evaluate_task

            batch = data.batch // self.world_size
            metrics.evaluation(step, evaluate_task(engine, self.task, asked.splits, batch, asked.examples, data.workers))


def load_teacher(recipe: CLIPTDRecipe, place: torch.device, dry: bool = False):
    """The CLIP that teaches: the recipe's, or what its adaptation left."""
    try:
        if recipe.adaptation.steps and not dry:
            return load_student(before_of(recipe.output) / "student", device=place)
        return load_student(recipe.teacher.model, recipe.teacher.pretrained, device=place)
    except ConfigError as error:
        raise ConfigError(f"teacher: {error}") from error


def adaptation(recipe: CLIPTDRecipe) -> Recipe:
    """The recipe of the stage before: the teacher's contrastive loss on the training examples' images and texts."""
    asked, data, clip = recipe.adaptation, recipe.data, recipe.teacher
    return Recipe(
        seed=recipe.seed,
        output=str(before_of(recipe.output)),
        steps=asked.steps,
        precision=recipe.precision,
        student=StudentConfig(model=clip.model, pretrained=clip.pretrained, tune=asked.tune),
        data=DataConfig(
            source=f"captions of {data.task}", batch=asked.batch, accumulation=1, streams=data.streams, workers=data.workers,
            max_skipped=data.max_skipped,
        ),
        loss=LossConfig(lambda_=0.0),
        optimizer=replace(recipe.optimizer, lr=asked.lr, warmup=asked.warmup),
        log_every=recipe.log_every,
        checkpoint_every=recipe.checkpoint_every,
        eval=EvalConfig(suite="none"),
    )  # fmt: skip


def adapt(recipe: CLIPTDRecipe, made: Recipe, place: torch.device, rank: int, world_size: int) -> SDSCLIPTraining:
    """What trains the stage before. Args: made: its recipe."""
    task = open_task(recipe.data, recipe.seed)
    source = captioned(task, task.splits[TRAIN], recipe.data.workers)
    named = f"{recipe.data.task}, texts that are true of an image of {TRAIN},"
    try:
        return SDSCLIPTraining(made, place, rank, world_size, source, "adaptation.batch", named)
    except ConfigError as error:
        raise ConfigError(str(error).replace("student.tune", "adaptation.tune")) from error  # the user's own key
