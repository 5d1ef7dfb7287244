"""What a run needs, put together: bytes of one rank by phase, FLOP of a step, the bank, and the largest batch that fits.

    between   weights + masters + moments + buffers + teacher + captions kept + batch
    ask       between + gathered + gradients + bucket + student's activations + contrastive loss + teacher's peak
    backward  between + gathered + gradients + bucket + second + the student's peak
    step      between - batch's activations + what the optimizer makes
    start     before the engine: fp32 weights + teacher + its peak over a whole batch (head.init)
"""

import functools
import math
from dataclasses import dataclass, replace

from fastsds import sharding
from fastsds.config import ConfigError, Recipe
from fastsds.data.sources import on_disk, open_source
from fastsds.plan.models import StudentSizes, TeacherSizes
from fastsds.plan.states import Engine, Held, held, zero_section
from fastsds.recipes.sds_clip import teacher_parts
from fastsds.teacher.bank import CHUNK
from fastsds.teacher.model import CACHE_BYTES

TOP = 1 << 20  # no batch larger than this is looked for


@dataclass
class Phases:
    """Bytes on one rank at the fullest moment of each part of a run."""

    between: int
    ask: int
    backward: int
    step: int
    start: int

    @property
    def peak(self) -> int:
        return max(vars(self).values())

    @property
    def fullest(self) -> str:
        return max(vars(self), key=lambda name: vars(self)[name])


class Planner:
    """A recipe under an engine.

    Args: deepspeed: DeepSpeed's own JSON, or None: plain torch. samples: image-caption pairs, where the data are not on this
        disk. say: called with a line of what is being measured.
    """

    def __init__(
        self, recipe: Recipe, deepspeed: dict | None = None, ranks: int = 1, gpu: bool = True, samples: int | None = None,
        say=lambda line: None,
    ):  # fmt: skip
        self.recipe, self.say = recipe, say
        stage = sharding.stage_of(deepspeed)
        if stage is None and ranks > 1:
            raise ConfigError(f"--ranks is {ranks}, and plain torch has one: name a DeepSpeed file (--config)")
        zero = None if stage is None else zero_section(deepspeed, stage)
        self.engine = Engine(stage, ranks, recipe.precision, recipe.optimizer.name, recipe.data.accumulation, gpu, zero)
        self.running = teacher_parts(recipe.loss, recipe.bank)
        self.loaded = teacher_parts(recipe.loss, recipe.bank, recipe.head.init)
        self.teacher = None
        if recipe.loss.lambda_ != 0 or self.loaded:
            say("the teacher, without its weights")
            self.teacher = TeacherSizes(recipe, gpu)
        say("the student, without its weights")
        self.student = StudentSizes(recipe, self.engine, self.teacher and self.teacher.latent_shape)
        self.rows, self.images = (samples, samples) if samples is not None else self._counted()

    # Bytes.

    @functools.cached_property
    def held(self) -> Held:
        return self.held_by(self.engine)

    def held_by(self, engine: Engine) -> Held:
        """What another engine would hold of the same student."""
        return held(self.student.groups, self.student.frozen, self.student.buffers, engine)

    @functools.cached_property
    def teacher_weights(self) -> dict[str, int]:
        return {part: self.teacher.weights(part) for part in self.loaded}

    @functools.cached_property
    def captions(self) -> int:
        """Bytes of the captions' embeddings that the teacher keeps while it trains."""
        return self._kept_captions() if "text" in self.loaded else 0

    def _kept_captions(self) -> int:
        row = math.prod(self.teacher.text_shape) * self.teacher.dtype.itemsize
        return min(CACHE_BYTES // row, self.rows or CACHE_BYTES) * row

    def batch_bytes(self, images: int) -> int:
        """Of a rank's part of a batch: what the towers read, and what a bank or the teacher's VAE adds; twice with workers."""
        each, loss = self.student.batch_bytes, self.recipe.loss
        if "vae" in self.running:
            each += 3 * self.teacher.image_size**2
        if self.recipe.bank.path and loss.lambda_ != 0:
            latent, text = math.prod(self.teacher.latent_shape), math.prod(self.teacher.text_shape)
            each += 2 * (latent if loss.gradient in ("amortised", "latents") else text)
        return each * images * (2 if self.recipe.data.workers else 1)

    def asked(self, images: int) -> int:
        """The teacher's peak, besides its weights, when it is asked about so many images at a time."""
        peak = 0
        if "unet" in self.running and self.recipe.loss.gradient != "amortised":
            peak = self.teacher.predict(images).peak
        if "unet" in self.running and self.recipe.loss.gradient == "amortised":  # new targets, in the bank's chunks
            peak = self.teacher.answer(self.recipe.teacher.micro_batch or CHUNK).peak
        if "text" in self.running:
            peak = max(peak, self.teacher.embed().peak)
        if "vae" in self.running:
            peak = max(peak, self.teacher.encode(images).peak)
        return peak

    def phases(self, batch: int, micro: int, engine: Engine | None = None) -> Phases:
        """Bytes at a contrastive batch over all ranks, the teacher asked about `micro` images at a time (0: all a rank has)."""
        engine = engine or self.engine
        mine, own = batch // engine.ranks, self.held_by(engine)
        use, contrast = self.student.use(mine), self.student.contrast(batch)
        between = own.between + sum(self.teacher_weights.values()) + self.captions + self.batch_bytes(mine)
        several = engine.accumulation > 1
        kept = own.gathered + (own.gradients if several else 0)
        kept += own.bucket if several and engine.stage == 1 else 0
        forward = between + kept + use.held + contrast.held
        diagnosed = contrast.peak + (4 * self.head_elements if engine.width < 4 else 0)  # in every log_every-th step
        ask = forward + max(self.asked(micro or mine), diagnosed if self.teacher else 0)
        late = engine.zero is None or sum(map(sum, self.student.groups)) > engine.zero.reduce_bucket_size
        alone = engine.grows or (engine.stage == 2 and not several and not late)  # cut out of one bucket at the end
        running = between + own.gathered + own.bucket + (0 if alone else own.gradients)
        backward = running + max(use.held + contrast.peak, use.peak) + (own.second if late else 0)
        backward = max(backward, between + own.gathered + own.bucket + own.gradients + own.second + own.reduced)
        return Phases(between, ask, backward, between + own.stepping, self._start(batch, micro))

    @property
    def head_elements(self) -> int:
        return sum(n for name, n in self.student.parameters.items() if name.startswith("head."))

    def _start(self, batch: int, micro: int) -> int:
        """The head's start: the plain student in fp32, and the teacher asked about whole batches."""
        init = self.recipe.head.init
        if init == "default" or self.teacher is None:
            return 0
        peak = 4 * sum(self.student.parameters.values()) + sum(self.teacher_weights.values()) + self.batch_bytes(batch)
        looked = self.student.look(batch) * 4 // self.engine.width
        if init == "warmup":
            asked = self.teacher.predict(micro or batch).peak if "unet" in self.loaded else 0
            return peak + self.captions + 3 * 4 * self.head_elements + max(looked, asked)  # its gradients and AdamW's moments
        width, outputs = self.student.width + 1, math.prod(self.teacher.latent_shape)
        asked = self.teacher.encode(batch).peak if "vae" in self.loaded else 0
        return peak + 2 * 8 * width * (width + outputs) + max(looked, asked)  # two sums

    # What fits.

    def largest_batch(self, limit: float) -> int:
        """The largest data.batch at teacher.micro_batch as it is; 0 where none fits."""
        micro = self.recipe.teacher.micro_batch
        step = self.engine.ranks * (micro if micro and self.recipe.loss.gradient != "amortised" else 1)
        top = min(TOP, self.images or TOP) // step
        guess = max(1, self.recipe.data.batch // step)
        return step * largest(lambda k: self.phases(k * step, micro).peak, limit, top, guess) if top else 0

    def largest_micro_batch(self, limit: float) -> int:
        """The largest teacher.micro_batch at data.batch as it is; 0 where none fits."""
        batch = self.recipe.data.batch
        mine = batch // self.engine.ranks
        fits = [m for m in range(1, mine + 1) if mine % m == 0 and self.phases(batch, m).peak <= limit]
        return max(fits, default=0)

    # FLOP.

    @functools.cached_property
    def flop(self) -> dict[str, float]:
        """FLOP of an optimizer step over all ranks, by part."""
        recipe, data = self.recipe, self.recipe.data
        images = data.batch * data.accumulation
        found = {
            "student": images * self.student.flop(1),
            "contrast": self.engine.ranks * data.accumulation * self.student.contrast_flop(data.batch),
        }
        asked = images / recipe.loss.sds_every
        if "unet" in self.running and recipe.loss.gradient != "amortised":
            found["unet"] = asked * self.teacher.flop("predict")
        if "text" in self.running:
            found["text"] = asked * self.teacher.flop("embed")
        if "vae" in self.running:
            found["vae"] = asked * self.teacher.flop("encode")
        if recipe.loss.gradient == "amortised" and recipe.bank.refresh_every:  # K targets a pair, for so many epochs
            found["unet"] = images * recipe.bank.draws / recipe.bank.refresh_every * self.teacher.flop("answer")
        return found

    # The bank.

    @functools.cached_property
    def bank(self) -> dict[str, float]:
        """Bytes of a row by tensor, of the whole; FLOP to build it; bytes on the card while it is built."""
        recipe, teacher = self.recipe, self.teacher
        latent, text = math.prod(teacher.latent_shape), math.prod(teacher.text_shape)
        row = {"x0hat": 2 * recipe.bank.draws * latent, "abar": 4 * recipe.bank.draws, "latent": 2 * latent, "text": 2 * text}
        row["pair"] = 8
        a_row = teacher.flop("encode") + teacher.flop("embed") + recipe.bank.draws * teacher.flop("answer")
        chunk = recipe.teacher.micro_batch or CHUNK
        peak = max(teacher.encode(chunk).peak, teacher.embed().peak, teacher.answer(chunk).peak)
        found = {"row": row, "bytes_a_row": sum(row.values()), "flop_a_row": a_row, "rows": self.rows}
        found["peak"] = peak + self._kept_captions() + sum(teacher.weights(part) for part in ("unet", "text", "vae"))
        if self.rows:
            found |= {"bytes": self.rows * sum(row.values()), "flop": self.rows * a_row}
        return found

    def _counted(self) -> tuple[int | None, int | None]:
        """Image-caption pairs and images of the data on this disk, or data.samples of each."""
        data = self.recipe.data
        if data.source == "world" and data.samples is None:
            return None, None  # endless
        if data.source != "world" and not on_disk(data.source):
            return data.samples, data.samples
        self.say(f"the rows of {data.source}")
        source = open_source(replace(data, cache=None, workers=0), self.recipe.seed)
        return source.rows, len(source)


def largest(peak, limit: float, top: int, guess: int) -> int:
    """The largest k up to top with peak(k) <= limit, peak growing and nearly a line; 0 where there is none.

    Goes along the line through the last two k that were measured; halves what that hardly shrinks.
    """
    low, high, stuck = 0, top + 1, 0
    last, at_last, k = 0, 0, min(guess, top)
    while high - low > 1:
        width, found = high - low, peak(k)
        low, high = (k, high) if found <= limit else (low, k)
        stuck = 0 if 2 * (high - low) <= width else stuck + 1
        slope = (found - at_last) / (k - last)
        last, at_last = k, found
        k = int(k + (limit - found) / slope) if slope > 0 else high
        if stuck > 3:
            k, stuck = (low + high) // 2, 0
        k = max(low + 1, min(high - 1, k, 8 * max(low, 1) if high > top else high))
    return low
