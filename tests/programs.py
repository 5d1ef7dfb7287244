"""Other people's programs, in our own words: each in eager torch as its users write it, and again with our calls in.

A program is a pair of functions of the latents x0 and a setting s, `before` and `after`; one or two statements differ. The
arithmetic is what the programs named here compute (loss value, gradient, sanitising, order of the halves), stated anew.
"""

from types import SimpleNamespace

import torch
import torch.nn.functional as F

from fastsds import ops

IMAGE, VIDEO = (3, 4, 8, 8), (2, 3, 4, 8, 8)
PROGRAMS = {}


def program(shape=IMAGE, value=True):
    """Register a class as a pair of functions. value: whether the two report the same loss."""

    def add(pair):
        PROGRAMS[pair.__name__] = SimpleNamespace(before=pair.before, after=pair.after, shape=shape, value=value)
        return pair

    return add


def guided(pred, scale):
    """u + s (c - u), the unconditional half first."""
    uncond, cond = pred.chunk(2)
    return uncond + scale * (cond - uncond)


def twice(x):
    return torch.cat([x, x])


def rows(v):
    return v.view(-1, 1, 1, 1)


def wide(x):
    """What `.float()` is to half precision; float64 is left alone."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def regression(x0, target, reduction="mean"):
    """1/2 mse to a detached target, in fp32 or better: the usual way to give x0 the gradient x0 - target."""
    return 0.5 * F.mse_loss(wide(x0), wide(target).to(wide(x0).dtype).detach(), reduction=reduction)


class Dummy(torch.autograd.Function):
    """Value zero; the given tensor, times the upstream gradient, as the gradient."""

    @staticmethod
    def forward(ctx, x, grad):
        ctx.save_for_backward(grad)
        return x.new_zeros(())

    @staticmethod
    def backward(ctx, upstream):
        return upstream * ctx.saved_tensors[0], None


# SDS


@program()
class dreamgaussian:
    """uncond first, sigma^2, nan_to_num, 1/2 mse by sum over B."""

    def before(x0, s):
        w = rows(1 - s.scheduler.alphas_cumprod[s.t])
        with torch.no_grad():
            noise = torch.randn_like(x0)
            x_t = s.scheduler.add_noise(x0, noise, s.t)
            pred = s.unet(twice(x_t), twice(s.t), s.text)
        grad = torch.nan_to_num(w * (guided(pred, 100.0) - noise))
        return regression(x0, x0 - grad, "sum") / len(x0)

    def after(x0, s):
        with torch.no_grad():
            x_t, noise = ops.add_noise(x0, s.t, s.scheduler)
            pred = s.unet(twice(x_t), twice(s.t), s.text)
        return ops.sds_loss(
            x0, pred, noise, s.t, s.scheduler, guidance_scale=100.0, weighting="sigma2", nonfinite="clamp", value="target"
        )


@program()
class dreamgaussian_cond_first:
    """The same file at a later commit: the conditional half comes first."""

    def before(x0, s):
        w = rows(1 - s.scheduler.alphas_cumprod[s.t])
        with torch.no_grad():
            noise = torch.randn_like(x0)
            x_t = s.scheduler.add_noise(x0, noise, s.t)
            cond, uncond = s.unet(twice(x_t), twice(s.t), s.text.roll(len(x0), 0)).chunk(2)
        grad = torch.nan_to_num(w * (uncond + 100.0 * (cond - uncond) - noise))
        return regression(x0, x0 - grad, "sum") / len(x0)

    def after(x0, s):
        with torch.no_grad():
            x_t, noise = ops.add_noise(x0, s.t, s.scheduler)
            cond, uncond = s.unet(twice(x_t), twice(s.t), s.text.roll(len(x0), 0)).chunk(2)
        return ops.sds_loss(
            x0, (cond, uncond), noise, s.t, s.scheduler, guidance_scale=100.0, order="cond_first", weighting="sigma2",
            nonfinite="clamp", value="target",
        )  # fmt: skip


@program()
class zero123:
    """The sum is not divided by B."""

    def before(x0, s):
        w = rows(1 - s.scheduler.alphas_cumprod[s.t])
        with torch.no_grad():
            noise = torch.randn_like(x0)
            x_t = s.scheduler.add_noise(x0, noise, s.t)
            cond, uncond = s.unet(twice(x_t), twice(s.t), s.text.roll(len(x0), 0)).chunk(2)
        grad = torch.nan_to_num(w * (uncond + 5.0 * (cond - uncond) - noise))
        return regression(x0, x0 - grad, "sum")

    def after(x0, s):
        with torch.no_grad():
            x_t, noise = ops.add_noise(x0, s.t, s.scheduler)
            cond, uncond = s.unet(twice(x_t), twice(s.t), s.text.roll(len(x0), 0)).chunk(2)
        return ops.sds_loss(
            x0, (cond, uncond), noise, s.t, s.scheduler, guidance_scale=5.0, order="cond_first", weighting="sigma2",
            nonfinite="clamp", reduction="sum", value="target",
        )  # fmt: skip


@program()
class stable_dreamfusion:
    """(grad * x).sum(), with a factor of the caller's."""

    def before(x0, s):
        w = 1 - s.scheduler.alphas_cumprod[s.t]
        with torch.no_grad():
            noise = torch.randn_like(x0)
            x_t = s.scheduler.add_noise(x0, noise, s.t)
            pred = s.unet(twice(x_t), twice(s.t), s.text)
        grad = 0.1 * rows(w) * (guided(pred, 50.0) - noise)
        return (torch.nan_to_num(grad) * x0).sum()

    def after(x0, s):
        with torch.no_grad():
            x_t, noise = ops.add_noise(x0, s.t, s.scheduler)
            pred = s.unet(twice(x_t), twice(s.t), s.text)
        return 0.1 * ops.sds_loss(
            x0, pred, noise, s.t, s.scheduler, guidance_scale=50.0, weighting="sigma2", reduction="sum", value="dot"
        )


@program()
class threestudio:
    """c + s (c - u) from (cond, uncond); nan_to_num, then a clamp."""

    def before(x0, s):
        w = rows(1 - s.scheduler.alphas_cumprod[s.t])
        with torch.no_grad():
            noise = torch.randn_like(x0)
            x_t = s.scheduler.add_noise(x0, noise, s.t)
            pred = s.unet(twice(x_t), twice(s.t), s.text.roll(len(x0), 0))
        cond, uncond = pred.chunk(2)
        grad = torch.nan_to_num(w * (cond + 20.0 * (cond - uncond) - noise)).clamp(-0.7, 0.7)
        return regression(x0, x0 - grad, "sum") / len(x0)

    def after(x0, s):
        with torch.no_grad():
            x_t, noise = ops.add_noise(x0, s.t, s.scheduler)
            pred = s.unet(twice(x_t), twice(s.t), s.text.roll(len(x0), 0))
        return ops.sds_loss(
            x0, pred, noise, s.t, s.scheduler, guidance_scale=20.0, order="cond_first", form="cond", weighting="sigma2",
            nonfinite="clamp", clip=0.7, value="target",
        )  # fmt: skip


@program()
class threestudio_unified:
    """`alphas` is the root of alpha-bar there, so that w = 1 - alphas is not sigma^2."""

    def before(x0, s):
        alphas = s.scheduler.alphas_cumprod.sqrt()
        with torch.no_grad():
            noise = torch.randn_like(x0)
            x_t = s.scheduler.add_noise(x0, noise, s.t)
            pred = guided(s.unet(twice(x_t), twice(s.t), s.text), 7.5)
        return regression(x0, x0 - rows(1 - alphas[s.t]) * (pred - noise), "sum") / len(x0)

    def after(x0, s):
        with torch.no_grad():
            x_t, noise = ops.add_noise(x0, s.t, s.scheduler)
            pred = guided(s.unet(twice(x_t), twice(s.t), s.text), 7.5)
        return ops.sds_loss(x0, pred, noise, s.t, s.scheduler, weighting=lambda alpha, sigma: 1 - alpha, value="target")


@program()
class nerfstudio:
    """The gradient itself is what the program wants: t is [1], the caller runs backward."""

    def before(x0, s):
        t = s.t[1:2]
        with torch.no_grad():
            noise = torch.randn_like(x0)
            x_t = s.scheduler.add_noise(x0, noise, t)
            pred = s.unet(twice(x_t), t, s.text)
            grad = (1 - s.scheduler.alphas_cumprod[t]) * (guided(pred, 100.0) - noise)
        return Dummy.apply(x0, grad)

    def after(x0, s):
        t = s.t[1:2]
        with torch.no_grad():
            x_t, noise = ops.add_noise(x0, t, s.scheduler)
            pred = s.unet(twice(x_t), t, s.text)
            grad = ops.sds_loss(
                x0, pred, noise, t, s.scheduler, guidance_scale=100.0, weighting="sigma2", reduction="sum", return_grad=True
            )[1]
        return Dummy.apply(x0, grad)


@program()
class sdi:
    """Regression to x0-hat: 1/2 mse by mean, over B once more."""

    def before(x0, s):
        with torch.no_grad():
            noise = torch.randn_like(x0)
            x_t = s.scheduler.add_noise(x0, noise, s.t)
            pred = guided(s.unet(twice(x_t), twice(s.t), s.text), 7.5)
            abar = rows(s.scheduler.alphas_cumprod[s.t])
            target = (x_t - (1 - abar).sqrt() * pred) / abar.sqrt()
        return regression(x0, target) / len(x0)

    def after(x0, s):
        with torch.no_grad():
            x_t, noise = ops.add_noise(x0, s.t, s.scheduler)
            pred = guided(s.unet(twice(x_t), twice(s.t), s.text), 7.5)
        return ops.sds_loss(
            x0, pred, noise, s.t, s.scheduler, weighting="inverse_snr_root", reduction=x0.numel() * len(x0), value="target"
        )


@program()
class sjc:
    """Variance exploding: x0 + sigma n, scaled for the network and cast to its dtype; the gradient from the denoiser D."""

    def before(x0, s):
        abar = s.scheduler.alphas_cumprod[s.t]
        sigma = rows(((1 - abar) / abar).sqrt())
        with torch.no_grad():
            x_t = x0 + sigma * torch.randn_like(x0)
            pred = s.unet(twice(x_t / (1 + sigma**2).sqrt()).to(x0.dtype), twice(s.t), s.text)
            denoised = x_t - sigma * guided(pred, 3.0)
        return regression(x0, x0 + (denoised - x0) / sigma, "sum") / len(x0)

    def after(x0, s):
        abar = s.scheduler.alphas_cumprod[s.t]
        sigma = rows(((1 - abar) / abar).sqrt())
        with torch.no_grad():
            x_t, noise = ops.add_noise(x0, s.t, (1.0, sigma))
            pred = s.unet(twice(x_t / (1 + sigma**2).sqrt()).to(x0.dtype), twice(s.t), s.text)
        return ops.sds_loss(x0, pred, noise, s.t, (1.0, sigma), guidance_scale=3.0, value="target")


# a second prediction instead of the noise


@program()
class vsd:
    """The adapter's prediction is the reference: a velocity, guided by a scale of its own; t is [1]."""

    def before(x0, s):
        t = s.t[1:2]
        abar = s.scheduler.alphas_cumprod[t].to(x0.dtype)
        with torch.no_grad():
            noise = torch.randn_like(x0)
            x_t = s.scheduler.add_noise(x0, noise, t)
            pred = s.unet(twice(x_t), t, s.text)
            phi = s.adapter(twice(x_t), t, s.text)
        phi = abar.sqrt() * guided(phi, 1.5) + (1 - abar).sqrt() * x_t
        grad = (1 - abar) * (guided(pred, 7.5) - phi)
        return regression(x0, x0 - torch.nan_to_num(grad.clamp(-5.0, 5.0)), "sum") / len(x0)

    def after(x0, s):
        t = s.t[1:2]
        with torch.no_grad():
            x_t, noise = ops.add_noise(x0, t, s.scheduler)
            pred = s.unet(twice(x_t), t, s.text)
            phi = s.adapter(twice(x_t), t, s.text)
        return ops.sds_loss(
            x0, pred, ops.guide(phi, 1.5), t, s.scheduler, x_t=x_t, guidance_scale=7.5,
            ref_prediction_type="v_prediction", weighting="sigma2", clip=5.0, nonfinite="clamp", value="target",
        )  # fmt: skip


@program()
class csd:
    """The classifier alone: cond - uncond."""

    def before(x0, s):
        with torch.no_grad():
            noise = torch.randn_like(x0)
            x_t = s.scheduler.add_noise(x0, noise, s.t)
            uncond, cond = s.unet(twice(x_t), twice(s.t), s.text).chunk(2)
            grad = rows(1 - s.scheduler.alphas_cumprod[s.t]) * (cond - uncond)
        return regression(x0, x0 - grad, "sum") / len(x0)

    def after(x0, s):
        with torch.no_grad():
            x_t, noise = ops.add_noise(x0, s.t, s.scheduler)
            uncond, cond = s.unet(twice(x_t), twice(s.t), s.text).chunk(2)
        return ops.sds_loss(x0, cond, uncond, s.t, s.scheduler, weighting="sigma2", value="target")


@program()
class dds:
    """A reference branch with the same noise; everything but the product under inference_mode; sum over H W."""

    def before(x0, s):
        with torch.inference_mode():
            abar = rows(s.scheduler.alphas_cumprod[s.t]).to(x0.dtype)
            noise = torch.randn_like(s.source)
            both = [abar.sqrt() * z + (1 - abar).sqrt() * noise for z in (s.source, x0)]
            pred = guided(s.unet(twice(torch.cat(both)), s.t.repeat(4), s.text.repeat_interleave(2, 0)), 7.5)
            ref, pred = pred.chunk(2)
            grad = abar.sqrt() * (1 - abar) * (pred - ref)
        return (x0 * grad.clone()).sum() / (x0.shape[2] * x0.shape[3])

    def after(x0, s):
        with torch.inference_mode():
            noise = torch.randn_like(s.source)
            both = [ops.add_noise(z, s.t, s.scheduler, noise)[0] for z in (s.source, x0)]
            pred = guided(s.unet(twice(torch.cat(both)), s.t.repeat(4), s.text.repeat_interleave(2, 0)), 7.5)
            ref, pred = pred.chunk(2)
        return ops.sds_loss(x0, pred, ref, s.t, s.scheduler, weighting=ops.power(1, 2), reduction="spatial", value="dot")


@program(value=False)
class gradient_at_x_t:
    """The gradient is given to x_t, so that x0 gets alpha times it; the value is a dummy and is not compared."""

    def before(x0, s):
        x_t = s.scheduler.add_noise(x0, s.noise, s.t)
        with torch.no_grad():
            pred = guided(s.unet(twice(x_t), twice(s.t), s.text), 7.5)
            grad = torch.nan_to_num(s.weight * (pred - s.noise))
        return Dummy.apply(x_t, grad)

    def after(x0, s):
        x_t, _ = ops.add_noise(x0, s.t, s.scheduler, s.noise)
        with torch.no_grad():
            pred = guided(s.unet(twice(x_t), twice(s.t), s.text), 7.5)
            grad = torch.nan_to_num(s.weight * (pred - s.noise))
        return ops.inject_grad(x_t, grad)


# distribution matching, score identity


def clean(x_t, pred, abar):
    """x0-hat in float64, from a prediction of epsilon."""
    abar = rows(abar).double()
    return (x_t.double() - (1 - abar).sqrt() * pred.double()) / abar.sqrt()


@program()
class dmd2:
    """Per-sample norm; x0-hats in float64, loss by mean in fp32."""

    def before(x0, s):
        abar = s.scheduler.alphas_cumprod[s.t]
        with torch.no_grad():
            noise = torch.randn_like(x0)
            x_t = s.scheduler.add_noise(x0, noise, s.t)
            fake = clean(x_t, s.adapter(x_t, s.t, s.cond), abar)
            real = clean(x_t, guided(s.unet(twice(x_t), twice(s.t), s.text), 1.75), abar)
            grad = (fake - real) / (x0 - real).abs().mean((1, 2, 3), keepdim=True)
        return regression(x0, x0 - torch.nan_to_num(grad))

    def after(x0, s):
        abar = s.scheduler.alphas_cumprod[s.t]
        with torch.no_grad():
            x_t, noise = ops.add_noise(x0, s.t, s.scheduler)
            fake = clean(x_t, s.adapter(x_t, s.t, s.cond), abar)
            real = clean(x_t, guided(s.unet(twice(x_t), twice(s.t), s.text), 1.75), abar)
        return ops.dmd_loss(x0, real, fake, nonfinite="clamp")


@program()
class dmd2_edm:
    """Variance exploding, sigma from a table of its own by t of shape [B, 1, 1, 1]; the networks predict x0."""

    def before(x0, s):
        sigma = torch.linspace(0.1, 5.0, 1000, device=x0.device)[rows(s.t)]
        with torch.no_grad():
            noise = torch.randn_like(x0)
            x_t = x0 + sigma.to(x0.dtype) * noise
            real, fake = s.unet(x_t, s.t, s.cond), s.adapter(x_t, s.t, s.cond)
            grad = (fake - real) / (x0 - real).abs().mean((1, 2, 3), keepdim=True)
        return regression(x0, x0 - grad)

    def after(x0, s):
        sigma = torch.linspace(0.1, 5.0, 1000, device=x0.device)[rows(s.t)]
        with torch.no_grad():
            x_t, noise = ops.add_noise(x0, None, (1.0, sigma))
            real, fake = s.unet(x_t, s.t, s.cond), s.adapter(x_t, s.t, s.cond)
        return ops.dmd_loss(x0, real, fake)


@program(VIDEO)
class causvid:
    """Video, a timestep a frame, flow matching with sigma looked up in the scheduler's table; x0-space c + s (c - u);
    masked mean in float64."""

    def before(x0, s):
        sigma = s.sigma[:, :, None, None, None].to(x0.dtype)
        with torch.no_grad():
            noise = torch.randn_like(x0)
            x_t = (1 - sigma) * x0 + sigma * noise
            fake = s.adapter(x_t, s.frames, s.cond)
            cond, uncond = s.unet(x_t, s.frames, s.cond), s.unet(x_t, s.frames, s.uncond)
            real = cond + 3.0 * (cond - uncond)
            grad = (fake - real) / (x0 - real).abs().mean((1, 2, 3, 4), keepdim=True)
        target = x0.double() - torch.nan_to_num(grad).double()
        return regression(x0.double()[s.mask], target[s.mask])

    def after(x0, s):
        with torch.no_grad():
            x_t, noise = ops.add_noise(x0, None, (1 - s.sigma, s.sigma))
            fake = s.adapter(x_t, s.frames, s.cond)
            cond, uncond = s.unet(x_t, s.frames, s.cond), s.unet(x_t, s.frames, s.uncond)
            real = cond + 3.0 * (cond - uncond)
        return ops.dmd_loss(x0, real, fake, mask=s.mask, nonfinite="clamp")


@program(VIDEO)
class self_forcing:
    """Flow predictions, t / 1000 as sigma, no mask."""

    def before(x0, s):
        sigma = (s.frames / 1000)[:, :, None, None, None].to(x0.dtype)
        with torch.no_grad():
            noise = torch.randn_like(x0)
            x_t = (1 - sigma) * x0 + sigma * noise
            fake, real = [x_t - sigma * net(x_t, s.frames, s.cond) for net in (s.adapter, s.unet)]
            grad = (fake - real) / (x0 - real).abs().mean((1, 2, 3, 4), keepdim=True)
        return regression(x0.double(), x0.double() - grad.double())

    def after(x0, s):
        sigma = (s.frames / 1000)[:, :, None, None, None].to(x0.dtype)
        with torch.no_grad():
            x_t, noise = ops.add_noise(x0, s.frames, s.flow)
            fake, real = [x_t - sigma * net(x_t, s.frames, s.cond) for net in (s.adapter, s.unet)]
        return ops.dmd_loss(x0, real, fake)


@program()
class fastvideo:
    """One norm for the whole batch."""

    def before(x0, s):
        with torch.no_grad():
            real, fake = s.unet(x0, s.t, s.cond), s.adapter(x0, s.t, s.cond)
            grad = torch.nan_to_num((fake - real) / (x0 - real).abs().mean())
        return regression(x0, wide(x0) - wide(grad))

    def after(x0, s):
        with torch.no_grad():
            real, fake = s.unet(x0, s.t, s.cond), s.adapter(x0, s.t, s.cond)
        return ops.dmd_loss(x0, real, fake, norm="batch", nonfinite="clamp")


@program()
class fastgen:
    """x0 + (s - 1)(x0 - x0 without the text), eps in the norm, a factor a sample."""

    def before(x0, s):
        scale = torch.tensor([0.5, 1.0, 2.0], device=x0.device)
        with torch.no_grad():
            fake, cond, uncond = s.adapter(x0, s.t, s.cond), s.unet(x0, s.t, s.cond), s.unet(x0, s.t, s.uncond)
            real = cond + (4.0 - 1) * (cond - uncond)
            norm = wide(x0 - real).abs().mean((1, 2, 3), keepdim=True) + 1e-6
            grad = (fake - real) * (rows(scale) / norm).to(x0.dtype)
        return regression(x0, x0 - grad)

    def after(x0, s):
        scale = torch.tensor([0.5, 1.0, 2.0], device=x0.device)
        with torch.no_grad():
            fake, cond, uncond = s.adapter(x0, s.t, s.cond), s.unet(x0, s.t, s.cond), s.unet(x0, s.t, s.uncond)
            real = ops.guide((cond, uncond), 4.0, order="cond_first", form="cond_minus_one")
        return ops.dmd_loss(x0, real, fake, eps=1e-6, scale=scale)


@program()
class sid_lsg:
    """Score identity: gradients to x0, through both x0-hats, and into the networks; guided by different scales."""

    def before(x0, s):
        noise = torch.randn_like(x0)
        x_t = s.scheduler.add_noise(x0, noise, s.t)
        alpha, sigma = (rows(v[s.t].sqrt()) for v in (s.scheduler.alphas_cumprod, 1 - s.scheduler.alphas_cumprod))
        real = (x_t - sigma * wide(guided(s.unet(twice(x_t), twice(s.t), s.text), 4.5))) / alpha
        fake = (x_t - sigma * wide(guided(s.adapter(twice(x_t), twice(s.t), s.text), 1.5))) / alpha
        with torch.no_grad():
            norm = wide(x0 - real).abs().mean((1, 2, 3), keepdim=True).clip(min=1e-5)
        return ((real - fake) * ((real - x0) - 1.2 * (real - fake)) / norm).sum() / len(x0)

    def after(x0, s):
        noise = torch.randn_like(x0)
        x_t = s.scheduler.add_noise(x0, noise, s.t)
        alpha, sigma = (rows(v[s.t].sqrt()) for v in (s.scheduler.alphas_cumprod, 1 - s.scheduler.alphas_cumprod))
        real = (x_t - sigma * wide(guided(s.unet(twice(x_t), twice(s.t), s.text), 4.5))) / alpha
        fake = (x_t - sigma * wide(guided(s.adapter(twice(x_t), twice(s.t), s.text), 1.5))) / alpha
        return ops.sid_loss(x0, real, fake, alpha=1.2, reduction="batch")


@program()
class sid_converted:
    """SiD at alpha 1, where it is (real - fake)(fake - x0), and our conversion instead of the scheduler's x0-hat. It keeps
    the dtype it is given: x0-hats in half precision would be rounded before they are subtracted."""

    def before(x0, s):
        abar = rows(s.scheduler.alphas_cumprod[s.t])
        x_t = s.scheduler.add_noise(x0, s.noise, s.t)
        pred = [net(x_t, s.t, s.cond) for net in (s.unet, s.adapter)]
        real, fake = [(x_t - (1 - abar).sqrt() * v) / abar.sqrt() for v in pred]
        norm = (x0 - real).abs().mean((1, 2, 3), keepdim=True).clip(min=1e-5).detach()
        return ((real - fake) * (fake - x0) / norm).sum()

    def after(x0, s):
        x_t = s.scheduler.add_noise(x0, s.noise, s.t)
        pred = [net(x_t, s.t, s.cond) for net in (s.unet, s.adapter)]
        real, fake = [ops.convert(wide(v), x_t, s.t, s.scheduler, source="epsilon", target="sample") for v in pred]
        return ops.sid_loss(x0, real, fake)


# true squared errors


@program()
class sds_clip:
    """The squared error itself, weighted, through the network."""

    def before(x0, s):
        noise = torch.randn_like(x0)
        x_t = s.scheduler.add_noise(x0, noise, s.t)
        pred = s.unet(x_t, s.t, s.cond)
        w = rows(1 - s.scheduler.alphas_cumprod[s.t])
        return (w * (wide(pred) - noise) ** 2).mean()

    def after(x0, s):
        x_t, noise = ops.add_noise(x0, s.t, s.scheduler)
        pred = s.unet(x_t, s.t, s.cond)
        return ops.denoising_loss(pred, noise, s.t, s.scheduler, weighting="sigma2")


@program()
class critic:
    """What trains an adapter or a fake score: mse to the velocity that the scheduler defines."""

    def before(x0, s):
        noise = torch.randn_like(x0)
        x_t = s.scheduler.add_noise(x0, noise, s.t)
        pred = s.adapter(x_t, s.t, s.cond)
        return F.mse_loss(wide(pred), wide(s.scheduler.get_velocity(x0, noise, s.t)))

    def after(x0, s):
        x_t, noise = ops.add_noise(x0, s.t, s.scheduler)
        pred = s.adapter(x_t, s.t, s.cond)
        return ops.denoising_loss(pred, noise, s.t, s.scheduler, x0=x0, prediction_type="v_prediction")
