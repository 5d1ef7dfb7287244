"""The whole SDS-CLIP step, batch 32: as a careful user of diffusers and open_clip writes it, and ours.

    diffusers                 the paper's loss through the UNet: bf16, CLIP by autocast, SDPA, AdamW
    + compile                 the same, UNet and CLIP compiled, channels_last
    + xformers, 8-bit Adam    the same as the first, with xformers' attention and bitsandbytes' AdamW8bit
    full, sds, amortised      ours, made of the trainer's own parts; on a GPU the teacher is accelerated and asked 8 at a time

ViT-B/16 and Stable Diffusion v1 with random weights on a GPU; the embedded world's models on the CPU. CLIP's LayerNorms and
h_w train. Images are decoded and captions embedded beforehand, for all alike.
"""

import contextlib
import time

import open_clip
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastsds import config, ops, testing
from fastsds.data import Batch
from fastsds.engine import TorchEngine
from fastsds.recipes import sds_clip
from fastsds.student import apply_tuning, load_student
from fastsds.teacher import Teacher, accelerate_unet

GPU = torch.cuda.is_available()
BATCH, MICRO_BATCH = 32, 8
LAMBDA = 30.0
STUDENT = "ViT-B-16" if GPU else "world"
NO_GPU = "needs a CUDA device"
OURS = {
    "full": ("loss.gradient=full", "loss.weighting=uniform", "loss.t=[0.0, 1.0]"),
    "sds": ("loss.gradient=sds",),
    "amortised": ("loss.gradient=amortised", "bank.path=given"),
}


class Spans:
    """Where a step's time goes: seconds by name, of what is innermost. Waits for the device at every mark."""

    def __init__(self):
        self.seconds, self.open, self.on = {}, [], False

    def mark(self):
        if GPU:
            torch.cuda.synchronize()
        now = time.perf_counter()
        if self.open:
            self.seconds[self.open[-1]] = self.seconds.get(self.open[-1], 0.0) + now - self.since
        self.since = now

    @contextlib.contextmanager
    def __call__(self, name):
        if not self.on:
            yield
            return
        self.mark()
        self.open.append(name)
        try:
            yield
        finally:
            self.mark()
            self.open.pop()

    def rename(self, name):
        """What is innermost now goes on under another name."""
        if self.on:
            self.mark()
            self.open[-1] = name

    def around(self, owner, attribute, name):
        inner = getattr(owner, attribute)

        def spanned(*args, **kwargs):
            with self(name):
                return inner(*args, **kwargs)

        setattr(owner, attribute, spanned)


class Step:
    """One optimizer step; `split()` runs a few more with the spans on. milliseconds by part; idle is what no part had."""

    def __init__(self, network, device):
        self.spans, self.network, self.device = Spans(), network, device
        self.student = load_student(STUDENT, None, network.latent, device, seed=0)
        apply_tuning(self.student, "layernorm", head=True)
        torch.manual_seed(0)
        size = self.student.image_size
        self.captions = [f"a red ring left of a blue square, number {i}" for i in range(BATCH)]
        self.pixels = torch.randint(0, 256, (BATCH, 3, size, size), dtype=torch.uint8)
        self.tokens = self.student.tokenize(self.captions)
        self.text = torch.randn(BATCH, *network.text, device=device, dtype=network.dtype)
        self.step = 0

    def split(self, steps=5):
        self.spans.on = True
        start = time.perf_counter()
        for _ in range(steps):
            self()
        wall, self.spans.on = time.perf_counter() - start, False
        found = {name: 1e3 * seconds / steps for name, seconds in self.spans.seconds.items()}
        return {**found, "idle": 1e3 * wall / steps - sum(found.values())}


class Ours(Step):
    def __init__(self, network, device, gradient):
        super().__init__(network, device)
        precision = "precision=bf16" if GPU else "precision=fp32"
        recipe = config.load_recipe(None, [*OURS[gradient], precision, "data.accumulation=1", f"loss.lambda={LAMBDA}"])
        teacher = None
        if gradient != "amortised":
            unet = network.make()
            if GPU:
                accelerate_unet(unet)
            teacher = Teacher(unet=unet, scheduler=scheduler(), latent_shape=network.latent, image_size=8 * network.latent[1])
        self.engine = TorchEngine(self.student, recipe)
        self.objective = sds_clip.SDSCLIP(recipe.loss, teacher, head=self.student.head, micro_batch=MICRO_BATCH if GPU else 0)
        self.targets = torch.randn(BATCH, *network.latent).half()
        self.abar = testing.alphas_cumprod()[torch.randint(500, 900, (BATCH,))]
        spans = self.spans
        spans.around(self.engine, "backward", "student")
        spans.around(self.engine, "step", "optimizer")
        spans.around(self.objective, "contrastive", "student")
        spans.around(self.objective, "ask", "teacher backward" if gradient == "full" else "loss ops")
        if teacher:
            spans.around(teacher, "predict", "teacher forward")
        self.ops = {name: getattr(ops, name) for name in ("add_noise", "convert", "sds_loss", "denoising_loss")}

    def __call__(self):
        with self.spans("data"):
            ids = torch.arange(BATCH, device=self.device)
            batch = Batch(
                ids=ids, visits=ids * 0 + self.step, pixels=self.pixels.to(self.device), captions=self.captions,
                tokens=self.tokens.to(self.device), text=self.text, targets=self.targets.to(self.device),
                abar=self.abar.to(self.device),
            )  # fmt: skip
        with self.spans("student"):
            out = self.engine(batch.pixels, batch.student_tokens)
        values = self.objective(out, batch, self.step)
        self.engine.backward(values["loss"])
        self.engine.step()
        self.step += 1

    def split(self, steps=5):
        for name in self.ops:
            self.spans.around(ops, name, "loss ops")
        try:
            return super().split(steps)
        finally:
            for name, op in self.ops.items():
                setattr(ops, name, op)


class Careful(Step):
    """What a user who knows both libraries writes."""

    def __init__(self, network, device, compile=False, xformers=False, eight_bit=False):
        super().__init__(network, device)
        self.clip, self.head = self.student.clip, self.student.head.linear
        self.unet, self.scheduler = network.make(), scheduler()
        if xformers:
            self.unet.enable_xformers_memory_efficient_attention()
        if compile:
            self.unet.to(memory_format=torch.channels_last)
            self.unet, self.clip = torch.compile(self.unet), torch.compile(self.clip)
        trained = [p for p in self.student.parameters() if p.requires_grad]
        self.trained, make = trained, torch.optim.AdamW
        if eight_bit:
            from bitsandbytes.optim import AdamW8bit as make
        self.optimizer = make(trained, lr=1e-4)
        self.contrast = open_clip.ClipLoss()
        cfg = self.student.clip.visual.preprocess_cfg
        self.mean, self.std = (torch.tensor(cfg[key], device=device).view(1, 3, 1, 1) for key in ("mean", "std"))
        self.cast = torch.autocast("cuda", torch.bfloat16) if GPU else contextlib.nullcontext()

    def __call__(self):
        spans = self.spans
        with spans("data"):
            pixels, tokens = self.pixels.to(self.device), self.tokens.to(self.device)
        with spans("student"), self.cast:
            images = (pixels.float() / 255 - self.mean) / self.std
            image, text, scale = self.clip(images, tokens)[:3]
            image, text = F.normalize(image, dim=-1), F.normalize(text, dim=-1)
            clip = self.contrast(image.float(), text.float(), scale)
            z = self.head(image * image.shape[-1] ** 0.5).unflatten(1, self.network.latent)
        with spans("loss ops"):
            z.register_hook(lambda _: spans.rename("student"))
            t = torch.randint(0, 1000, (BATCH,), device=self.device)
            eps = torch.randn_like(z)
            z_t = self.scheduler.add_noise(z, eps, t)
        with spans("teacher forward"):  # in its own bf16: autocast would run its norms in fp32
            pred = self.unet(z_t.to(self.network.dtype), t, encoder_hidden_states=self.text).sample
        with spans("loss ops"):
            loss = clip + LAMBDA * F.mse_loss(pred.float(), eps.float())
        with spans("teacher backward"):
            loss.backward()
        with spans("optimizer"):
            nn.utils.clip_grad_norm_(self.trained, 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()


def scheduler():
    from diffusers import DDPMScheduler

    return DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)


def floors(network, device):
    """FLOP of a step by gradient, counted by torch on plain modules: CLIP's, and the UNet's at batch 1 times 32."""
    clip = testing.count_flop(Ours(network, device, "amortised"))
    unet = network.make()
    z = torch.randn(1, *network.latent, device=device, dtype=network.dtype, requires_grad=True)
    text, t = torch.randn(1, *network.text, device=device, dtype=network.dtype), torch.tensor([500], device=device)
    forward = testing.count_flop(torch.no_grad()(lambda: unet(z, t, text).sample))
    both = testing.count_flop(lambda: unet(z, t, text).sample.sum().backward())
    return {"full": clip + BATCH * both, "sds": clip + BATCH * forward, "amortised": clip}


def test_step(network, device, benchmark, side_by_side):
    check(network, device)
    timed = GPU or not benchmark.disabled
    providers = {
        "diffusers": lambda: Careful(network, device),
        "+ compile": (lambda: Careful(network, device, compile=True)) if timed else "compiled only where it is timed",
        "+ xformers, 8-bit Adam": (lambda: Careful(network, device, xformers=True, eight_bit=True)) if GPU else NO_GPU,
        **{name: lambda name=name: Ours(network, device, name) for name in OURS},
    }
    work = floors(network, device)
    flop = {name: work.get(name, work["full"]) for name in providers}
    clip = "ViT-B/16" if GPU else "the embedded world's CLIP"
    of = f"One step of {BATCH} pairs, {clip} and {network.name}; LayerNorms and h_w train."
    side_by_side(providers, flop=flop, samples=BATCH, dtype=network.dtype, of=of)


def check(network, device):
    """No number without this: at equal noise and timesteps, the careful user's gradient of h_w is ours."""
    ours, theirs = Ours(network, device, "full"), Careful(network, device)
    ids = torch.arange(BATCH, device=device)
    t, eps = (ops.Noise(0, ops.draw(of, ids * 0), ids) for of in (ops.Purpose.TIMESTEP, ops.Purpose.NOISE))
    t, eps = t.randint(0, 1000), eps.normal(network.latent)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "randint", lambda *_, **__: t)
        patch.setattr(torch, "randn_like", lambda like: eps.to(like.dtype))
        for step in (ours, theirs):
            patch.setattr(step.engine if step is ours else step.optimizer, "step", lambda *_: None)
            patch.setattr(nn.utils, "clip_grad_norm_", lambda *_: None)
            patch.setattr(step.engine.optimizer if step is ours else step.optimizer, "zero_grad", lambda *_: None)
            step()
    a, b = (step.student.head.linear.weight.grad.double() for step in (ours, theirs))
    error = float((a - b).norm() / b.norm())
    assert error < (0.05 if network.dtype == torch.bfloat16 else 1e-4), f"gradients of h_w differ by {error:.2g} of their norm"
