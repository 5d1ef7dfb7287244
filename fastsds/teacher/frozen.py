"""Layers of a frozen UNet that compute what diffusers' compute and keep less of it for the backward pass.

    y = conv(x, W) + b        dx = conv^T(dy, W): W alone. torch keeps x as well, for a dW that nobody wants
    y = silu(norm(x))         x, once. torch keeps x and norm(x)
    y = h gelu(q)             (h, q). torch keeps them and gelu(q)
    (h, q) = W x + b          x alone where x is narrow: the product is made again in the backward pass

Each is a subclass of the layer that it stands for, and takes its place by `module.__class__ = subclass`: the module, its
parameters and the keys of the state dict stay as they are, and undoing it is setting the class back. Under autocast the
forward pass rounds its operands to the output's dtype; the backward passes here do the same.
"""

import torch
import torch.nn.functional as F
from diffusers.models.activations import GEGLU
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import nn

from fastsds import ops
from fastsds.kernels.geglu import geglu_gradient


class _Convolution(torch.autograd.Function):
    """The gradient to x is the transposed convolution: cuDNN's and oneDNN's own kernel for it, and it does not read x."""

    @staticmethod
    def forward(ctx, x, weight, bias, stride, padding, dilation, groups):
        ctx.save_for_backward(weight)
        ctx.size, ctx.dtype = x.shape[2:], x.dtype
        ctx.geometry = stride, padding, dilation, groups
        return F.conv2d(x, weight, bias, stride, padding, dilation, groups)

    @staticmethod
    def backward(ctx, g):
        (weight,) = ctx.saved_tensors
        stride, padding, dilation, groups = ctx.geometry
        rest = tuple(  # rows and columns of x that the strided kernel never reached
            (n + 2 * p - d * (k - 1) - 1) % s
            for n, p, d, k, s in zip(ctx.size, padding, dilation, weight.shape[2:], stride)
        )
        dx = F.conv_transpose2d(g, weight.to(g.dtype), None, stride, padding, rest, groups, dilation)
        return dx.to(ctx.dtype), *[None] * 6


class FrozenConv2d(nn.Conv2d):
    def forward(self, x):
        _frozen(self.weight)
        padding = self.padding
        if self.padding_mode != "zeros":  # "circular" makes textures that tile
            x, padding = F.pad(x, self._reversed_padding_repeated_twice, self.padding_mode), (0, 0)
        return _Convolution.apply(x, self.weight, self.bias, self.stride, padding, self.dilation, self.groups)


class FusedGroupNorm(nn.GroupNorm):
    silu = False

    def forward(self, x):
        return ops.group_norm_silu(x, self.weight, self.bias, self.num_groups, self.eps, silu=self.silu)


class FusedGroupNormSiLU(FusedGroupNorm):
    silu = True


class PassedSiLU(nn.SiLU):
    """The norm before it has applied it."""

    def forward(self, x):
        return x


class FusedResnetBlock2D(ResnetBlock2D):
    """With the time step added between the convolutions, and SiLU: what `time_embedding_norm="default"` stands for.

    A factor of 1 is not divided by: diffusers reads and writes the block's output once more for it.
    """

    def forward(self, input_tensor, temb=None):
        x = input_tensor
        h = _group_norm_silu(self.norm1, x)
        resample = self.upsample or self.downsample
        if resample is not None:
            x, h = resample(x), resample(h)
        h = self.conv1(h)
        if self.time_emb_proj is not None:
            h = h + self.time_emb_proj(temb if self.skip_time_act else F.silu(temb))[:, :, None, None]
        h = self.conv2(self.dropout(_group_norm_silu(self.norm2, h)))
        if self.conv_shortcut is not None:
            x = self.conv_shortcut(x)
        return x + h if self.output_scale_factor == 1 else (x + h) / self.output_scale_factor


class DenseTransformer2D(Transformer2DModel):
    """Leaves its result in channels_last: diffusers' `.contiguous()` copies it into another format than its neighbours'."""

    def _get_output_for_continuous_inputs(self, hidden_states, residual, batch_size, height, width, inner_dim):
        h = self.proj_out(hidden_states) if self.use_linear_projection else hidden_states
        h = h.unflatten(1, (height, width)).permute(0, 3, 1, 2)
        return (h if self.use_linear_projection else self.proj_out(h)) + residual


class FusedLayerNorm(nn.LayerNorm):
    def forward(self, x):
        return ops.layer_norm(x, self.weight, self.bias, self.eps)


class FusedGEGLU(GEGLU):
    def forward(self, hidden_states):
        return ops.geglu(self.proj(hidden_states))


class _Gate(torch.autograd.Function):
    """geglu(W x + b), which keeps x, an eighth of what the gate reads."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight, bias)
        return ops.geglu(F.linear(x, weight, bias))

    @staticmethod
    def backward(ctx, g):
        x, *weights = ctx.saved_tensors
        weight, bias = (v if v is None else v.to(g.dtype) for v in weights)
        dx = geglu_gradient(g, F.linear(x.to(g.dtype), weight, bias)) @ weight
        return dx.to(x.dtype), None, None


class RemadeGEGLU(GEGLU):
    def forward(self, hidden_states):
        _frozen(self.proj.weight)
        return _Gate.apply(hidden_states, self.proj.weight, self.proj.bias)


def _group_norm_silu(norm, x):
    return ops.group_norm_silu(x, norm.weight, norm.bias, norm.num_groups, norm.eps)


def _frozen(weight):
    if weight.requires_grad:
        raise ValueError("weight: requires a gradient, which this accelerated layer does not compute: undo() first")
