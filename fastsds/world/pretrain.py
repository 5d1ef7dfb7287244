"""Train the embedded world's autoencoder, teacher, student and ViLT from a seed: `python -m fastsds.world.pretrain`.

Stages in order: tokenizer, autoencoder, teacher (UNet and text encoder together, on captioned latents alone),
student, vilt (the cross-modal student: vilt.py). Each writes its folder when it ends, in fp16; a folder that is there is not
trained again unless asked for by `--only`: all of it anew takes an `--output` of its own. The log and a manifest (commit,
command, seed, checksums, the teacher's own score) stand beside.
"""

import argparse
import hashlib
import json
import shutil
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from fastsds.provenance import commit
from fastsds.world import TEACHER as TEACHER_FOLDER
from fastsds.world import WEIGHTS, models
from fastsds.world.optimize import adamw, cosine, update
from fastsds.world.scenes import COLOURS, KINDS, RELATIONS, SHAPES, WorldSource, swap_items
from fastsds.world.tokenizer import train_tokenizer
from fastsds.world.vilt import SETTINGS as VILT
from fastsds.world.vilt import train_vilt

AUTOENCODER = {"steps": 1000, "batch": 64, "lr": 2e-3, "kl": 1e-4}
TEACHER = {"steps": 2000, "batch": 64, "lr": 1.5e-3, "scenes": 60_000}
STUDENT = {"steps": 1000, "batch": 32, "lr": 1e-3, "weight_decay": 0.05}
SETTINGS = {"autoencoder": AUTOENCODER, "teacher": TEACHER, "student": STUDENT, "vilt": VILT}
LOG = "pretrain.log"
FIRST_PRETRAINING = 1 << 24  # the student's pretraining scenes are not those it is fine-tuned on


class Log:
    """Prints progress and keeps it in a file."""

    def __init__(self, path: Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        self.file, self.start, self.last = open(path, "a", encoding="utf-8"), time.monotonic(), -1e9

    def __call__(self, text: str, always: bool = True):
        now = time.monotonic()
        if not always and now - self.last < 5:
            return
        self.last = now
        line = f"[{now - self.start:7.1f} s] {text}"
        print(line, flush=True)
        self.file.write(line + "\n")
        self.file.flush()


def _unit(pixels: torch.Tensor) -> torch.Tensor:
    return pixels.float() / 127.5 - 1


def train_autoencoder(folder: Path, seed: int, log: Log, steps: int):
    """Reconstruct scenes (L2 + a light KL); the scaling factor makes latents of unit variance."""
    train_tokenizer(folder / "tokenizer")
    torch.manual_seed(seed)
    vae = models.autoencoder()
    parameters, source, hp = list(vae.parameters()), WorldSource(seed=seed), AUTOENCODER
    log(f"autoencoder: {sum(p.numel() for p in parameters):,} parameters, {steps} steps")
    optimizer = adamw(parameters, hp["lr"])
    for step in range(steps):
        x = _unit(source.load(torch.arange(step * hp["batch"], (step + 1) * hp["batch"])).pixels)
        posterior = vae.encode(x).latent_dist
        error = F.mse_loss(vae.decode(posterior.sample()).sample, x)
        loss = error + hp["kl"] * posterior.kl().mean() / x[0].numel()
        update(optimizer, loss, parameters, hp["lr"] * cosine(step, steps))
        if step % 20 == 0:
            log(f"autoencoder step {step}/{steps} mse {error.item():.5f}", always=False)
    vae.eval()
    with torch.no_grad():
        latents = vae.encode(_unit(source.load(torch.arange(4096)).pixels)).latent_dist.mean
    vae.register_to_config(scaling_factor=1 / latents.std().item())
    log(f"autoencoder done: mse {error.item():.5f}, scaling factor {vae.config.scaling_factor:.4f}")
    vae.half().save_pretrained(folder / "vae")


@torch.no_grad()
def _latents(folder: Path, source: WorldSource, n: int, log: Log) -> torch.Tensor:
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(folder / "vae", torch_dtype=torch.float32).eval()
    parts = []
    for first in range(0, n, 512):
        pixels = source.load(torch.arange(first, min(n, first + 512))).pixels
        parts.append(vae.encode(_unit(pixels)).latent_dist.mean * vae.config.scaling_factor)
        log(f"encoding scenes {first}/{n}", always=False)
    return torch.cat(parts)


_LAYOUT_SIZES = (len(COLOURS), len(COLOURS), len(SHAPES), len(SHAPES), len(RELATIONS) // 2)


def parsing_loss(pooled: torch.Tensor, heads: torch.nn.Linear, labels: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of reading the layout off a caption's pooled state. Shapes: pooled [B, d], labels [B, 5]."""
    logits = heads(pooled).split(_LAYOUT_SIZES, dim=1)
    return sum(F.cross_entropy(z, labels[:, k]) for k, z in enumerate(logits)) / len(logits)


def train_teacher(folder: Path, seed: int, log: Log, steps: int):
    """Denoise latents given captions, loss weight 1/SNR: uniform weighting is won without binding."""
    from transformers import CLIPTokenizer

    torch.manual_seed(seed)
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    text, unet, scheduler = models.text_encoder(len(tokenizer)), models.unet(), models.scheduler()
    unet.to(memory_format=torch.channels_last)
    hp, source = TEACHER, WorldSource(seed=seed)
    scenes = source.scenes(torch.arange(hp["scenes"]))
    tokens = tokenizer(scenes.captions(), padding="max_length", return_tensors="pt").input_ids
    latents = _latents(folder, source, hp["scenes"], log)
    parameters = [*unet.parameters(), *text.parameters()]
    count = [sum(p.numel() for p in m.parameters()) for m in (unet, text)]
    log(f"teacher: UNet {count[0]:,} and text encoder {count[1]:,} parameters, {steps} steps of {hp['batch']}")
    optimizer = adamw(parameters, hp["lr"])
    abar = scheduler.alphas_cumprod
    weights = (1 - abar) / abar  # 1/SNR: the squared error of x0
    weights = weights / weights.mean()
    average = [p.detach().clone() for p in parameters]
    running = None
    for step in range(steps):
        rows = torch.randint(len(latents), (hp["batch"],))
        t = torch.randint(len(abar), (hp["batch"],))
        eps = torch.randn(hp["batch"], *latents.shape[1:])
        noisy = scheduler.add_noise(latents[rows], eps, t).contiguous(memory_format=torch.channels_last)
        hidden = text(input_ids=tokens[rows]).last_hidden_state
        error = (unet(noisy, t, hidden).sample - eps).square().mean(dim=(1, 2, 3))
        loss = (weights[t] * error).mean()
        update(optimizer, loss, parameters, hp["lr"] * cosine(step, steps))
        torch._foreach_lerp_(average, parameters, 1.0 if step < 100 else 0.01)
        running = error.mean().item() if running is None else 0.98 * running + 0.02 * error.mean().item()
        if step % 10 == 0:
            log(f"teacher step {step}/{steps} error {running:.4f}", always=False)
        if step % 500 == 499:
            log(f"teacher step {step + 1}/{steps} error {running:.4f}")
    with torch.no_grad():
        for parameter, mean in zip(parameters, average, strict=True):
            parameter.copy_(mean)
    unet.to(memory_format=torch.contiguous_format).half().save_pretrained(folder / "unet")
    text.half().save_pretrained(folder / "text_encoder")
    scheduler.save_pretrained(folder / "scheduler")
    index = {
        "_class_name": "StableDiffusionPipeline",
        "feature_extractor": [None, None],
        "safety_checker": [None, None],
        "scheduler": ["diffusers", "DDPMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")


def train_student(folder: Path, seed: int, log: Log, steps: int, tokenizer: Path, parsing: bool):
    """Contrastive pretraining at batch 32: enough to name colours and shapes, not enough to bind them fully.

    `parsing` also teaches the text tower to read the layout off its captions, from labels (a control)."""
    import open_clip
    from open_clip.model import CLIP
    from safetensors.torch import save_file
    from transformers import CLIPTokenizer

    torch.manual_seed(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tokenizer / file, folder / file)
    vocabulary = len(CLIPTokenizer.from_pretrained(folder))
    config = models.student_config(vocabulary, ".")
    preprocess = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "resize_mode": "shortest"}
    description = {"model_cfg": config, "preprocess_cfg": preprocess}
    (folder / "open_clip_config.json").write_text(json.dumps(description, indent=2) + "\n")
    clip = CLIP(**config, nonscalar_logit_scale=True)
    tokenize = open_clip.get_tokenizer(f"local-dir:{folder}")
    hp, source = STUDENT, WorldSource(seed=seed)
    heads = torch.nn.Linear(config["embed_dim"], sum(_LAYOUT_SIZES))
    parameters = [*clip.parameters(), *(heads.parameters() if parsing else ())]
    log(f"student: {sum(p.numel() for p in clip.parameters()):,} parameters, {steps} steps of {hp['batch']}")
    optimizer, criterion = adamw(parameters, hp["lr"], hp["weight_decay"]), open_clip.ClipLoss()
    for step in range(steps):
        ids = FIRST_PRETRAINING + torch.arange(step * hp["batch"], (step + 1) * hp["batch"])
        samples = source.load(ids)
        image = clip.encode_image(_unit(samples.pixels))
        text = clip.encode_text(tokenize(samples.captions))
        loss = criterion(F.normalize(image, dim=-1), F.normalize(text, dim=-1), clip.logit_scale.exp().clamp(max=100.0))
        if parsing:
            loss = loss + parsing_loss(text, heads, source.scenes(ids).layout())
        update(optimizer, loss.mean(), parameters, hp["lr"] * cosine(step, steps))
        if step % 20 == 0:
            log(f"student step {step}/{steps} contrastive loss {loss.item():.4f}", always=False)
    log(f"student done: contrastive loss {loss.item():.4f}")
    state = {name: value.detach().half().contiguous() for name, value in clip.state_dict().items()}
    state["logit_scale"] = state["logit_scale"].reshape(())
    save_file(state, folder / "open_clip_model.safetensors", metadata={"format": "pt"})


def score_teacher(folder: Path, log: Log, per_kind: int = 100, draws: int = 8) -> dict[str, float]:
    """The teacher's own text and image score in percent on swap items, by split and kind (Diffusion Classifier)."""
    from fastsds.evaluation.diffusion_score import diffusion_scores
    from fastsds.evaluation.winoground import winoground
    from fastsds.teacher import Teacher

    teacher, result = Teacher.load(folder), {}
    for split in ("seen", "dev", "test"):
        items = swap_items(split, per_kind, seed=1)
        text, image, _ = winoground(diffusion_scores(teacher, items, draws=draws))
        for kind in KINDS:
            rows = [k == kind for k in items.kind]
            result[f"{split}/{kind}/text"] = round(100 * float(text[rows].mean()), 2)
            result[f"{split}/{kind}/image"] = round(100 * float(image[rows].mean()), 2)
        log(f"teacher's reading of {split} swaps: " + str({k: v for k, v in result.items() if k.startswith(split)}))
    return result


def write_manifest(folder: Path, stages: dict[str, dict], scores: dict[str, float]):
    """Say where the weights come from and what they can do; stages that were not run keep their entry.

    Args: stages: {name: {"command", "commit", "seed", "seconds", "threads", "torch"}} of what was trained now.
    """
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text()) if path.exists() else {"stages": {}, "teacher_score": {}}
    manifest["stages"] |= stages
    manifest["teacher_score"] |= scores
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p != path and p.name != LOG)
    manifest["sha256"] = {p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}
    path.write_text(json.dumps(manifest, indent=2) + "\n")


def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(prog="python -m fastsds.world.pretrain", description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, default=WEIGHTS, help="folder to write (default: the shipped weights)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=tuple(SETTINGS), help="train this stage alone")
    parser.add_argument("--parsing", action="store_true", help="student with a parsing loss on its text tower (a control)")
    parser.add_argument("--steps", type=int, help="steps of the stage given by --only")
    arguments = parser.parse_args(argv)
    if arguments.steps and not arguments.only:
        parser.error("--steps needs --only")
    output, only, seed, start = arguments.output, arguments.only, arguments.seed, time.monotonic()
    teacher, shipped = output / "teacher", TEACHER_FOLDER
    log = Log(output / LOG)

    stages: dict[str, dict] = {}

    def train(stage: str, made: Path, run, *options):
        """Run a stage if it was asked for by name, or if nothing was and its folder is not there."""
        if only != stage and (only or made.exists()):
            return
        steps, before = arguments.steps or SETTINGS[stage]["steps"], time.monotonic()
        run(made if stage in ("student", "vilt") else made.parent, seed, log, steps, *options)
        stages[stage] = {
            "command": " ".join(["python -m fastsds.world.pretrain", *(argv if argv is not None else sys.argv[1:])]),
            "commit": commit(),
            "seed": seed,
            "seconds": round(time.monotonic() - before),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
        }

    for part in ("tokenizer", "vae") if only == "teacher" else ():
        if not (teacher / part).exists():
            shutil.copytree(shipped / part, teacher / part)
    train("autoencoder", teacher / "vae", train_autoencoder)
    train("teacher", teacher / "unet", train_teacher)
    tokenizer = (teacher if (teacher / "tokenizer").exists() else shipped) / "tokenizer"
    train("student", output / "student", train_student, tokenizer, arguments.parsing)
    train("vilt", output / "vilt", train_vilt)
    scores = score_teacher(teacher, log) if "teacher" in stages else {}
    if stages:
        write_manifest(output, stages, scores)
    log(f"done in {time.monotonic() - start:.0f} s: {output}")


if __name__ == "__main__":
    main()
