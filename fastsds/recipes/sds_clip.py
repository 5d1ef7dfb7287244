"""SDS-CLIP (arXiv 2307.09233): a frozen text-to-image diffusion model teaches a CLIP where things are.

    L = L_CLIP + lambda * L_SDS

f = image embedding of x, z = h_w(f), c its caption, z_t = sqrt(abar_t) z + sqrt(1 - abar_t) eps, eps_hat the teacher's
noise prediction at (z_t, t, c). B images in the contrastive batch, CHW elements in a latent.

    L_SDS   = 1/B sum_b w(t_b) * mean over elements of (eps_hat - eps)^2
    full      its gradient, through the frozen UNet
    sds       dL/dz = 2 w (eps_hat - eps) / (B CHW): the UNet's Jacobian dropped, alpha left out. With
              w = sqrt((1 - abar)/abar) (`inverse_snr_root`) this is the gradient of mean ||z - sg[x0hat(z_t, t, c)]||^2
              with no further constant, because z - x0hat = sqrt((1 - abar)/abar) (eps_hat - eps): regression to what
              the caption makes the teacher see. The two losses share that gradient, not the value.
    amortised dL/dz = 2 v (z - x0hat) / (B CHW), v = w / sqrt((1 - abar)/abar): `sds`, but the teacher was asked about the
              noised latent of the real image, so x0hat does not depend on the student and comes from a bank
    latents   a control without a teacher's UNet: mean ||z - (VAE latent of x)||^2, not weighted
    noised: false   the paper's printed form: the UNet is asked about z itself at t, and eps is compared all the same

Each sample's mean (eps_hat - eps)^2, and that times its weight (its own term of L_SDS), are counted by band of log SNR; of
`amortised`, (z - x0hat)^2 abar / (1 - abar) and v (z - x0hat)^2.

t and eps depend on (seed, sample id, visit) alone, so on no batch size, rank or restart. rho = lambda |dL_SDS/df| /
|dL_CLIP/df| is lambda with its unit taken off; `lambda: auto` chooses the lambda that holds a given rho.
"""

import torch
import torch.nn.functional as F

from fastsds import ops
from fastsds.arguments import weights
from fastsds.config import ConfigError
from fastsds.data import Batch
from fastsds.recipes.bands import NoiseBands
from fastsds.schedule import level_range, timestep_range
from fastsds.student import StudentOutput

TINY = 1e-30
MEMORY = 0.99  # of the running squared gradient norms that `lambda: auto` divides


def teacher_parts(loss, bank, head_init: str = "default") -> tuple[str, ...]:
    """The parts of the teacher that a recipe asks: none at lambda 0, or where a bank has its answers.

    Args: bank: the recipe's `bank` section.
    """
    if loss.lambda_ == 0:
        return ()
    parts = {"vae"} if loss.gradient == "latents" else {"unet", "text"}
    if loss.gradient == "amortised":
        parts = {"unet"} if bank.refresh_every else set()
    if head_init == "ridge":
        parts.add("vae")
    if bank.path is not None:
        parts -= {"vae", "text"}
    return tuple(sorted(parts))


def teacher_pixels(batch: Batch) -> torch.Tensor:
    """The batch's images at the teacher's size."""
    return batch.pixels if batch.pixels_teacher is None else batch.pixels_teacher


class SDSCLIP:
    """The loss of one contrastive batch, of which this rank holds a part.

    Args: loss: the recipe's `loss` section. teacher: None if lambda is 0 or a bank answers. seed: of timesteps and
        noise. head: the student's, to carry L_SDS's gradient back to f; needed to diagnose and for `lambda: auto`.
        micro_batch: images the UNet sees at a time, its graph freed before the next; 0: all. The gradient is the same.
        levels: a bank's range of log SNR, where it answers; else the teacher's schedule says.
    The gradient of a rank's loss, averaged over ranks, is the gradient of one rank with the whole batch.
    """

    def __init__(
        self, loss, teacher=None, seed: int = 0, world_size: int = 1, rank: int = 0, head=None, micro_batch: int = 0,
        levels: tuple[float, float] | None = None,
    ):  # fmt: skip
        from open_clip import ClipLoss

        if loss.reference != "noise":
            raise ConfigError(f"loss.reference: {loss.reference!r}, expected noise")
        if loss.gradient not in ("sds", "amortised", "full", "latents"):
            raise ConfigError(f"loss.gradient: {loss.gradient!r}, expected sds, amortised, full or latents")
        self.loss, self.teacher, self.seed, self.head = loss, teacher, seed, head
        self.world_size, self.rank, self.micro_batch = world_size, rank, micro_batch
        self.auto, self.off = loss.lambda_ == "auto", loss.lambda_ == 0
        self.clip_loss = ClipLoss(local_loss=False, gather_with_grad=True, rank=rank, world_size=world_size)
        self.running: torch.Tensor | None = None  # decayed sums of [|dL_CLIP/df|^2, |dL_SDS/df|^2]
        self.bands = NoiseBands(*levels) if levels and loss.gradient == "amortised" else None
        if self.off or loss.gradient == "amortised" or (loss.gradient == "latents" and teacher is None):
            return
        if teacher is not None and teacher.prediction_type not in ("epsilon", "v_prediction", "sample"):
            raise ConfigError(f"teacher: prediction_type {teacher.prediction_type!r} is not supported")
        if teacher is None:
            raise ValueError(f"loss.lambda is {loss.lambda_}, so the recipe needs a teacher")
        try:
            self.timesteps = timestep_range(teacher.alphas_cumprod, loss.t, loss.log_snr, loss.shift)
        except ValueError as error:
            raise ConfigError(f"loss: {error}") from error
        if loss.gradient != "latents":
            self.bands = NoiseBands(*level_range(teacher.alphas_cumprod, *self.timesteps))
            abar = teacher.alphas_cumprod[slice(*self.timesteps)]
            w = weights(loss.weighting, abar.sqrt(), (1 - abar).sqrt(), abar, 1)
            if not bool(w.isfinite().all()):
                at = self.timesteps[0] + int((~w.isfinite()).nonzero()[0])
                raise ConfigError(
                    f"loss.weighting: {loss.weighting!r} has no bound at timestep {at}, where this teacher leaves no signal; "
                    "expected a range without it (loss.t)"
                )

    def __call__(self, out: StudentOutput, batch: Batch, step: int, diagnose: bool = False) -> dict[str, torch.Tensor]:
        """The loss of one micro-batch, and its parts.

        Args: out: the student's answer to (batch.pixels, batch.student_tokens). step: optimizer steps done before; the
            k-th, 2k-th, ... step has L_SDS, with k times lambda (k = sds_every). diagnose: also measure rho and the
            cosine of the two gradients at f, over all ranks.
        Returns: 0-dim tensors: loss (to be differentiated), clip, lambda; where the teacher was asked also sds, and
            with diagnose rho, cosine, and the residual by noise band of all calls since the last diagnosis. clip is the whole
            batch's value on each rank, sds this rank's mean.
        """
        clip = self.contrastive(out, batch)
        parts = {"loss": clip, "clip": clip.detach(), "lambda": self._lambda(clip)}
        if self.off:
            return parts
        if (step + 1) % self.loss.sds_every:  # h_w keeps a (zero) gradient, so that every engine steps it alike
            return {**parts, "loss": clip + 0.0 * out.z.sum(), **self._by_band(diagnose)}
        sds, g_z = self.ask(out.z.detach(), batch)  # the UNet's graphs end here
        if self.auto or diagnose:
            squares = self._gradient_products(out, batch, g_z)
        if self.auto:
            before = torch.zeros_like(squares[:2]) if self.running is None else self.running.to(squares.device)
            self.running = MEMORY * before + squares[:2]
        weight = self._lambda(clip)
        if diagnose:
            clip_norm, sds_norm = squares[:2].sqrt().clamp_min(TINY)
            parts["rho"] = weight * sds_norm / clip_norm
            parts["cosine"] = squares[2] / (clip_norm * sds_norm)
        loss = clip + self.loss.sds_every * weight * _Inject.apply(out.z, sds.detach(), g_z)
        return {**parts, "loss": loss, "sds": sds.detach(), "lambda": weight, **self._by_band(diagnose)}

    def contrastive(self, out: StudentOutput, batch: Batch) -> torch.Tensor:
        """L_CLIP of the whole contrastive batch, the same value on every rank.

        With negatives, out.text is [2b, d] and each image also has the B wrong captions to tell apart from its own.
        """
        if self.loss.negatives == "none":
            return self.clip_loss(out.image, out.text, out.logit_scale)
        if len(out.text) != 2 * len(batch):
            raise ValueError(f"loss.negatives: text features of {len(out.text)} captions, expected 2 x {len(batch)}")
        features = torch.cat([out.image, *out.text.split(len(batch))], dim=1)
        if self.world_size > 1:
            from torch.distributed.nn import all_gather

            features = torch.cat(all_gather(features))
        image, text, negative = features.chunk(3, dim=1)
        own, wrong = out.logit_scale * image @ text.T, out.logit_scale * image @ negative.T
        labels = torch.arange(len(image), device=image.device)
        return (F.cross_entropy(torch.cat([own, wrong], dim=1), labels) + F.cross_entropy(own.T, labels)) / 2

    def ask(self, z: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """L_SDS of some images and its gradient in z, micro-batch by micro-batch. Shapes: z [b, C, h, w], a constant."""
        size, values, gradients = self.micro_batch or len(z), [], []
        for first in range(0, len(z), size):
            rows = slice(first, first + size)
            part = z[rows].requires_grad_()
            value = self.distillation(part, batch.part(rows), len(z))
            gradients.append(torch.autograd.grad(value, part)[0])
            values.append(value.detach())
        return torch.stack(values).sum(), torch.cat(gradients)

    def distillation(self, z: torch.Tensor, batch: Batch, of: int | None = None) -> torch.Tensor:
        """L_SDS of some images, not yet times lambda. Shapes: z [b, C, h, w] -> 0-dim.

        Args: of: the number of images in the mean that this is a part of; default b.
        It also counts their residuals in, by noise band.
        """
        count = (of or len(z)) * z[0].numel()
        how = {"weighting": self.loss.weighting, "reduction": count}
        if self.loss.gradient == "latents":
            if batch.latents is None and self.teacher is None:
                raise ValueError("loss.gradient: latents, but this batch has none from a bank, and there is no teacher")
            y = self.teacher.encode(teacher_pixels(batch)) if batch.latents is None else batch.latents
            return F.mse_loss(z, y.to(z.dtype), reduction="sum") / count
        if self.loss.gradient == "amortised":
            if batch.targets is None:
                raise ValueError("loss.gradient: amortised, but this batch has no targets from a bank")
            levels = batch.abar.clamp_min(TINY).sqrt(), (1 - batch.abar).sqrt()  # a schedule may end without any signal
            v = weights(self.loss.weighting, *levels, z, 1) / weights("inverse_snr_root", *levels, z, 1)
            how |= {"weighting": v, "prediction_type": "sample"}
            error = _mean_square(z, batch.targets.to(z.dtype))
            self._count(batch.abar, error * batch.abar / (1 - batch.abar), error * v)  # in eps, in L_SDS
            return ops.denoising_loss(z, None, 0, levels, x0=batch.targets.to(z.dtype), **how)
        if self.loss.captions == "shuffled" and batch.teacher_captions is batch.captions:
            raise ValueError("loss.captions: shuffled, but this batch has no shuffled captions")
        teacher, schedule = self.teacher, self.teacher.alphas_cumprod
        text = teacher.embed(batch.teacher_captions) if batch.text is None else batch.text
        t = ops.Noise(self.seed, ops.draw(ops.Purpose.TIMESTEP, batch.visits), batch.ids).randint(*self.timesteps)
        noise = ops.Noise(self.seed, ops.draw(ops.Purpose.NOISE, batch.visits), batch.ids)
        through = self.loss.gradient == "full"
        with torch.set_grad_enabled(through):
            source = z if through else z.detach()
            z_t = ops.add_noise(source, t, schedule, noise)[0] if self.loss.noised else source
            pred = teacher.predict(z_t, t, text)
            eps_hat = ops.convert(pred, z_t, t, schedule, source=teacher.prediction_type, target="epsilon")
        abar, residual = schedule[t], _mean_square(eps_hat, noise.normal(z.shape[1:]))
        self._count(abar, residual, residual * weights(self.loss.weighting, abar.sqrt(), (1 - abar).sqrt(), z, 1))
        if through:
            return ops.denoising_loss(eps_hat, noise, t, schedule, **how)
        # ops' value is half the energy and its gradient w (eps_hat - eps) / numel: twice both is L_SDS
        return 2 * ops.sds_loss(z, pred, noise, t, schedule, x_t=z_t, prediction_type=teacher.prediction_type, **how)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """What a resumed run needs: the running norms behind `lambda: auto`, and residuals that are in no row yet.

        Alike on all ranks, and collective.
        """
        bands = None if self.bands is None else self.bands.whole(self.world_size)
        return {name: value for name, value in (("running", self.running), ("bands", bands)) if value is not None}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Take back what `state_dict` gave. The sums of all ranks become rank 0's."""
        self.running = state["running"].clone() if "running" in state else None
        if self.bands is not None:
            sums = state.get("bands")
            self.bands.sums = sums if sums is None or self.rank == 0 else torch.zeros_like(sums)

    def _count(self, abar: torch.Tensor, residual: torch.Tensor, weighted: torch.Tensor) -> None:
        if self.bands is not None:
            self.bands.add(abar, residual, weighted)

    def _by_band(self, wanted: bool) -> dict[str, torch.Tensor]:
        return self.bands.means(self.world_size) if wanted and self.bands is not None else {}

    def _lambda(self, like: torch.Tensor) -> torch.Tensor:
        """lambda as it stands: fixed, or the one at which the running norms have the ratio rho. 0-dim."""
        if not self.auto:
            return torch.full_like(like, self.loss.lambda_).detach()
        if self.running is None:
            return torch.zeros_like(like).detach()
        clip, sds = self.running
        return self.loss.rho * (clip / sds.clamp_min(TINY)).sqrt()

    def _gradient_products(self, out: StudentOutput, batch: Batch, g_z: torch.Tensor) -> torch.Tensor:
        """[|g_clip|^2, |g_sds|^2, <g_clip, g_sds>] at f, over all ranks: fp32 [3]."""
        if self.head is None:
            raise ValueError("to diagnose, or for lambda: auto, the recipe needs the head: SDSCLIP(..., head=student.head)")
        f = out.image_raw.detach().requires_grad_()
        fixed = {"text": out.text.detach(), "logit_scale": out.logit_scale.detach()}
        clip = self.contrastive(out._replace(image=F.normalize(f, dim=-1), **fixed), batch)
        g_clip, g_sds = torch.autograd.grad(clip, f)[0], self.head.pull_back(f, g_z)
        products = torch.stack([(g_clip * g_clip).sum(), (g_sds * g_sds).sum(), (g_clip * g_sds).sum()])
        if self.world_size > 1:
            torch.distributed.all_reduce(products)
        return products


@torch.no_grad()
def _mean_square(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """The mean of (x - y)^2 of each sample, in fp32 or wider. Shapes: [b, ...] -> [b]."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return (x.to(wide) - y.to(wide)).square().flatten(1).mean(dim=1)


class _Inject(torch.autograd.Function):
    """A value whose gradient is known: nothing is lost to rounding, and the upstream gradient is honoured."""

    @staticmethod
    def forward(ctx, z, value, gradient):
        ctx.save_for_backward(gradient)
        return value.clone()

    @staticmethod
    def backward(ctx, upstream):
        return upstream * ctx.saved_tensors[0], None, None
