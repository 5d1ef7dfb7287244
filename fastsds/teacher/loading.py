"""Read a frozen teacher: a diffusers folder (folder.py) or one file in the original layout (single_file.py).

Stable Diffusion 1.x and 2.x and whatever else is a UNet2DConditionModel with an AutoencoderKL and a CLIPTextModel.
"""

from pathlib import Path

import torch

from fastsds.config import ConfigError
from fastsds.hub import HUB, reach
from fastsds.teacher.files import digest
from fastsds.teacher.folder import NAMES, Folder
from fastsds.teacher.single_file import SingleFile

PARTS = ("unet", "text", "vae")
PREDICTIONS = ("epsilon", "v_prediction", "sample")
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def load_parts(
    path: str | Path,
    device: str | torch.device,
    dtype: torch.dtype,
    parts: tuple[str, ...],
    prediction_type: str | None = None,
) -> dict:
    """Load the named parts of a teacher: what `Teacher` is made of, frozen and in evaluation mode.

    Args: path: "world" (the embedded one), a local folder, a local `.safetensors` file, or `hf-hub:ORG/NAME`: only the
        last is ever fetched, and only what is not on disk. parts: of "unet", "text" and "vae"; what is left out is
        neither read nor needed, but for the UNet's and the VAE's configuration. prediction_type: what the UNet predicts;
        None: what the folder or the file says.
    Raises: ConfigError that names the folder or file, the part, and what was expected.
    Numerics: in float16 the VAE is float32: SD's overflows.
    """
    from diffusers import DDPMScheduler

    if not parts or set(parts) - set(PARTS):
        raise ValueError(f"parts: {parts}, expected some of {PARTS}")
    _check_device(torch.device(device), dtype)
    source = _source(path, parts, prediction_type)
    configs = _configs(source, parts)
    schedule = source.schedule()
    kind = schedule["prediction_type"] = prediction_type or schedule.get("prediction_type", "epsilon")
    if kind not in PREDICTIONS:
        raise ConfigError(f"{source.where}: prediction_type is {kind!r}, expected one of {', '.join(PREDICTIONS)}")
    tokenizer = source.tokenizer() if "text" in parts else None
    if tokenizer is not None:
        for name, ours, theirs in (
            ("tokens", len(tokenizer), configs["text"]["vocab_size"]),
            ("tokens a caption", tokenizer.model_max_length, configs["text"]["max_position_embeddings"]),
        ):
            if ours > theirs:
                raise ConfigError(f"{source.where}: the tokenizer has {ours} {name}, its text encoder {theirs}")
    loaded = {part: source.model(part, torch.float32 if (part, dtype) == ("vae", torch.float16) else dtype) for part in parts}
    for model in loaded.values():
        model.requires_grad_(False).eval()
        for parameter in model.parameters():  # copied: off the mapped file, which may change, and aligned
            parameter.data = parameter.data.to(device, copy=True)
        model.to(device)
    latent_shape, image_size = geometry(configs)
    return dict(
        unet=loaded.get("unet"),
        vae=loaded.get("vae"),
        text_encoder=loaded.get("text"),
        tokenizer=tokenizer,
        scheduler=DDPMScheduler.from_config(schedule),
        latent_shape=latent_shape,
        image_size=image_size,
    )


def read_configs(path: str | Path, prediction_type: str | None = None) -> dict[str, dict] | None:
    """The configurations of a teacher's three parts, and no weights; None where it is not on this disk. Nothing is fetched.

    Raises: ConfigError for a teacher on this disk that is not one of those that `load_parts` takes.
    """
    if str(path).startswith(HUB):
        local = _cached(str(path))
        return None if local is None or not _holds(Folder(local), ()) else _configs(Folder(local), PARTS)
    if str(path) != "world" and not Path(path).exists():
        return None
    local = _local(path)
    return _configs(SingleFile(local, prediction_type) if local.is_file() else Folder(local), PARTS)


def geometry(configs: dict[str, dict]) -> tuple[tuple[int, int, int], int]:
    """((C, h, w) of the latents, pixels a side of the images) of a teacher with these configurations."""
    sample, blocks = configs["unet"]["sample_size"], configs["vae"]["block_out_channels"]
    return (configs["unet"]["in_channels"], sample, sample), sample * 2 ** (len(blocks) - 1)


def fingerprint(path: str | Path) -> dict[str, str]:
    """Digests of the files that a teacher is made of, by their names relative to it: {"unet/config.json": "5f..."}.

    Two teachers with one fingerprint are one model, wherever they lie. Nothing is fetched.
    Cost: see `files.digest`: 6 MiB read of a file of any size above 64 MiB.
    """
    local = _cached(str(path)) if str(path).startswith(HUB) else _local(path)
    if local is None:
        raise ConfigError(f"teacher.path {path}: not on disk")
    if local.is_file():
        return {local.name: digest(local)}
    return {file.relative_to(local).as_posix(): digest(file) for file in Folder(local).files()}


# -- where a path leads ------------------------------------------------------------------------------------------------


def _source(path: str | Path, parts: tuple[str, ...], prediction_type: str | None) -> Folder | SingleFile:
    """What holds the parts; fetches a hub id of which something is not on disk."""
    if str(path).startswith(HUB):
        folder = _cached(str(path))
        return Folder(folder if folder is not None and _holds(Folder(folder), parts) else _fetch(str(path), parts))
    local = _local(path)
    return SingleFile(local, prediction_type) if local.is_file() else Folder(local)


def _local(path: str | Path) -> Path:
    if str(path) == "world":
        from fastsds import world

        path = world.TEACHER
    path = Path(path)
    if path.is_file() and path.suffix != ".safetensors":
        raise ConfigError(f"teacher.path: {path} is not a .safetensors file; nothing else is read: convert it first")
    if not path.exists():
        raise ConfigError(
            f"teacher.path: {path} does not exist (expected a diffusers folder, a .safetensors file, or {HUB}ORG/NAME)"
        )
    return path


def _cached(name: str) -> Path | None:
    """The folder of a hub id on this disk, whole or not."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name.removeprefix(HUB), local_files_only=True))
    except LocalEntryNotFoundError:
        return None
    except HFValidationError as error:
        raise ConfigError(f"teacher.path {name}: {str(error).strip().splitlines()[0]}") from error


def _holds(folder: Folder, parts: tuple[str, ...]) -> bool:
    try:
        for part in PARTS:
            folder.config(part)
        for part in parts:
            folder.weights(part)
        folder.schedule()
        if "text" in parts:
            folder.check_tokenizer()
    except ConfigError:
        return False
    return True


def _fetch(name: str, parts: tuple[str, ...]) -> Path:
    from huggingface_hub import snapshot_download

    reach(name.removeprefix(HUB), "model_index.json", f"teacher.path {name}", "something")
    wanted, unwanted = _patterns(parts)
    try:
        return Path(snapshot_download(name.removeprefix(HUB), allow_patterns=wanted, ignore_patterns=unwanted))
    except Exception as error:
        raise ConfigError(
            f"teacher.path {name}: not whole on this disk, and it cannot be fetched ({str(error).strip().splitlines()[0]}); "
            "connect, or name a local folder or .safetensors file"
        ) from error


def _patterns(parts: tuple[str, ...]) -> tuple[list[str], list[str]]:
    """What is fetched of a hub id for these parts, and what is not all the same."""
    wanted = ["model_index.json", *(f"{name}/*.json" for name in (*NAMES.values(), "scheduler"))]
    wanted += [f"{NAMES[part]}/*.safetensors" for part in parts]
    if "text" in parts:
        wanted += ["tokenizer/*.json", "tokenizer/*.txt"]
    return wanted, ["*.fp16.*", "*.non_ema.*"]  # second copies of the same weights


# -- what is refused ---------------------------------------------------------------------------------------------------


def _configs(source: Folder | SingleFile, parts: tuple[str, ...]) -> dict[str, dict]:
    """The parts' configurations; ConfigError unless they are of a latent text-to-image model, and fit each other."""
    where = source.where

    def read(part: str, class_key: str, expected: str, *needed: str) -> dict:
        config = source.config(part)
        if (kind := config.get(class_key, expected)) != expected:
            refuse(part, f"it is {kind}, expected {expected}")
        for key in needed:
            if key not in config:
                raise ConfigError(f"{where}: {NAMES[part]}: its configuration has no {key}")
        return config

    def refuse(part: str, what: str):
        raise ConfigError(f"{where}: {NAMES[part]}: {what}: Stable Diffusion 1.x and 2.x, text to image, are supported")

    needed = ("sample_size", "in_channels", "out_channels", "cross_attention_dim")
    unet = read("unet", "_class_name", "UNet2DConditionModel", *needed)
    if unet.get("addition_embed_type") == "text_time":
        refuse("unet", "an SDXL UNet, which also asks for pooled text and image sizes")
    for key in ("addition_embed_type", "class_embed_type", "num_class_embeds", "encoder_hid_dim_type"):
        if unet.get(key) is not None:
            refuse("unet", f"{key} is {unet[key]!r}: a UNet that asks for more than a caption")
    channels, given, width = unet["in_channels"], unet["out_channels"], unet["cross_attention_dim"]
    if channels != given:
        kind = {9: ", an inpainting UNet"}.get(channels, "")
        refuse("unet", f"it takes {channels} channels and gives {given}{kind}; expected as many as it gives")
    if not isinstance(unet["sample_size"], int):
        raise ConfigError(f"{where}: unet: sample_size is {unet['sample_size']!r}, expected an integer")
    vae = read("vae", "_class_name", "AutoencoderKL", "latent_channels", "block_out_channels")
    if channels != (latents := vae["latent_channels"]):
        raise ConfigError(f"{where}: the unet takes {channels} latent channels, the vae gives {latents}: not of one model")
    if "text" not in parts:
        return {"unet": unet, "vae": vae}
    text = read("text", "model_type", "clip_text_model", "hidden_size", "vocab_size", "max_position_embeddings")
    if text["hidden_size"] != width:
        raise ConfigError(
            f"{where}: the text_encoder is {text['hidden_size']} wide, the unet expects {width}: not of one model"
        )
    return {"unet": unet, "vae": vae, "text": text}


def _check_device(device: torch.device, dtype: torch.dtype) -> None:
    """Raise ConfigError for a device that is not there or that cannot compute in dtype."""
    if dtype not in DTYPES:
        raise ConfigError(f"teacher: dtype {dtype}, expected one of {', '.join(map(str, DTYPES))}")
    if device.type == "cuda" and dtype is torch.bfloat16 and torch.cuda.is_available():
        if not torch.cuda.is_bf16_supported(including_emulation=False):
            raise ConfigError(f"teacher: {device} has no bfloat16; expected float16 or float32")
    try:
        x = torch.zeros(1, 1, 1, 1, device=device, dtype=dtype)
        torch.nn.functional.conv2d(x, x)
    except (RuntimeError, AssertionError, TypeError) as error:
        raise ConfigError(f"teacher: {dtype} on {device}: {str(error).strip().splitlines()[0]}") from error
