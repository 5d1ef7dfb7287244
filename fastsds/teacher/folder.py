"""A teacher in a diffusers folder.

    FOLDER/unet/          UNet2DConditionModel      config.json, weights
    FOLDER/vae/           AutoencoderKL             config.json, weights
    FOLDER/text_encoder/  CLIPTextModel             config.json, weights
    FOLDER/tokenizer/     CLIPTokenizer
    FOLDER/scheduler/     scheduler_config.json     any discrete scheduler: its betas and prediction type are used
"""

import json
from pathlib import Path

import torch

from fastsds.config import ConfigError
from fastsds.weights import first_line, from_folder, open_safetensors

NAMES = {"unet": "unet", "vae": "vae", "text": "text_encoder"}
SUFFIXES = (".safetensors", ".bin")


class Folder:
    """The parts of a diffusers folder, as `load_parts` asks for them."""

    def __init__(self, path: Path):
        self.path, self.where = path, f"teacher folder {path}"

    def schedule(self) -> dict:
        schedule = self._json("scheduler/scheduler_config.json")
        for key in () if schedule.get("trained_betas") else ("num_train_timesteps", "beta_schedule", "beta_start", "beta_end"):
            if key not in schedule:
                raise ConfigError(f"{self.where}: scheduler/scheduler_config.json has no {key}: not a discrete scheduler's")
        return schedule

    def config(self, part: str) -> dict:
        """The configuration of "unet", "vae" or "text"."""
        return self._json(f"{NAMES[part]}/config.json")

    def weights(self, part: str) -> list[Path]:
        """The files that hold a part's weights: plain ones before the fp16 variant, safetensors before .bin."""
        name = NAMES[part]
        files = sorted(self.path.glob(f"{name}/*"))
        files = [f for f in files if f.suffix in SUFFIXES and ".non_ema." not in f.name]
        for variant in (False, True):
            for suffix in SUFFIXES:
                if found := [f for f in files if (".fp16" in f.name) == variant and f.suffix == suffix]:
                    for index in self.path.glob(f"{name}/*{suffix}.index*.json"):
                        if (".fp16" in index.name) == variant:
                            shards = self._json(f"{name}/{index.name}").get("weight_map", {}).values()
                            self._need(*(f"{name}/{shard}" for shard in shards))
                    return found
        default = "model.safetensors" if part == "text" else "diffusion_pytorch_model.safetensors"
        raise ConfigError(f"{self.where}: {name}/{default} is missing")

    def model(self, part: str, dtype: torch.dtype) -> torch.nn.Module:
        """One part, its weights cast to dtype."""
        from diffusers import AutoencoderKL, UNet2DConditionModel
        from transformers import CLIPTextModel

        kind = {"unet": UNet2DConditionModel, "vae": AutoencoderKL, "text": CLIPTextModel}[part]
        files = self.weights(part)
        for file in files:
            if file.suffix == ".safetensors":
                open_safetensors(file)
        options = {"use_safetensors": files[0].suffix == ".safetensors"}  # else diffusers calls a missing one an error
        if ".fp16" in files[0].name:
            options["variant"] = "fp16"
        if part == "text":
            options["dtype"] = dtype
        else:
            options |= {"torch_dtype": dtype, "low_cpu_mem_usage": False}  # True needs accelerate
        return from_folder(kind, self.path / NAMES[part], f"{self.where}: {NAMES[part]}", **options)

    def check_tokenizer(self) -> None:
        """Raise ConfigError unless its files are there; without tokenizer_config.json transformers guesses the padding."""
        whole = (self.path / "tokenizer/tokenizer.json").is_file()
        names = ("tokenizer_config.json", *(() if whole else ("vocab.json", "merges.txt")))
        self._need(*(f"tokenizer/{name}" for name in names))

    def tokenizer(self):
        from transformers import CLIPTokenizer

        self.check_tokenizer()
        try:
            return CLIPTokenizer.from_pretrained(str(self.path / "tokenizer"), local_files_only=True)
        except Exception as error:
            raise ConfigError(f"{self.where}: tokenizer: {first_line(error)}") from error

    def files(self) -> list[Path]:
        """All files that loading would read, of the parts that are there."""
        found = [*self.path.glob("tokenizer/*.json"), *self.path.glob("tokenizer/*.txt"), *self.path.glob("*/*config.json")]
        for part, name in NAMES.items():
            if (self.path / name).is_dir():
                found += self.weights(part)
        return sorted({f for f in found if f.parent.name in (*NAMES.values(), "tokenizer", "scheduler")})

    def _need(self, *names: str) -> None:
        for name in names:
            if not (self.path / name).is_file():
                raise ConfigError(f"{self.where}: {name} is missing")

    def _json(self, name: str) -> dict:
        path = self.path / name
        if not path.is_file():
            index = self.path / "model_index.json"
            holds = json.loads(index.read_text(encoding="utf-8")) if index.is_file() else {}
            if holds and path.parent.name not in holds:
                raise ConfigError(
                    f"{self.where}: it holds a {holds.get('_class_name')}, which has no {path.parent.name}; "
                    "expected Stable Diffusion 1.x or 2.x"
                )
            raise ConfigError(f"{self.where}: {name} is missing")
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ConfigError(f"{path}: not JSON: {error}") from error
        if not isinstance(found, dict):
            raise ConfigError(f"{path}: expected a JSON object")
        return found
