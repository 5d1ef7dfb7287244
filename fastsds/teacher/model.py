"""The frozen teacher: what training and evaluation ask it.

The teacher is outside everything that trains, shards or saves: it is no nn.Module, so it can be nobody's submodule,
and no parameter of it has a gradient.
"""

from collections import OrderedDict
from pathlib import Path

import torch

from fastsds import ops
from fastsds.teacher.accelerate import accelerate_unet
from fastsds.teacher.loading import PARTS, load_parts

TEXT_CHUNK = 16  # captions are embedded in runs of one fixed shape: a caption's bits depend on no other caption
CACHE_BYTES = 256 << 20


class Teacher:
    """A frozen latent diffusion model. Latents are scaled: (VAE mean - shift_factor) * scaling_factor.

    alphas_cumprod: [T] fp32; prediction_type: "epsilon", "v_prediction" or "sample"; latent_shape: (C, h, w);
    image_size: pixels a side. Its modules come frozen; ValueError names a parameter that requires grad, when the teacher
    is made and whenever it is asked for a prediction.
    """

    def __init__(self, *, unet=None, vae=None, text_encoder=None, tokenizer=None, scheduler, latent_shape, image_size):
        self.unet, self.vae, self.text_encoder, self.tokenizer = unet, vae, text_encoder, tokenizer
        self.scheduler = scheduler
        self.prediction_type = scheduler.config.prediction_type
        self.latent_shape, self.image_size = tuple(latent_shape), int(image_size)
        for module in self.modules():
            module.eval()
        parts = {"unet": unet, "vae": vae, "text_encoder": text_encoder}
        self._frozen = [(f"{part}.{n}", p) for part, m in parts.items() if m is not None for n, p in m.named_parameters()]
        self._check_frozen()
        first = next(iter(self.modules()))
        self.device, self.dtype = next(first.parameters()).device, next(first.parameters()).dtype
        self.alphas_cumprod = scheduler.alphas_cumprod.to(self.device, torch.float32)
        self._captions: OrderedDict[str, torch.Tensor] = OrderedDict()
        self.acceleration = None  # what `accelerate_unet` did to the UNet
        self._encodes_finite = False  # until the first images have shown it

    @classmethod
    def load(
        cls,
        path: str | Path,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        parts: tuple[str, ...] = PARTS,
        prediction_type: str | None = None,
    ) -> "Teacher":
        """Load the named parts of a teacher: see `loading.load_parts`."""
        return cls(**load_parts(path, device, dtype, parts, prediction_type))

    @classmethod
    def of(cls, recipe, device: torch.device, parts: tuple[str, ...] = PARTS) -> "Teacher":
        """Load the parts of a recipe's teacher, in bf16 on a GPU where its precision is; its UNet accelerated as it says."""
        asked, gpu = recipe.teacher, device.type == "cuda"
        half = gpu and recipe.precision == "bf16"
        teacher = cls.load(asked.path, device, torch.bfloat16 if half else torch.float32, parts, asked.prediction_type)
        if teacher.unet is not None and (gpu if asked.accelerate == "auto" else asked.accelerate):
            attention = None if asked.attention == "keep" else asked.attention
            how = {name: getattr(asked, name) for name in ("compile", "cuda_graph", "checkpoint")}
            teacher.acceleration = accelerate_unet(teacher.unet, attention=attention, **how)
        return teacher

    def modules(self) -> list[torch.nn.Module]:
        """The neural parts that are loaded."""
        return [m for m in (self.unet, self.vae, self.text_encoder) if m is not None]

    def parameters(self):
        for module in self.modules():
            yield from module.parameters()

    def tokens(self, captions: list[str]) -> torch.Tensor:
        """Captions as the text encoder reads them: padded, or cut, to its length. Shapes: [N] strings -> int64 [N, L]."""
        self._need("text_encoder")
        length = self.tokenizer.model_max_length
        found = self.tokenizer(captions, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        return found.input_ids

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
            with self._plain():
                hidden = self.text_encoder(self.tokens(padded).to(self.device))[0]
            rows = [row.clone() for row in hidden[: len(chunk)]]  # a row apart is freed alone
            fresh.update(zip(chunk, rows, strict=True))
        rows = [fresh[c] if c in fresh else self._captions[c] for c in captions]
        self._remember(captions, rows)
        return torch.stack(rows)

    def predict(self, z_t: torch.Tensor, t: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        """The UNet's prediction (of `prediction_type`), in z_t's dtype; a gradient flows to z_t if it asks for one.

        Shapes: z_t [B, C, h, w], t int64 [B], text [B, L, D] -> [B, C, h, w].
        """
        self._need("unet")
        self._check_frozen()
        if tuple(z_t.shape[1:]) != self.latent_shape:
            raise ValueError(f"latents {tuple(z_t.shape)}, expected [B, {', '.join(map(str, self.latent_shape))}]")
        hidden = text.to(self.dtype)
        return self.unet(z_t.to(self.dtype), t, encoder_hidden_states=hidden).sample.to(z_t.dtype)

    @torch.no_grad()
    def targets(self, z0: torch.Tensor, t: torch.Tensor, noise, text: torch.Tensor) -> torch.Tensor:
        """What the caption makes the teacher see in a noised latent: x0hat(z_t, t, c).

        Shapes: z0 [B, C, h, w], t int64 [B], noise a tensor or an `ops.Noise`, text [B, L, D] -> [B, C, h, w] in z0's dtype.
        """
        return self._answer(z0, t, noise, text, "sample")

    @torch.no_grad()
    def score(self, z0: torch.Tensor, t: torch.Tensor, noise: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        """How well the caption explains a latent at one noise: - mean over elements of (eps_hat - eps)^2. fp32 [B].

        Shapes: as in `targets`; noise a tensor. Source: Li et al. 2023 (arXiv 2303.16203), one term of its sum.
        """
        eps_hat = self._answer(z0, t, noise, text, "epsilon")
        return -(eps_hat.float() - noise).square().flatten(1).mean(1)

    @torch.no_grad()
    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """Scaled latents: the mean of the VAE's posterior. Shapes: uint8 [B, 3, S, S] -> fp32 [B, C, h, w].

        Raises: FloatingPointError if the first images' latents are not finite (the one host read, in the first call).
        Numerics: in the VAE's own dtype, whatever autocast says.
        """
        self._need("vae")
        if pixels.dtype != torch.uint8 or tuple(pixels.shape[1:]) != (3, self.image_size, self.image_size):
            size = self.image_size
            raise ValueError(f"pixels: {pixels.dtype} {tuple(pixels.shape)}, expected uint8 [B, 3, {size}, {size}]")
        images = pixels.to(self.device).float() / 127.5 - 1
        with self._plain():
            mean = self.vae.encode(images.to(self.vae.dtype)).latent_dist.mean.float()
        if not self._encodes_finite:
            if not bool(mean.isfinite().all()):
                raise FloatingPointError(
                    f"teacher: the vae's latents of the first images are not finite in {self.vae.dtype}: its weights are "
                    "damaged, or too large for that dtype; expected float32 or bfloat16"
                )
            self._encodes_finite = True
        config = self.vae.config
        return (mean - (config.get("shift_factor") or 0.0)) * config.scaling_factor

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """The inverse of encode. Shapes: [B, C, h, w] -> uint8 [B, 3, S, S]."""
        self._need("vae")
        config = self.vae.config
        unscaled = latents.to(self.device).float() / config.scaling_factor + (config.get("shift_factor") or 0.0)
        with self._plain():
            images = self.vae.decode(unscaled.to(self.vae.dtype)).sample.float()
        return ((images + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)

    def _answer(self, z0, t, noise, text, target: str) -> torch.Tensor:
        """The prediction for a noised latent, as a prediction of type `target`."""
        z_t, _ = ops.add_noise(z0, t, self.alphas_cumprod, noise)
        pred = self.predict(z_t, t, text)
        return ops.convert(pred, z_t, t, self.alphas_cumprod, source=self.prediction_type, target=target)

    def _plain(self):
        """A context without autocast: what is computed once must not depend on who asked first."""
        return torch.autocast(self.device.type, enabled=False)

    def _check_frozen(self) -> None:
        """Cost: an attribute a parameter, 0.1 ms of host time for SD 1.x."""
        for name, parameter in self._frozen:
            if parameter.requires_grad:
                raise ValueError(f"{name} requires grad: a teacher is frozen; call requires_grad_(False) on its modules")

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
