"""A frozen UNet by CUDA graphs: each shape's forward and backward pass recorded once, then replayed without Python.

A recording owns its activations, so that one forward pass at a time is in flight: a backward pass that comes after another
forward pass of the same shape is refused. Results and gradients are copied out (they are small), so that they outlive it.
"""

import warnings

import torch

MAX_GRAPHS = 4  # recordings a UNet keeps; each holds the activations of its shape


class _Owned(torch.autograd.Function):
    """A copy of one of the recording's buffers, in both directions."""

    @staticmethod
    def forward(ctx, x, recording):
        ctx.recording, ctx.run = recording, recording.runs
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        if ctx.run != ctx.recording.runs:
            raise RuntimeError(
                "CUDA graphs: backward after another forward pass of the same shape, which has overwritten its activations; "
                "run backward before the next forward, or accelerate_unet(cuda_graph=False)"
            )
        return g.clone(), None


class _Recording:
    def __init__(self, forward, inputs, grad):
        def run(*inputs):
            return forward(*inputs, return_dict=False)[0]

        self.runs = 0
        with torch.inference_mode(False), torch.set_grad_enabled(grad):
            samples = tuple(x.detach().clone().requires_grad_(grad and x.requires_grad) for x in inputs)
            self.replay = torch.cuda.make_graphed_callables(run, samples)

    def __call__(self, *inputs):
        self.runs += 1
        return _Owned.apply(self.replay(*(_Owned.apply(x, self) for x in inputs)), self)


class Graphs:
    """Stands for `unet.forward`. A call that cannot be replayed runs as before, with a warning that says why."""

    def __init__(self, unet):
        self.unet, self.forward, self.recordings = unet, unet.forward, {}

    def __call__(self, sample, timestep, encoder_hidden_states, *args, return_dict=True, **options):
        inputs = (sample, timestep, encoder_hidden_states)
        key, reason = None, self._reason(inputs, args, options)
        if reason is None:
            grad = torch.is_grad_enabled()
            key = (grad, self.unet.training, next(self.unet.parameters()).data_ptr())
            key += tuple((x.shape, x.stride(), x.dtype, x.requires_grad) for x in inputs)
            if key not in self.recordings and len(self.recordings) == MAX_GRAPHS:
                reason = f"{MAX_GRAPHS} other shapes are recorded"
        if reason is not None:
            warnings.warn(f"CUDA graphs: {reason}; the UNet runs without", stacklevel=4)
            return self.forward(*inputs, *args, return_dict=return_dict, **options)
        if key not in self.recordings:
            self.recordings[key] = _Recording(self.forward, inputs, grad)
        out = self.recordings[key](*inputs)
        if not return_dict:
            return (out,)
        from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput

        return UNet2DConditionOutput(sample=out)

    def _reason(self, inputs, args, options) -> str | None:
        more = [name for name, value in options.items() if value is not None]
        if args or more:
            return f"called with {', '.join(more) or 'further arguments'}"
        if not all(isinstance(x, torch.Tensor) and x.device == self.unet.device for x in inputs):
            return f"latents, time steps and text are not all tensors on {self.unet.device}"
        if torch.is_autocast_enabled(self.unet.device.type):
            return "under autocast, which keeps casts of its own"
        return None
