"""Load a frozen teacher from a diffusers folder and ask it.

    FOLDER/unet/          UNet2DConditionModel      config.json, weights
    FOLDER/vae/           AutoencoderKL             config.json, weights
    FOLDER/text_encoder/  CLIPTextModel             config.json, weights
    FOLDER/tokenizer/     CLIPTokenizer
    FOLDER/scheduler/     scheduler_config.json     any discrete scheduler: its betas and prediction type are used

The teacher is outside everything that trains, shards or saves: it is no nn.Module, so it can be nobody's submodule,
and no parameter of it has a gradient.
"""

import json
from collections import OrderedDict
from pathlib import Path

import torch

from fastsds import quiet
from fastsds.config import ConfigError

PARTS = ("unet", "text", "vae")
FOLDERS = {"unet": ("unet",), "text": ("text_encoder", "tokenizer"), "vae": ("vae",)}
TEXT_CHUNK = 16  # captions are embedded in runs of one fixed shape: a caption's bits depend on no other caption
CACHE_BYTES = 256 << 20


class Teacher:
    """A frozen latent diffusion model. Latents are scaled: (VAE mean - shift_factor) * scaling_factor.

    alphas_cumprod: [T] fp32; prediction_type: "epsilon", "v_prediction" or "sample"; latent_shape: (C, h, w);
    image_size: pixels a side.
    """

    def __init__(self, *, unet=None, vae=None, text_encoder=None, tokenizer=None, scheduler, latent_shape, image_size):
        self.unet, self.vae, self.text_encoder, self.tokenizer = unet, vae, text_encoder, tokenizer
        self.scheduler = scheduler
        self.prediction_type = scheduler.config.prediction_type
        self.latent_shape, self.image_size = tuple(latent_shape), int(image_size)
        for module in self.modules():
            module.requires_grad_(False).eval()
        first = next(iter(self.modules()))
        self.device, self.dtype = next(first.parameters()).device, next(first.parameters()).dtype
        self.alphas_cumprod = scheduler.alphas_cumprod.to(self.device, torch.float32)
        self._captions: OrderedDict[str, torch.Tensor] = OrderedDict()

    @classmethod
    def load(
        cls,
        path: str | Path,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        parts: tuple[str, ...] = PARTS,
    ) -> "Teacher":
        """Load the named parts of a teacher.

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
        return cls(
            **loaded,
            scheduler=DDPMScheduler.from_config(schedule),
            latent_shape=(configs["unet"]["in_channels"], sample, sample),
            image_size=sample * 2 ** (len(blocks) - 1),
        )

    def modules(self) -> list[torch.nn.Module]:
        """The neural parts that are loaded."""
        return [m for m in (self.unet, self.vae, self.text_encoder) if m is not None]

    def parameters(self):
        for module in self.modules():
            yield from module.parameters()

    @torch.no_grad()
    def embed(self, captions: list[str]) -> torch.Tensor:
        """The text encoder's last hidden state, cached per caption. Shapes: [N] strings -> [N, L, D].

        Numerics: a caption's embedding does not depend on the captions it is embedded with.
        """
        self._need("text_encoder")
        missing = [c for c in dict.fromkeys(captions) if c not in self._captions]
        fresh = {}
        for start in range(0, len(missing), TEXT_CHUNK):
            chunk = missing[start : start + TEXT_CHUNK]
            padded = chunk + [""] * (TEXT_CHUNK - len(chunk))
            ids = self.tokenizer(
                padded,
                padding="max_length",
                max_length=self.tokenizer.model_max_length,
                truncation=True,
                return_tensors="pt",
            ).input_ids
            hidden = self.text_encoder(ids.to(self.device))[0]
            fresh.update(zip(chunk, hidden.clone().unbind(0), strict=False))
        rows = [fresh[c] if c in fresh else self._captions[c] for c in captions]
        self._remember(captions, rows)
        return torch.stack(rows)

    def predict(self, z_t: torch.Tensor, t: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        """The UNet's prediction (of `prediction_type`), in z_t's dtype; a gradient flows to z_t if it asks for one.

        Shapes: z_t [B, C, h, w], t int64 [B], text [B, L, D] -> [B, C, h, w].
        """
        self._need("unet")
        if tuple(z_t.shape[1:]) != self.latent_shape:
            raise ValueError(f"latents {tuple(z_t.shape)}, expected [B, {', '.join(map(str, self.latent_shape))}]")
        hidden = text.to(self.dtype)
        return self.unet(z_t.to(self.dtype), t, encoder_hidden_states=hidden).sample.to(z_t.dtype)

    @torch.no_grad()
    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """Scaled latents: the mean of the VAE's posterior. Shapes: uint8 [B, 3, S, S] -> fp32 [B, C, h, w]."""
        self._need("vae")
        if pixels.dtype != torch.uint8 or tuple(pixels.shape[1:]) != (3, self.image_size, self.image_size):
            size = self.image_size
            raise ValueError(f"pixels: {pixels.dtype} {tuple(pixels.shape)}, expected uint8 [B, 3, {size}, {size}]")
        images = pixels.to(self.device).float() / 127.5 - 1
        mean = self.vae.encode(images.to(self.dtype)).latent_dist.mean.float()
        config = self.vae.config
        return (mean - (config.get("shift_factor") or 0.0)) * config.scaling_factor

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """The inverse of encode. Shapes: [B, C, h, w] -> uint8 [B, 3, S, S]."""
        self._need("vae")
        config = self.vae.config
        unscaled = latents.to(self.device).float() / config.scaling_factor + (config.get("shift_factor") or 0.0)
        images = self.vae.decode(unscaled.to(self.dtype)).sample.float()
        return ((images + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)

    def _need(self, name: str) -> None:
        if getattr(self, name) is None:
            raise ValueError(f"this teacher was loaded without its {name}")

    def _remember(self, captions: list[str], rows: list[torch.Tensor]) -> None:
        for caption, row in zip(captions, rows, strict=True):
            self._captions[caption] = row
            self._captions.move_to_end(caption)
        size = rows[0].numel() * rows[0].element_size() if rows else 1
        while len(self._captions) * size > CACHE_BYTES:
            self._captions.popitem(last=False)


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
