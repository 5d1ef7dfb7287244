"""Targeted distillation of tokens, forward and backward to the student: ours, the lines that users write, and torch.compile of
them, which gather the chosen tokens of both into copies.

ViLT-base's tokens against CLIP's, few chosen and nearly all; one index in eight is "no token". The percentage is of the
compulsory bytes: chosen tokens read twice, the gradient of all written once.
"""

import pytest
import torch
import torch.nn.functional as F

from fastsds import ops, testing
from fastsds.kernels import token_distill as kernels

# B, N, M, D, k
ON_GPU = ((64, 185, 197, 768, 16), (64, 185, 197, 768, 160), (256, 185, 197, 768, 32), (64, 577, 577, 1024, 64))
SHAPES = ON_GPU if torch.cuda.is_available() else ((8, 185, 197, 768, 16),)
PROVIDERS = ("ours", "eager", "compile")


def distance_of(s, t, distance):
    if distance == "cosine":
        return 1 - F.cosine_similarity(s, t, dim=-1)
    return (F.l1_loss if distance == "l1" else F.mse_loss)(s, t, reduction="none").mean(-1)


def eager(student, teacher, index_s, index_t, weight, distance):
    rows = (i.clamp(min=0)[..., None].expand(-1, -1, student.shape[2]) for i in (index_s, index_t))
    s, t = (x.gather(1, i).float() for x, i in zip((student, teacher), rows))
    kept = index_s >= 0
    d = torch.where(kept, distance_of(s, t, distance), 0.0)
    return (weight * d.sum(1) / kept.sum(1).clamp(min=1)).mean()


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("distance", ops.DISTANCES)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=("fp32", "bf16"))
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
def test_token_distill_loss(shape, dtype, distance, provider, device, measure, compile_baseline):
    batch, tokens, others, width, k = shape
    student = torch.randn(batch, tokens, width, device=device).to(dtype).requires_grad_()
    teacher = torch.randn(batch, others, width, device=device).to(torch.float16)  # as a bank of features keeps them
    index_s = torch.rand(batch, tokens, device=device).argsort(1)[:, :k].contiguous()
    index_s[:, -(k // 8) :] = -1
    index_t = torch.rand(batch, others, device=device).argsort(1)[:, :k].contiguous()
    weight = torch.rand(batch, device=device)

    def ours(student, teacher, index_s, index_t, weight, distance):
        return ops.token_distill_loss(student, teacher, index_s, index_t, weight=weight, distance=distance)

    given = (teacher, index_s, index_t, weight, distance)
    scale = batch * k * width if distance != "cosine" else batch * k  # a gradient of order one
    found = [(f(student, *given), torch.autograd.grad(scale * f(student, *given), student)[0]) for f in (ours, eager)]
    for one, other in zip(*found):
        testing.assert_close(one, other)
    baseline = compile_baseline(eager) if provider == "compile" else eager
    function = ours if provider == "ours" else baseline

    def run():
        student.grad = None
        function(student, *given).backward()

    extra = (index_t, weight)
    size = sum(kernels.bytes_moved(student, teacher, index_s, *extra, backward=backward) for backward in (False, True))
    measure(run, size)
