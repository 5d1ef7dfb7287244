"""The random-number contract: known answers, equal bits everywhere, independence, distribution, clean code for GPUs."""

import math

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from fastsds import ops, reference, testing
from fastsds.kernels import launch, philox

# Random123's published vectors for Philox4x32-10: counter, key, words
KNOWN_ANSWERS = (
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
)
IDS = (0, 1, -1, 2**31, 2**32 + 5, -(2**63))
only_compiled = pytest.mark.skipif(launch.INTERPRETED, reason="the interpreter has no compiler")
only_kernels = pytest.mark.skipif(
    not (launch.INTERPRETED or torch.cuda.is_available()), reason="runs in test_ops.py's interpreted session"
)


def signed64(key):
    seed = key[0] | key[1] << 32
    return seed - 2**64 if seed >= 2**63 else seed


@triton.jit(do_not_specialize=["seed"])
def _known_answer_kernel(counter_ptr, out_ptr, seed, N: tl.constexpr):
    groups = tl.load(counter_ptr).to(tl.int32) + tl.zeros([N], tl.int32)
    sample_id = tl.load(counter_ptr + 1) | (tl.load(counter_ptr + 2) << 32)
    w0, w1, w2, w3 = philox.words_of(groups, seed, tl.load(counter_ptr + 3), sample_id)
    words = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), [4 * N])
    tl.store(out_ptr + tl.arange(0, 4 * N), words.to(tl.int64))


@pytest.mark.parametrize("counter, key, words", KNOWN_ANSWERS)
def test_known_answers_of_the_reference(counter, key, words):
    found = reference.philox(signed64(key), *(torch.tensor([c]) for c in counter))
    assert tuple(int(w) for w in found) == words


@only_kernels
@pytest.mark.parametrize("counter, key, words", KNOWN_ANSWERS)
def test_known_answers_of_the_kernel(counter, key, words):
    device = "cpu" if launch.INTERPRETED else "cuda"
    out = torch.empty(2, 4, dtype=torch.int64, device=device)
    _known_answer_kernel[(1,)](torch.tensor(counter, device=device), out, signed64(key), N=2)
    assert [tuple(row) for row in out.tolist()] == [words, words]


@pytest.mark.parametrize("device", testing.devices())
@pytest.mark.parametrize("seed", (0, 1, -7, 2**40 + 3, 2**63 + 11))
def test_words_and_normals_have_the_reference_s_bits(seed, device):
    draws = torch.tensor([0, 1, 2**28, 2**32 - 1, 5, 9])
    noise = ops.Noise(seed, draws, torch.tensor(IDS)).to(device)
    for n in (1, 5, 131):
        expected = reference.words(noise.seed, draws, torch.tensor(IDS), n)
        assert torch.equal(noise.words(n).cpu(), expected)
        expected = reference.normal(noise.seed, draws, torch.tensor(IDS), n)
        assert torch.equal(noise.normal(n).cpu(), expected)


@only_kernels
@pytest.mark.parametrize("block", (128, 256, 2048))
def test_independent_of_block(block, monkeypatch):
    noise = ops.Noise(3, 4, torch.arange(2)).to("cpu" if launch.INTERPRETED else "cuda")
    expected = noise.normal(1030), noise.words(1030)
    monkeypatch.setattr(launch, "block_size", lambda n: block)
    assert torch.equal(noise.normal(1030), expected[0])
    assert torch.equal(noise.words(1030), expected[1])


def test_independent_of_batch_and_length():
    noise = ops.Noise(5, 6, torch.tensor(IDS))
    whole = noise.normal((3, 4, 5))
    for i, sample_id in enumerate(IDS):
        alone = ops.Noise(5, torch.tensor([6]), [sample_id])
        assert torch.equal(alone.normal(60)[0], whole[i].flatten())
        assert torch.equal(alone.normal(7)[0], whole[i].flatten()[:7])
    assert torch.equal(noise.to("cpu").normal((3, 4, 5)), whole)


def test_every_part_of_the_counter_matters():
    base = ops.Noise(1, 2, [3]).words(8)
    others = [
        ops.Noise(1 + 2**32, 2, [3]),
        ops.Noise(2, 2, [3]),
        ops.Noise(1, 3, [3]),
        ops.Noise(1, 2 + 2**31, [3]),
        ops.Noise(1, 2, [4]),
        ops.Noise(1, 2, [3 + 2**32]),
    ]
    for other in others:
        assert not (other.words(8) == base).any()


def test_normals_against_float64_formula():
    ids = torch.arange(64)
    words = reference.words(9, torch.tensor([0]), ids, 1024).double()
    u = (torch.floor(words / 256) + 1) * 2.0**-24
    r, angle = torch.sqrt(-2 * torch.log(u[:, 0::2])), 2 * math.pi * u[:, 1::2]
    expected = torch.stack([r * angle.cos(), r * angle.sin()], -1).flatten(1)
    assert (reference.normal(9, torch.tensor([0]), ids, 1024) - expected).abs().max() < 1e-6


def test_box_muller_at_the_ends():
    edge = torch.tensor([0, 255, 256, 2**31 - 1, 2**31, 2**32 - 257, 2**32 - 256, 2**32 - 1])
    first, second = torch.meshgrid(edge, edge, indexing="ij")
    cos, sin = reference.box_muller(first.flatten(), second.flatten())
    u0, u1 = (((w.flatten() >> 8) + 1).double() * 2.0**-24 for w in (first, second))
    r = torch.sqrt(-2 * torch.log(u0))
    assert (cos - r * torch.cos(2 * math.pi * u1)).abs().max() < 1e-6
    assert (sin - r * torch.sin(2 * math.pi * u1)).abs().max() < 1e-6
    assert r.max() < 5.8


@pytest.mark.skipif(launch.INTERPRETED, reason="the same bits as on the CPU, and slow here")
def test_distribution():
    """Moments, tails, Kolmogorov-Smirnov and correlations of 2^20 normals, each within about 5 standard errors."""
    x = ops.Noise(0, 0, torch.arange(1024)).normal(1024).double()
    n = x.numel()
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs((x**power).mean().item() - moment) < 5 * math.sqrt(variance / n), power
    ordered = x.flatten().sort().values
    cdf = 0.5 * (1 + torch.erf(ordered / math.sqrt(2)))
    steps = torch.arange(n + 1, dtype=torch.float64) / n
    distance = torch.maximum((cdf - steps[:-1]).abs(), (steps[1:] - cdf).abs()).max().item()
    assert distance < 1.95 / math.sqrt(n)  # p = 0.001
    for shift in (1, 2, 3, 4):
        assert abs((x[:, shift:] * x[:, :-shift]).mean().item()) < 5 / math.sqrt(n)  # elements
        assert abs((x[shift:] * x[:-shift]).mean().item()) < 5 / math.sqrt(n)  # samples
    other = ops.Noise(0, 1, torch.arange(1024)).normal(1024).double()
    assert abs((x * other).mean().item()) < 5 / math.sqrt(n)  # visits


@pytest.mark.skipif(launch.INTERPRETED, reason="the same bits as on the CPU, and slow here")
def test_timesteps_are_uniform_and_unrelated_to_the_noise():
    ids = torch.arange(20000)
    t = ops.Noise(0, ops.draw(ops.Purpose.TIMESTEP, 0), ids).randint(600, 1000)
    assert t.dtype == torch.int64 and t.min() == 600 and t.max() == 999
    counts = torch.bincount(t - 600, minlength=400).double()
    chi2 = ((counts - 50) ** 2 / 50).sum().item()
    assert abs(chi2 - 399) < 5 * math.sqrt(2 * 399)
    eps = ops.Noise(0, ops.draw(ops.Purpose.NOISE, 0), ids).normal(4).double()
    z = (t.double() - t.double().mean()) / t.double().std()
    for statistic in (eps, eps**2 - 1, eps.abs()):
        statistic = (statistic - statistic.mean(0)) / statistic.std(0)
        assert ((z[:, None] * statistic).mean(0).abs() < 5 / math.sqrt(len(ids))).all()


def test_uniform_is_in_its_interval():
    u = ops.Noise(1, 2, torch.arange(8)).uniform(100)
    assert u.shape == (8, 100) and u.dtype == torch.float32 and u.min() > 0 and u.max() <= 1
    assert torch.equal(u, reference.uniform(1, torch.tensor([2]), torch.arange(8), 100))


def test_numpy_integers_are_integers():
    plain = ops.Noise(7, ops.draw(1, 5), [3, 4])
    other = ops.Noise(np.int64(7), ops.draw(np.int32(1), np.int64(5)), np.array([3, 4]))
    assert torch.equal(plain.normal(np.int64(5)), other.normal(5))
    largest = ops.Noise(np.uint64(2**64 - 1), 0, [np.int64(-1)])
    assert torch.equal(largest.words(4), ops.Noise(-1, 0, [-1]).words(4))


def test_draw_packs_purpose_and_visit():
    assert ops.draw(ops.Purpose.NOISE, 0) == 0
    assert ops.draw(ops.Purpose.RENDER, 2**28 - 1) == 0x6FFFFFFF
    assert ops.draw(15, 3) == 0xF0000003
    assert ops.draw(ops.Purpose.TIMESTEP, torch.tensor([0, 7])).tolist() == [1 << 28, (1 << 28) + 7]


@pytest.mark.parametrize(
    "build, message",
    (
        (lambda: ops.Noise(0.5, 0, [0]), "seed"),
        (lambda: ops.Noise(2**64, 0, [0]), "seed"),
        (lambda: ops.Noise(True, 0, [0]), "seed"),
        (lambda: ops.Noise(0, 0, [1.7]), "sample_ids: integers expected"),
        (lambda: ops.Noise(0, 0, ["a"]), "sample_ids: .* integers"),
        (lambda: ops.Noise(0, 0, [2**63]), "sample_ids: .* integers of 64 bits"),
        (lambda: ops.Noise(0, 0, 5), "sample_ids: .* integers"),
        (lambda: ops.draw(ops.Purpose.NOISE, 1.7), "visit: an int"),
        (lambda: ops.draw(0.5, 1), "purpose: an int"),
        (lambda: ops.Noise(0, -1, [0]), "draw"),
        (lambda: ops.Noise(0, 2**32, [0]), "draw"),
        (lambda: ops.Noise(0, torch.tensor([0, 1, 2]), [0, 1]), "draw: shape"),
        (lambda: ops.Noise(0, torch.tensor([-1, 1]), [0, 1]), "draw: values"),
        (lambda: ops.Noise(0, 0, torch.zeros(2)), "sample_ids: integers"),
        (lambda: ops.Noise(0, 0, torch.zeros(2, 2, dtype=torch.int64)), "sample_ids: shape"),
        (lambda: ops.Noise(0, 0, [0]).randint(5, 5), "randint"),
        (lambda: ops.Noise(0, 0, [0]).randint(0, 2.5), "high: an int"),
        (lambda: ops.Noise(0, 0, [0]).uniform(2.5), "n: an int"),
        (lambda: ops.Noise(0, 0, [0]).words(-1), "n: an int"),
        (lambda: ops.Noise(0, 0, [0]).normal((-1, 3)), "shape: ints"),
        (lambda: ops.Noise(0, 0, [0]).normal(2.0), "shape: ints"),
        (lambda: ops.Noise(0, 0, [0]).normal((2**30, 2**30)), r"shape .*: fewer than 2\^31 elements a sample"),
        (lambda: ops.draw(0, torch.tensor([2**28], dtype=torch.uint32)), "visit: values"),
        (lambda: ops.Noise(0, torch.tensor([2**63], dtype=torch.uint64), [0]), "draw: values"),
        (lambda: ops.draw(16, 0), "purpose"),
        (lambda: ops.draw(0, 2**28), "visit"),
        (lambda: ops.draw(0, torch.tensor([2**28])), "visit"),
    ),
)
def test_contract_errors(build, message):
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize("op", (philox.words, philox.normal), ids=("words", "normal"))
def test_opcheck(op):
    torch.library.opcheck(op, (3, torch.tensor([1]), torch.arange(3), 9))
    torch.library.opcheck(op, (3, torch.tensor([1, 2, 3]), torch.arange(3), 8))


@only_compiled
@pytest.mark.parametrize("arch", (80, 90, 100))
def test_compiles_clean(arch):
    """16-byte stores where rows allow them, whatever the seed's size; no fp64, no local memory, no spills."""
    draws, ids = torch.zeros(1, dtype=torch.int64), torch.arange(2)
    with testing.compile_only(arch) as kernels:
        for seed in (0, 1, -5, 2**40):
            philox._normal_cuda(seed, draws, ids, 216)
        philox._words_cuda(2**40, draws, ids, 216)
    assert len(kernels) == 5
    for kernel in kernels:
        testing.assert_clean(kernel, loads=0, stores=2)
    with testing.compile_only(arch) as kernels:
        philox._words_cuda(3, draws, ids, 17)
    testing.assert_clean(kernels[0], loads=0, stores=0)


def test_bytes_moved():
    assert philox.bytes_moved(2, 10, 4) == 32 + 80
