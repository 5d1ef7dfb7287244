"""Read a frozen teacher from a diffusers folder.

    FOLDER/unet/          UNet2DConditionModel      config.json, weights
    FOLDER/vae/           AutoencoderKL             config.json, weights
    FOLDER/text_encoder/  CLIPTextModel             config.json, weights
    FOLDER/tokenizer/     CLIPTokenizer
    FOLDER/scheduler/     scheduler_config.json     any discrete scheduler: its betas and prediction type are used
"""

import hashlib
import json
from pathlib import Path

import torch

from fastsds import quiet
from fastsds.config import ConfigError

PARTS = ("unet", "text", "vae")
FOLDERS = {"unet": ("unet",), "text": ("text_encoder", "tokenizer"), "vae": ("vae",)}


def load_parts(path: str | Path, device: str | torch.device, dtype: torch.dtype, parts: tuple[str, ...]) -> dict:
    """Load the named parts of a teacher: what `Teacher` is made of.

    Args: path: "world" (the embedded one), a local folder, or `hf-hub:ORG/NAME`: only the last is ever fetched.
        parts: of "unet", "text" and "vae"; what is left out is neither read nor needed.
    Raises: ConfigError that names the folder and the missing file.
    """
    from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel

    if unknown := set(parts) - set(PARTS):
        raise ValueError(f"parts: {sorted(unknown)}, expected some of {PARTS}")
    folder = _folder(path, parts)
    configs = {name: _read_json(folder / name / "config.json") for name in ("unet", "vae")}
    schedule = _read_json(folder / "scheduler" / "scheduler_config.json")
    sample, blocks = configs["unet"].get("sample_size"), configs["vae"].get("block_out_channels")
    if not isinstance(sample, int):
        raise ConfigError(f"{folder / 'unet' / 'config.json'}: sample_size is {sample!r}, expected an integer")
    loaded = {}
    if "unet" in parts:
        loaded["unet"] = _load(UNet2DConditionModel, folder / "unet", dtype)
    if "vae" in parts:
        loaded["vae"] = _load(AutoencoderKL, folder / "vae", dtype)
    if "text" in parts:
        from transformers import CLIPTextModel, CLIPTokenizer

        loaded["text_encoder"] = _load(CLIPTextModel, folder / "text_encoder", dtype)
        loaded["tokenizer"] = _load_tokenizer(CLIPTokenizer, folder / "tokenizer")
    for name, part in loaded.items():
        if name != "tokenizer":
            part.to(device)
    return dict(
        **loaded,
        scheduler=DDPMScheduler.from_config(schedule),
        latent_shape=(configs["unet"]["in_channels"], sample, sample),
        image_size=sample * 2 ** (len(blocks) - 1),
    )


def _folder(path: str | Path, parts: tuple[str, ...]) -> Path:
    """The local folder of a recipe's `teacher.path`; fetches a hub id that was named as one."""
    text = str(path)
    if text == "world":
        from fastsds import world

        folder = Path(world.TEACHER)
    elif text.startswith("hf-hub:"):
        from huggingface_hub import snapshot_download

        wanted = {"unet": None, "vae": None, **{f: None for part in parts for f in FOLDERS[part]}}
        patterns = ["scheduler/*.json"] + [f"{f}/*{s}" for f in wanted for s in (".json", ".txt", ".safetensors")]
        try:
            return Path(snapshot_download(text.removeprefix("hf-hub:"), allow_patterns=patterns))
        except Exception as error:
            raise ConfigError(f"teacher.path {text}: {str(error).strip().splitlines()[0]}") from error
    else:
        folder = Path(path)
    if not folder.is_dir():
        raise ConfigError(f"teacher.path: folder {folder} does not exist (expected a diffusers folder)")
    return folder


def _read_json(path: Path) -> dict:
    if not path.is_file():
        raise ConfigError(f"teacher folder {path.parents[1]}: {path.parent.name}/{path.name} is missing")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path}: not JSON: {error}") from error


def _load(kind, folder: Path, dtype: torch.dtype):
    """One pretrained part, from local files alone, its weights cast to dtype."""
    _read_json(folder / "config.json")
    names = [f.name for f in folder.iterdir() if f.suffix in (".safetensors", ".bin")]
    if not names:
        default = "model.safetensors" if folder.name == "text_encoder" else "diffusion_pytorch_model.safetensors"
        raise ConfigError(f"teacher folder {folder.parent}: {folder.name}/{default} is missing")
    options = {"variant": "fp16"} if all(".fp16." in name for name in names) else {}
    if folder.name == "text_encoder":
        options["dtype"] = dtype
    else:
        options |= {"torch_dtype": dtype, "low_cpu_mem_usage": False}  # True needs accelerate
    try:
        with quiet.loading():
            return kind.from_pretrained(str(folder), local_files_only=True, **options)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise ConfigError(f"teacher folder {folder.parent}: {folder.name}: {str(error).strip().splitlines()[0]}") from error


def _load_tokenizer(kind, folder: Path):
    if not (folder / "tokenizer.json").is_file():
        for name in ("vocab.json", "merges.txt"):
            if not (folder / name).is_file():
                raise ConfigError(f"teacher folder {folder.parent}: {folder.name}/{name} is missing")
    return kind.from_pretrained(str(folder), local_files_only=True)


def fingerprint(path: str | Path) -> dict[str, str]:
    """What tells a teacher from another: a digest of each weights file."""
    folder = _folder(path, ())
    files = sorted(folder.rglob("*.safetensors"))
    return {str(f.relative_to(folder)): hashlib.blake2b(f.read_bytes(), digest_size=16).hexdigest() for f in files}
