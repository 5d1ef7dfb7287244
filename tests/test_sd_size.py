"""The recipe at Stable Diffusion v1's size: one photograph, its caption, one step each of `full` and `sds` on the CPU.

As a script it is the process whose memory is measured: it prints what it found as JSON.
"""

import json
import os
import resource
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
GIB = 1 << 30
TITLES = {"coffee.png": "a cup of coffee on a saucer", "chelsea.png": "a cat looking up", "astronaut.png": "an astronaut"}


@pytest.mark.slow
def test_a_step_at_the_size_of_stable_diffusion(python):
    done = python(__file__, env={"OMP_NUM_THREADS": str(os.cpu_count()), "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    print(found)
    assert found["unet"] == 859_520_964 and found["latents"] == [4, 64, 64]
    for gradient in ("full", "sds"):
        step = found[gradient]
        assert step["finite"] and step["sds"] > 0 and step["clip loss"] == 0.0  # one image: all of it is the teacher's
        assert step["norms"]["head"] > 0 and step["norms"]["image tower"] > 0
        assert step["trained"] == step["with gradient"] > 0
    assert found["full"]["norms"]["head"] != found["sds"]["norms"]["head"]
    assert found["teacher untouched"]
    assert found["peak"] < 14 * GIB, f"{found['peak'] / GIB:.1f} GiB"


def filled(module, device="cpu"):
    """A module without storage, given one: normalised random weights from one short stretch of noise, which is quick."""
    import torch

    module = module.to_empty(device=device)
    noise = torch.randn(1_000_003, generator=torch.Generator().manual_seed(0))
    for name, parameter in module.named_parameters():
        if parameter.ndim == 1:
            parameter.data.fill_(1.0 if name.endswith("weight") else 0.0)
        else:
            for part in parameter.data.view(-1).split(len(noise)):
                part.copy_(noise[: len(part)])
            parameter.data.mul_(parameter[0].numel() ** -0.5)
    return module.requires_grad_(False)


def build_teacher():
    """Everything of SD v1 that the recipe asks, at its size: 3.9 GB of random weights."""
    import sd
    import torch
    from diffusers import DDPMScheduler

    from fastsds.teacher import Teacher
    from fastsds.teacher.vocabulary import END, clip_tokenizer

    text = filled(sd.full_size("text", 1))
    text.embeddings.position_ids.copy_(torch.arange(77)[None])
    return Teacher(
        unet=filled(sd.full_size("unet", 1)),
        text_encoder=text,
        tokenizer=clip_tokenizer(END),
        scheduler=DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012),
        latent_shape=(4, 64, 64),
        image_size=512,
    )


def photographs(folder: Path) -> Path:
    import skimage

    there = Path(skimage.__path__[0]) / "data"
    rows = "".join(f"{there / name}\t{title}\n" for name, title in TITLES.items())
    (folder / "photographs.tsv").write_text("filepath\ttitle\n" + rows)
    return folder / "photographs.tsv"


def main(folder: Path) -> dict:
    from dataclasses import replace

    import torch

    from fastsds.config import DataConfig, LossConfig
    from fastsds.data.loader import Loader
    from fastsds.data.sources import open_source
    from fastsds.recipes.sds_clip import SDSCLIP
    from fastsds.student import apply_tuning, load_student

    teacher = build_teacher()
    before = [p.sum(dtype=torch.float64).item() for p in teacher.parameters()]
    student = load_student("ViT-B-32", None, teacher.latent_shape)
    trained = apply_tuning(student, "layernorm")
    source = open_source(DataConfig(source=str(photographs(folder))))
    batches = Loader(source, batch=1, streams=1, seed=0, image_size=student.image_size, tokenize=student.tokenize)
    found = {"unet": sum(p.numel() for p in teacher.unet.parameters()), "latents": teacher.latent_shape}
    for step, gradient in enumerate(("full", "sds")):
        batch, _ = next(batches)
        recipe = SDSCLIP(replace(LossConfig(), gradient=gradient), teacher, seed=0, head=student.head)
        start = time.perf_counter()
        losses = recipe(student(batch.pixels, batch.student_tokens), batch, step)
        losses["loss"].backward()
        gradients = {n: p.grad for n, p in student.named_parameters() if p.grad is not None}
        groups = {"head": "head.", "image tower": "clip.visual."}
        found[gradient] = {
            "seconds": time.perf_counter() - start,
            "sds": losses["sds"].item(),
            "clip loss": losses["clip"].item(),
            "finite": all(bool(g.isfinite().all()) for g in gradients.values()),
            "norms": {
                group: sum(g.square().sum().item() for n, g in gradients.items() if n.startswith(prefix)) ** 0.5
                for group, prefix in groups.items()
            },
            "trained": sum(n.startswith(("head.", "clip.visual.")) for n in trained),
            "with gradient": sum(n.startswith(("head.", "clip.visual.")) and bool(g.any()) for n, g in gradients.items()),
        }
        student.zero_grad()
    after = [p.sum(dtype=torch.float64).item() for p in teacher.parameters()]
    found["teacher untouched"] = after == before and all(p.grad is None for p in teacher.parameters())
    found["peak"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return found


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(main(Path(folder))))
    sys.stdout.flush()
