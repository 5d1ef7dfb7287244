"""The student and the teacher of a recipe, without their weights: how many bytes, what they hold, what they compute.

Everything is measured on fake tensors of the CPU (`measure`), so nothing is read, fetched or allocated. Each answer is kept.
"""

import functools
from dataclasses import replace

import torch
from torch import nn

from fastsds import optimizer as optimizers
from fastsds.config import ConfigError, Recipe
from fastsds.plan.measure import Law, Use, cuda_autocast, place, use, without_storage
from fastsds.plan.states import Engine
from fastsds.recipes.sds_clip import SDSCLIP
from fastsds.student import StudentOutput, make_student
from fastsds.teacher.accelerate import accelerate_unet
from fastsds.teacher.loading import PARTS, geometry, read_configs
from fastsds.teacher.model import TEXT_CHUNK
from fastsds.teacher.sizes import STABLE_DIFFUSION_1
from fastsds.testing import count_flop

LINE = (2, 4, 8)  # images: a frozen network's law is measured at two sizes and checked at the third


class Line:
    """A number of images -> what a frozen network uses."""

    def __init__(self, measure):
        self.measure = measure

    @functools.cached_property
    def laws(self) -> tuple[Law, Law]:
        found = {n: self.measure(n) for n in LINE}
        return tuple(Law.of({n: getattr(u, name) for n, u in found.items()}) for name in ("held", "peak"))

    def __call__(self, n: int) -> Use:
        return Use(*(law(n) for law in self.laws))


class StudentSizes:
    """The student under an engine, on one rank."""

    def __init__(self, recipe: Recipe, engine: Engine, latent_shape: tuple[int, int, int] | None):
        student, trained = make_student(recipe.student, latent_shape, "meta")
        student.train()
        self.recipe, self.engine, self.trained, self.latent_shape = recipe, engine, trained, latent_shape
        self.parameters = {name: p.numel() for name, p in student.named_parameters()}
        self.groups = [[p.numel() for p in group["params"]] for group in optimizers.groups(student, recipe.optimizer)]
        if not self.groups:
            raise ConfigError("student.tune: no parameter of this student would train")
        self.frozen = [p.numel() for p in student.parameters() if not p.requires_grad]
        self.image_size, self.context_length, self.width = student.image_size, student.context_length, student.width
        self.texts = 1 if recipe.loss.negatives == "none" else 2  # captions an image
        self.mode = without_storage()
        with self.mode:
            self.student = place(student, torch.bfloat16 if engine.width == 2 else None, not engine.grows)
            self.buffers = sum(b.numel() * b.element_size() for b in student.buffers())
        self.use, self.contrast = functools.cache(self._use), functools.cache(self._contrast)

    @property
    def batch_bytes(self) -> int:
        """Of an image and its captions, as the towers read them."""
        return 3 * self.image_size**2 + 8 * self.texts * self.context_length

    def _forward(self, n: int) -> StudentOutput:
        pixels = torch.empty(n, 3, self.image_size, self.image_size, dtype=torch.uint8)
        tokens = torch.zeros(n * self.texts, self.context_length, dtype=torch.int64)
        autocast = self.recipe.precision == "bf16" and self.engine.stage is None
        if not autocast:
            return self.student(pixels, tokens)
        with cuda_autocast() if self.engine.gpu else torch.autocast("cpu", torch.bfloat16):
            return self.student(pixels, tokens)

    @staticmethod
    def _backward(out: StudentOutput) -> None:
        loss = out.image.sum() + out.text.sum() + out.logit_scale.sum()
        if out.z is not None:
            loss = loss + (out.z * torch.empty_like(out.z, requires_grad=False)).sum()
        loss.backward()

    def _use(self, n: int) -> Use:
        with self.mode:
            found = use(lambda: self._forward(n), self._backward)
        self._forget()
        return found

    def _forget(self) -> None:
        """Gradients that the engine would not have when the next backward pass begins."""
        if self.engine.grows:
            self.student.zero_grad()

    def look(self, n: int) -> int:
        """The peak of the image tower's forward pass alone, nothing kept."""
        with self.mode, torch.no_grad():
            return use(lambda: self.student(torch.empty(n, 3, self.image_size, self.image_size, dtype=torch.uint8))).peak

    def _features(self, n: int) -> StudentOutput:
        image, text = (torch.empty(rows, self.width, requires_grad=True) for rows in (n, n * self.texts))
        return StudentOutput(None, image, text, None, torch.ones((), requires_grad=True))

    def _contrastive(self, out: StudentOutput):
        """L_CLIP of a whole contrastive batch, which every rank computes."""
        objective = SDSCLIP(replace(self.recipe.loss, lambda_=0.0))
        return objective.contrastive(out, range(len(out.image)))

    def _contrast(self, n: int) -> Use:
        with self.mode:
            out = self._features(n)
            return use(lambda: self._contrastive(out), lambda loss: loss.backward())

    def flop(self, n: int) -> int:
        """FLOP of forward and backward of n images, without the contrastive loss."""
        with self.mode:
            found = count_flop(lambda: self._backward(self._forward(n)))
        self._forget()
        return found

    def contrast_flop(self, n: int) -> int:
        with self.mode:
            out = self._features(n)
            return count_flop(lambda: self._contrastive(out).backward())


class TeacherSizes:
    """The frozen teacher on one device. assumed: it is not on this disk, and Stable Diffusion 1.x's sizes are taken."""

    def __init__(self, recipe: Recipe, gpu: bool):
        configs = read_configs(recipe.teacher.path, recipe.teacher.prediction_type)
        self.assumed = configs is None
        self.configs = configs or STABLE_DIFFUSION_1
        self.latent_shape, self.image_size = geometry(self.configs)
        self.text_shape = (self.configs["text"]["max_position_embeddings"], self.configs["text"]["hidden_size"])
        self.dtype = torch.bfloat16 if gpu and recipe.precision == "bf16" else torch.float32
        self.settings = recipe.teacher
        self.through = recipe.loss.gradient == "full"
        accelerate = recipe.teacher.accelerate
        self.accelerated = gpu if accelerate == "auto" else accelerate
        self.mode = without_storage()
        self._modules: dict[str, nn.Module] = {}
        self.predict, self.answer = Line(self._predict), Line(lambda n: self._predict(n, False))
        self.encode, self.embed = Line(self._encode), functools.cache(self._embed)

    @functools.cached_property
    def parameters(self) -> dict[str, int]:
        return {part: sum(p.numel() for p in self._module(part).parameters()) for part in PARTS}

    def weights(self, part: str) -> int:
        tensors = (*self._module(part).parameters(), *self._module(part).buffers())
        return sum(v.numel() * v.element_size() for v in tensors)

    def _module(self, part: str) -> nn.Module:
        if part not in self._modules:
            module = build(part, self.configs[part]).requires_grad_(False).eval()
            with self.mode:
                place(module, self.dtype)
                if part == "unet" and self.accelerated:  # attention as any kernel of SDPA or xformers holds it
                    accelerate_unet(module, attention=None, checkpoint=self.settings.checkpoint)
            self._modules[part] = module
        return self._modules[part]

    def _ask(self, n: int, grad: bool):
        unet = self._module("unet")
        text, t = torch.empty(n, *self.text_shape, dtype=self.dtype), torch.zeros(n, dtype=torch.int64)
        with torch.set_grad_enabled(grad):
            z = torch.empty(n, *self.latent_shape, requires_grad=grad)
            return unet(z.to(self.dtype), t, encoder_hidden_states=text).sample.to(z.dtype)

    def _predict(self, n: int, grad: bool | None = None) -> Use:
        grad = self.through if grad is None else grad
        self._module("unet")
        with self.mode:
            return use(lambda: self._ask(n, grad), (lambda y: y.square().sum().backward()) if grad else None)

    def _images(self, n: int):
        vae = self._module("vae")
        with torch.no_grad():
            images = torch.empty(n, 3, self.image_size, self.image_size, dtype=torch.uint8).float() / 127.5 - 1
            return vae.encode(images.to(self.dtype)).latent_dist.mean.float()

    def _encode(self, n: int) -> Use:
        self._module("vae")
        with self.mode:
            return use(lambda: self._images(n))

    def _captions(self, n: int):
        with torch.no_grad():
            return self._module("text")(torch.zeros(n, self.text_shape[0], dtype=torch.int64))[0]

    def _embed(self) -> Use:
        """Of a run of captions: always the same number."""
        self._module("text")
        with self.mode:
            return use(lambda: self._captions(TEXT_CHUNK))

    def flop(self, what: str) -> int:
        """FLOP for one image of "predict" (as the recipe's gradient asks), "answer" (forward alone), "encode" or "embed"."""
        if what == "embed":
            run = lambda: self._captions(1)  # noqa: E731
        elif what == "encode":
            run = lambda: self._images(1)  # noqa: E731
        elif what == "predict" and self.through:
            run = lambda: self._ask(1, True).square().sum().backward()  # noqa: E731
        else:
            run = lambda: self._ask(1, False)  # noqa: E731
        self._module({"embed": "text", "encode": "vae"}.get(what, "unet"))
        with self.mode:
            return count_flop(run)


def build(part: str, config: dict) -> nn.Module:
    """A part of a teacher on the meta device."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    with torch.device("meta"):
        if part == "text":
            return CLIPTextModel(CLIPTextConfig(**{k: v for k, v in config.items() if k != "model_type"}))
        return {"unet": UNet2DConditionModel, "vae": AutoencoderKL}[part].from_config(config)
