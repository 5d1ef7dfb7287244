"""Targeted distillation of tokens: value and gradient against a float64 oracle, who is chosen, and what is left alone."""

import pytest
import torch
import torch.nn.functional as F

from fastsds import ops, reference, testing
from fastsds.kernels import launch, token_distill

pytestmark = pytest.mark.usefixtures("poison")
only_compiled = pytest.mark.skipif(launch.INTERPRETED, reason="the interpreter has no compiler")
# B, N, M, D, k: smallest; odd; one past a block, and more indices than tokens; widths of CLIP and ViLT at many tokens
SHAPES = ((1, 1, 1, 1, 1), (3, 5, 9, 11, 4), (2, 67, 3, 1025, 5), (2, 40, 50, 512, 17), (1, 600, 197, 768, 300))


def sample(shape, dtype=torch.float32, device="cpu", layout="contiguous", teacher_dtype=None, seed=0):
    """student (a leaf), teacher, and two indices: distinct tokens while there are as many, about a quarter of them -1."""
    batch, tokens, others, width, k = shape
    generator = torch.Generator().manual_seed(seed)
    s, t = (torch.randn(batch, n, width, generator=generator) for n in (tokens, others))
    order = torch.rand(batch, max(tokens, k), generator=generator).argsort(1)[:, :k] % tokens
    index_s = order.where(torch.rand(batch, k, generator=generator) < 0.75, -1)
    index_s[0, 0] = order[0, 0]  # at least one
    index_t = torch.randint(0, others, (batch, k), generator=generator)
    s, t = testing.arrange(s.to(device, dtype), layout), testing.arrange(t.to(device, teacher_dtype or dtype), layout)
    return s.requires_grad_(), t, index_s.to(device), index_t.to(device)


def weights(shape, device="cpu"):
    return torch.rand(shape, generator=torch.Generator().manual_seed(1)).to(device) + 0.5


def eager(student, teacher, index_s, index_t, weight=None, distance="l1"):
    """What a user writes, in the tensors' dtype."""
    total = 0.0
    for b in range(len(student)):
        kept = index_s[b] >= 0
        s, t = student[b, index_s[b][kept]], teacher[b, index_t[b][kept]]
        d = {
            "l1": lambda s, t: F.l1_loss(s, t, reduction="none").mean(-1),
            "l2": lambda s, t: F.mse_loss(s, t, reduction="none").mean(-1),
            "cosine": lambda s, t: 1 - F.cosine_similarity(s, t, dim=-1, eps=1e-8),
        }[distance](s, t)
        w = 1.0 if weight is None else weight[b].to(d.dtype) if weight.ndim == 1 else weight[b][kept].to(d.dtype)
        total = total + (w * d).sum() / max(len(s), 1)
    return total / len(student)


def check(given, weight, distance, dtype):
    """The twice-eager rule; the gradient at a scale of order one, so that the table's atol is no excuse."""
    student, teacher, *indices = given
    scale = student.numel() / student.shape[1]
    found = []
    for f, as_ in ((ops.token_distill_loss, dtype), (eager, dtype), (eager, torch.float64)):
        leaf = student if f is ops.token_distill_loss else student.detach().to(as_).requires_grad_()
        other = teacher if f is ops.token_distill_loss else teacher.to(as_)
        loss = f(leaf, other, *indices, weight=weight, distance=distance)
        found.append((loss.detach(), torch.autograd.grad(scale * loss, leaf)[0]))
    for name, ours, theirs, oracle in zip(("value", "dstudent"), *found):
        testing.assert_twice_eager(ours, theirs, oracle, dtype, name)
    assert found[0][0].dtype == torch.float32 and found[0][1].dtype == dtype


@pytest.mark.parametrize("device", testing.devices())
@pytest.mark.parametrize("dtype", testing.DTYPES)
@pytest.mark.parametrize("distance", ops.DISTANCES)
@pytest.mark.parametrize("shape", SHAPES)
def test_against_float64(shape, distance, dtype, device):
    check(sample(shape, dtype, device), weights((shape[0], shape[4]), device), distance, dtype)


@pytest.mark.parametrize("device", testing.devices())
@pytest.mark.parametrize("distance", ops.DISTANCES)
@pytest.mark.parametrize("weighted", ("no", "instances", "pairs"))
def test_weights_and_views(weighted, distance, device):
    shape = (3, 5, 9, 11, 4)
    weight = None if weighted == "no" else weights(shape[:1] if weighted == "instances" else (3, 4), device)
    s, t, *indices = sample(shape, device=device, layout="strided")
    check((s, t, *indices), weight, distance, torch.float32)
    turned = [i.t().contiguous().t() for i in indices]  # other strides, the same numbers
    plain = ops.token_distill_loss(s, t, *indices, weight=weight, distance=distance)
    assert torch.equal(ops.token_distill_loss(s, t, *turned, weight=weight, distance=distance), plain)
    contiguous = s.detach().contiguous().requires_grad_()
    assert torch.equal(ops.token_distill_loss(contiguous, t.contiguous(), *indices, weight=weight, distance=distance), plain)


@pytest.mark.parametrize("device", testing.devices())
@pytest.mark.parametrize("distance", ops.DISTANCES)
@pytest.mark.parametrize(
    "dtypes", ((torch.bfloat16, torch.float16), (torch.bfloat16, torch.float32), (torch.float32, torch.float16))
)
def test_mixed_dtypes(dtypes, distance, device):
    """Each tensor is widened as it is: bit for bit what two fp32 tensors give, the gradient rounded once."""
    s, t, *indices = sample((3, 5, 9, 16, 4), dtypes[0], device, teacher_dtype=dtypes[1])
    wide = s.detach().float().requires_grad_()
    ours, plain = (ops.token_distill_loss(*pair, *indices, distance=distance) for pair in ((s, t), (wide, t.float())))
    assert torch.equal(ours, plain)
    grads = [torch.autograd.grad(8 * loss, leaf)[0] for loss, leaf in ((ours, s), (plain, wide))]
    assert grads[0].dtype == dtypes[0] and torch.equal(grads[0], grads[1].to(dtypes[0])) and grads[0].any()


def test_reference_gradcheck():
    s, t, *indices = sample((2, 5, 4, 3, 4), torch.float64)
    indices[0][1] = torch.tensor([2, 0, 2, -1])  # one token twice
    w = weights((2, 4)).double()
    both = s, t.clone().requires_grad_()
    for d in ops.DISTANCES:
        assert torch.autograd.gradcheck(lambda s, t, d=d: reference.token_distill(s, t, *indices, w, d, 2.0), both)
        assert torch.autograd.gradcheck(lambda s, d=d: token_distill.token_distill(s, t, *indices, w, d, 2.0), s)
        assert torch.autograd.gradcheck(lambda s, d=d: ops.token_distill_loss(s, t, *indices, weight=w, distance=d), s)


@pytest.mark.parametrize("device", testing.devices())
@pytest.mark.parametrize("distance", ops.DISTANCES)
def test_what_is_not_chosen_is_left_alone(distance, device):
    """Tokens, weights and partners of nobody may hold anything: no NaN comes out, and their gradient is exactly 0."""
    s, t, index_s, index_t = sample((3, 7, 6, 20, 4), device=device)
    index_s = torch.tensor([[2, -1, 5, 0], [-1, -1, -1, -1], [1, 6, 3, 4]], device=device)
    index_t = torch.tensor([[1, 0, -1, 3], [0, 0, 0, 0], [-1, 2, 5, 0]], device=device)
    chosen = (index_s >= 0) & (index_t >= 0)
    used = [torch.zeros(v.shape[:2], dtype=torch.bool, device=device) for v in (s, t)]
    for b, j in chosen.nonzero().tolist():
        used[0][b, index_s[b, j]] = used[1][b, index_t[b, j]] = True
    w = weights((3, 4), device)

    def run(s, t, w):
        leaf = s.detach().clone().requires_grad_()
        loss = ops.token_distill_loss(leaf, t, index_s, index_t, weight=w, distance=distance)
        return loss.detach(), torch.autograd.grad(30 * loss, leaf)[0]

    nan = float("nan")
    plain = run(s, t, w)
    spoilt = run(*(v.detach().masked_fill(~u[..., None], nan) for v, u in zip((s, t), used)), w.masked_fill(~chosen, nan))
    for one, other in zip(plain, spoilt):
        assert torch.equal(one, other)
    assert not plain[1][~used[0]].any() and plain[1][used[0]].abs().amax(-1).all()
    none = torch.full_like(index_s, -1)
    leaf = s.detach().requires_grad_()
    loss = ops.token_distill_loss(leaf, t, none, distance=distance)
    assert loss == 0 and not torch.autograd.grad(loss, leaf)[0].any()


@pytest.mark.parametrize("device", testing.devices())
@pytest.mark.parametrize("distance", ops.DISTANCES)
def test_a_token_chosen_often_has_all_its_terms(distance, device):
    s, t, _, index_t = sample((2, 5, 9, 12, 6), device=device)
    index_s = torch.tensor([[1, 1, 4, 1, -1, 4], [0, 3, 0, 0, 0, 0]], device=device)
    check((s, t, index_s, index_t), weights((2, 6), device), distance, torch.float32)


@pytest.mark.parametrize("device", testing.devices())
def test_the_teachers_index_is_the_students(device):
    s, t, index, _ = sample((3, 5, 9, 12, 4), device=device)
    one, other = (ops.token_distill_loss(s, t, index, *more) for more in ((), (index,)))
    assert torch.equal(one, other)
    torch.testing.assert_close(one.double(), eager(s.double(), t.double(), index, index))


@pytest.mark.parametrize("device", testing.devices())
@pytest.mark.parametrize("distance", ops.DISTANCES)
def test_equal_tokens_and_tokens_of_no_length(distance, device):
    """The same token: distance and gradient 0, exactly but for the cosine. Zeros: finite, the cosine's distance 1."""
    s, _, index, _ = sample((3, 5, 5, 12, 4), device=device)
    loss = ops.token_distill_loss(s, s.detach(), index, distance=distance)
    grad = torch.autograd.grad(loss, s)[0]
    limit = 3e-7 if distance == "cosine" else 0
    assert loss.abs() <= limit and grad.abs().max() <= limit
    zero = torch.zeros_like(s).requires_grad_()
    check((zero, torch.zeros_like(s), index, index), None, distance, torch.float32)


@pytest.mark.parametrize("device", testing.devices())
def test_a_token_shorter_than_the_floor(device):
    """Its length is a constant, 1e-8, and so is the gradient of the cosine. (torch's own differentiates what it floored.)"""
    s, t, *indices = sample((3, 5, 9, 12, 4), device=device)
    s = s.detach().mul(1e-10).requires_grad_()
    leaf, other = s.detach().double().requires_grad_(), t.double()
    expected = 0.0
    for b, kept in enumerate(indices[0] >= 0):
        one, two = leaf[b, indices[0][b][kept]], other[b, indices[1][b][kept]]
        expected = expected + (1 - (one * two / two.norm(dim=-1, keepdim=True)).sum(-1) / 1e-8).sum() / max(kept.sum(), 1) / 3
    loss = ops.token_distill_loss(s, t, *indices, distance="cosine")
    torch.testing.assert_close(loss.double(), expected.detach(), rtol=1e-6, atol=0)
    ours, oracle = (torch.autograd.grad(v, x)[0].double() for v, x in ((loss, s), (expected, leaf)))
    torch.testing.assert_close(ours, oracle, rtol=2e-6, atol=0)


@pytest.mark.parametrize("device", testing.devices())
def test_linear_in_the_weight_the_reduction_and_the_upstream_gradient(device):
    s, t, *indices = sample((4, 5, 9, 12, 4), device=device)
    w = torch.tensor([0.5, 1.0, 2.0, 0.0], device=device)

    def run(w, scale=1.0, **how):
        loss = ops.token_distill_loss(s, t, *indices, weight=w, **how)
        return loss.detach(), torch.autograd.grad(scale * loss, s)[0]

    value, base = run(w)
    assert not base[3].any() and base[0].any()
    for found in (run(4 * w), run(w, reduction="sum"), run(w, reduction=1), run(w[:, None].expand(4, 4) * 4)):
        assert found[0] == 4 * value and torch.equal(found[1], 4 * base)
    assert torch.equal(run(w, 1024.0)[1], 1024 * base)
    half = run(w, reduction=8.0)
    assert half[0] == value / 2 and torch.equal(half[1], base / 2)


@pytest.mark.parametrize("device", testing.devices())
@pytest.mark.parametrize("distance", ops.DISTANCES)
def test_batch_and_block_do_not_matter(distance, device, monkeypatch):
    """An instance's gradient is the same alone, in any order, and whatever a program takes at once; and the same every time."""
    s, t, *indices = sample((3, 37, 40, 20, 18), device=device)

    def run(rows):
        leaf = s.detach()[rows].requires_grad_()
        given = leaf, t[rows], *(i[rows] for i in indices)
        loss = ops.token_distill_loss(*given, distance=distance, reduction="sum")
        return loss.detach(), torch.autograd.grad(loss, leaf)[0]

    value, grad = run(slice(None))
    again = run(slice(None))
    assert torch.equal(again[0], value) and torch.equal(again[1], grad)
    order = torch.tensor([2, 0, 1], device=device)
    assert torch.equal(run(order)[1], grad[order])
    for b in range(3):
        assert torch.equal(run(slice(b, b + 1))[1], grad[b : b + 1])
    monkeypatch.setattr(launch, "BLOCK", 128)
    other = run(slice(None))
    assert torch.equal(other[1], grad)
    torch.testing.assert_close(other[0], value, rtol=1e-6, atol=0)


def test_only_the_student_gets_a_gradient():
    s, t, *indices = sample((3, 5, 9, 12, 4))
    t, w = t.requires_grad_(), weights((3, 4)).requires_grad_()
    ops.token_distill_loss(s, t, *indices, weight=w).backward()
    assert s.grad.any() and t.grad is None and w.grad is None
    assert not ops.token_distill_loss(s.detach(), t, *indices, weight=w).requires_grad


def test_float64_stays_float64():
    for dtypes in ((torch.float64, torch.float32), (torch.bfloat16, torch.float64)):
        s, t, *indices = sample((3, 5, 9, 12, 4), dtypes[0], teacher_dtype=dtypes[1])
        loss = ops.token_distill_loss(s, t, *indices, weight=weights(3).half())
        assert loss.dtype == torch.float64 and torch.autograd.grad(loss, s)[0].dtype == dtypes[0]
        expected = eager(s.double(), t.double(), *indices, weight=weights(3).half())
        torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)


def test_nothing_of_the_chosen_is_stored():
    """What forward keeps is what it was given, and numbers a pair."""
    s, t, *indices = sample((4, 30, 30, 64, 20))
    held = testing.held_for_backward(lambda: ops.token_distill_loss(s, t, *indices, weight=weights((4, 20)), distance="cosine"))
    assert held == sum(v.untyped_storage().nbytes() for v in (s, t, *indices)) + 4 * 4 * 20


def test_tokens_made_in_inference_mode():
    s, t, *indices = sample((3, 5, 9, 12, 4))
    with torch.inference_mode():
        made = [v.clone() for v in (t, *indices, weights(3))]
    ours, plain = (torch.autograd.grad(ops.token_distill_loss(s, *v[:3], weight=v[3]), s)[0]
                   for v in (made, [t, *indices, weights(3)]))  # fmt: skip
    assert torch.equal(ours, plain)


@pytest.mark.parametrize("device", testing.devices())
@pytest.mark.parametrize("name, value", (("student", 5), ("student", -2), ("teacher", 9), ("teacher", 2**62)))
def test_an_index_out_of_range(name, value, device):
    """Refused by the twin; from the kernel a NaN, and nothing else is touched."""
    s, t, index_s, index_t = sample((3, 5, 9, 12, 4), device=device)
    index_s[:] = torch.tensor([0, 2, 4, -1])
    {"student": index_s, "teacher": index_t}[name][1, 2] = value
    if device == "cpu" and not launch.INTERPRETED:
        with pytest.raises(ValueError, match=rf"index_{name}: -1 or a token of 0 to . expected, got {value} at \[1, 2\]"):
            ops.token_distill_loss(s, t, index_s, index_t)
        return
    loss = ops.token_distill_loss(s, t, index_s, index_t)
    grad = torch.autograd.grad(loss, s)[0]
    assert loss.isnan() and grad[1, [0, 2]].isnan().all() and grad.isnan().sum() == 2 * 12


@pytest.mark.parametrize("distance", ops.DISTANCES)
@pytest.mark.parametrize("name, value", (("student", 5), ("student", -2), ("teacher", 2**62)))
def test_the_twin_of_an_index_out_of_range(name, value, distance):
    s, t, index_s, index_t = sample((3, 5, 9, 12, 4), torch.float64)
    index_s[:] = torch.tensor([0, 2, 4, -1])
    {"student": index_s, "teacher": index_t}[name][1, 2] = value
    given = (s, t, index_s, index_t, None, distance, 3.0)
    assert reference.token_distill(*given).isnan()
    grad = reference.token_distill_gradient(*given, torch.ones(()))
    assert grad[1, [0, 2]].isnan().all() and grad.isnan().sum() == 2 * 12


@pytest.mark.parametrize("distance", ops.DISTANCES)
def test_what_is_not_finite_is_seen(distance):
    s, t, *indices = sample((3, 5, 9, 12, 4))
    spoilt = s.detach().clone()
    spoilt[0, indices[0][0, 0], 3] = float("nan")
    leaf = spoilt.requires_grad_()
    loss = ops.token_distill_loss(leaf, t, *indices, distance=distance)
    grad = torch.autograd.grad(loss, leaf)[0]
    assert loss.isnan() and grad[0, indices[0][0, 0], 3].isnan() and grad[1:].isfinite().all()


S, K = torch.zeros(2, 5, 8), torch.zeros(2, 3, dtype=torch.int64)


@pytest.mark.parametrize(
    "call, message",
    (
        (lambda: ops.token_distill_loss(S[0], S, K), r"student: shape \[B, tokens, D\] expected, got \(5, 8\)"),
        (lambda: ops.token_distill_loss(S.long(), S, K), "student: a tensor of fp16"),
        (lambda: ops.token_distill_loss(S, None, K), "teacher: a tensor of fp16"),
        (lambda: ops.token_distill_loss(S, S[..., :4], K), r"teacher: \[B, M, D\] .* got \(2, 5, 4\)"),
        (lambda: ops.token_distill_loss(S, S[:1], K), r"teacher: \[B, M, D\] .* got \(1, 5, 8\)"),
        (lambda: ops.token_distill_loss(S, S.to("meta"), K), r"teacher: .* on meta beside \(2, 5, 8\) on cpu"),
        (lambda: ops.token_distill_loss(S, S, K.int()), "index_student: an int64 tensor expected, got torch.int32"),
        (lambda: ops.token_distill_loss(S, S, [[0], [1]]), "index_student: an int64 tensor expected, got list"),
        (lambda: ops.token_distill_loss(S, S, K[0]), r"index_student: shape \[2, k\] .* got \(3,\)"),
        (lambda: ops.token_distill_loss(S, S, K[:, :0]), r"index_student: shape \[2, k\] .* got \(2, 0\)"),
        (lambda: ops.token_distill_loss(S, S, K, K[:, :2]), r"index_teacher: shape \(2, 3\) expected, got \(2, 2\)"),
        (lambda: ops.token_distill_loss(S, S, K, K.to("meta")), "index_teacher: on meta"),
        (lambda: ops.token_distill_loss(S, S, K, weight=0.5), "weight: a float tensor expected, got float"),
        (lambda: ops.token_distill_loss(S, S, K, weight=K), "weight: a float tensor expected, got torch.int64"),
        (lambda: ops.token_distill_loss(S, S, K, weight=torch.ones(3)), r"weight: shape \(3,\)"),
        (lambda: ops.token_distill_loss(S, S, K, weight=torch.ones(2).to("meta")), "weight: on meta"),
        (lambda: ops.token_distill_loss(S, S, K, distance="L1"), "distance: one of 'l1', 'l2', 'cosine' expected, got 'L1'"),
        (lambda: ops.token_distill_loss(S, S, K, reduction="mean"), "reduction: one of 'batch', 'sum' expected, got 'mean'"),
        (lambda: ops.token_distill_loss(S, S, K, reduction=0), "reduction: a finite number above 0"),
        (lambda: ops.token_distill_loss(*[S[..., :1].expand(2, 5, 8193)] * 2, K), "at most 8192 elements of a token"),
        (lambda: ops.token_distill_loss(S, S, K[:, :1].expand(2, 8193)), "at most 8192 indices of an instance"),
    ),
)
def test_contract_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("device", testing.devices())
@pytest.mark.parametrize("distance", ops.DISTANCES)
def test_opcheck(distance, device):
    s, t, *indices = sample((3, 5, 9, 12, 4), device=device)
    one = torch.ones((), device=device)
    for weight in (None, weights((3, 4), device)):
        torch.library.opcheck(token_distill.token_distill, (s, t.half(), *indices, weight, distance, 3.0))
        torch.library.opcheck(token_distill.token_distill_gradient, (s.detach(), t, *indices, weight, distance, 3.0, one))


@pytest.mark.parametrize("dynamic", (False, True))
def test_compiles_as_one_graph(dynamic):
    def loss(s, t, index_s, index_t, w):
        one = ops.token_distill_loss(s, t, index_s, index_t, weight=w)
        return one + ops.token_distill_loss(s, t, index_s, index_t, distance="cosine", reduction="sum")

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for shape in ((3, 5, 9, 12, 4), (2, 6, 7, 10, 3)):
        s, t, *indices = sample(shape)
        given = t, *indices, weights((shape[0], shape[4]))
        ours, plain = compiled(s, *given), loss(s, *given)
        assert torch.equal(ours, plain)
        assert torch.equal(*(torch.autograd.grad(v, s)[0] for v in (ours, plain)))


@only_compiled
@pytest.mark.parametrize("arch", (80, 90, 100))
@pytest.mark.parametrize("dtype", testing.DTYPES)
@pytest.mark.parametrize("shape", ((2, 240, 240, 512, 32), (2, 240, 240, 768, 16), (2, 600, 577, 1024, 300)))
def test_compiles_clean(shape, dtype, arch):
    """Wide accesses of both tensors and of the gradient, no call into a library, no spills."""
    s, t, index_s, index_t = sample(shape, dtype)
    s, w = s.detach(), weights((shape[0], shape[4]))
    with testing.compile_only(arch) as kernels:
        for distance in ops.DISTANCES:
            given = (s, t, index_s, index_t, w if distance != "l2" else None, distance, 2.0)
            token_distill._distill_cuda(*given)
            token_distill._gradient_cuda(*given, torch.ones(()))
    assert len(kernels) == 6
    for kernel, stores in zip(kernels, (0, 1) * 3):
        testing.assert_clean(kernel, loads=2, stores=stores)


@only_compiled
def test_views_compile_clean():
    """Widths and strides that no power of two divides; eight elements that one does; the widest."""
    index = torch.zeros(2, 5, dtype=torch.int64)
    for x, wide in ((torch.zeros(2, 9, 515), 0), (torch.zeros(2, 9, 1032).to(torch.float16)[..., ::2], 0),
                    (torch.zeros(2, 9, 40, dtype=torch.bfloat16), 1), (torch.zeros(1, 3, 8192), 2)):  # fmt: skip
        with testing.compile_only(90) as kernels:
            token_distill._distill_cuda(x, x, index[: len(x)], index[: len(x)], None, "cosine", 2.0)
            token_distill._gradient_cuda(x, x, index[: len(x)], index[: len(x)], None, "cosine", 2.0, torch.ones(()))
        for kernel in kernels:
            testing.assert_clean(kernel, loads=wide, stores=0)


def test_bytes_moved():
    s, t = torch.zeros(2, 5, 8), torch.zeros(2, 3, 8, dtype=torch.float16)
    index = torch.tensor([[0, -1], [1, 2]])
    assert token_distill.bytes_moved(s, t, index) == 3 * 8 * 6 + 32
    assert token_distill.bytes_moved(s, t, index, index, torch.ones(2, 2)) == 3 * 8 * 6 + 64 + 16
    assert token_distill.bytes_moved(s, t, index, backward=True) == 3 * 8 * 6 + 32 + 320
