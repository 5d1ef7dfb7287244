"""A teacher in one `.safetensors` file of the original (ldm) layout, as SD 1.x and 2.x checkpoints are distributed.

    model.diffusion_model.*         the UNet. An averaged copy under model_ema.* is left alone, as diffusers does
    first_stage_model.*             the VAE
    cond_stage_model.transformer.*  SD 1.x: CLIP's text model
    cond_stage_model.model.*        SD 2.x: OpenCLIP's, of which the last block is not used

Shapes say how wide and deep each part is; CONSTANTS say what no shape does. Nothing is fetched, and of the weights only
the parts that are asked for are read.
"""

import re
from pathlib import Path

import torch

from fastsds import quiet
from fastsds.config import ConfigError
from fastsds.teacher.vocabulary import END, clip_tokenizer
from fastsds.weights import open_safetensors

UNET, VAE = "model.diffusion_model.", "first_stage_model."
TEXT = {1: "cond_stage_model.transformer.", 2: "cond_stage_model.model."}
NAMES = {"unet": "UNet", "vae": "VAE", "text": "text encoder"}
HEAD = 64  # channels of an attention head: SD 2.x's UNet, both text models
# What SD 1.x and 2.x share: the UNet's and the VAE's normalisation are diffusers' defaults, 32 groups.
SCHEDULE = dict(num_train_timesteps=1000, beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
SCALING = 0.18215  # of latents
PIXELS = {"epsilon": 512, "v_prediction": 768}  # SD 2.x: the size its UNet was trained at
# Of a text model, besides diffusers' own list: what CLIP's contrastive head needs, and a constant.
UNUSED = ("logit_scale", "text_projection.weight", "embeddings.position_ids", "text_model.embeddings.position_ids")
SPEC = {"epsilon": "epsilon", "v": "v_prediction", "v_prediction": "v_prediction"}  # modelspec.prediction_type


class SingleFile:
    """The parts of one file, as `load_parts` asks for them.

    prediction_type: what the user says; else what Stability's model metadata (modelspec.*) say, which few files have;
    else epsilon for SD 1.x, and for SD 2.x None: it is not known. The size of its images comes from the metadata; else it
    is 512 pixels, and 768 for an SD 2.x that predicts v.
    """

    def __init__(self, path: Path, prediction_type: str | None = None):
        self.path, self.where = path, f"teacher file {path}"
        with open_safetensors(path) as file:
            metadata = file.metadata() or {}
            self.shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
        linear = any(k.startswith(UNET) and k.endswith(".proj_in.weight") and len(s) == 2 for k, s in self.shapes.items())
        self.version = 2 if linear else 1
        said = prediction_type or SPEC.get(metadata.get("modelspec.prediction_type"))
        self.prediction_type = said or ("epsilon" if self.version == 1 else None)
        square = re.fullmatch(r"(\d+)x\1", metadata.get("modelspec.resolution", ""))
        usual = PIXELS.get(self.prediction_type, 512) if self.version == 2 else 512
        self.pixels = int(square[1]) if square else usual

    def prefix(self, part: str) -> str:
        return {"unet": UNET, "vae": VAE, "text": TEXT[self.version]}[part]

    def schedule(self) -> dict:
        if self.prediction_type is None:
            raise ConfigError(
                f"{self.where}: a file of SD 2.x does not say what its UNet predicts; write teacher.prediction_type: "
                "v_prediction (the models of 768 pixels) or epsilon (the base models, 512 pixels)"
            )
        return {**SCHEDULE, "prediction_type": self.prediction_type}

    def config(self, part: str) -> dict:
        """The configuration of "unet", "vae" or "text", as diffusers and transformers write it."""
        prefix = self.prefix(part)
        if not any(key.startswith(prefix) for key in self.shapes):
            raise ConfigError(
                f"{self.where}: it has no {NAMES[part]} (no tensor {prefix}*); expected a whole checkpoint of SD 1.x or 2.x "
                "in the original layout; a diffusers model is named by its folder"
            )
        return {"unet": self._unet, "vae": self._vae, "text": self._text}[part]()

    def model(self, part: str, dtype: torch.dtype) -> torch.nn.Module:
        """One part, its weights cast to dtype."""
        from diffusers import AutoencoderKL, UNet2DConditionModel
        from diffusers.loaders import single_file_utils as ldm

        config = self.config(part)
        if part == "text":
            return self._text_model(config, dtype)
        kind, convert = {
            "unet": (UNet2DConditionModel, ldm.convert_ldm_unet_checkpoint),
            "vae": (AutoencoderKL, ldm.convert_ldm_vae_checkpoint),
        }[part]
        with torch.device("meta"):
            model = kind.from_config(config)
        self._complete(part, model, state := self._convert(part, convert, dtype, config))
        model.load_state_dict(state, assign=True)
        return model

    def tokenizer(self):
        return clip_tokenizer(END if self.version == 1 else "!")

    def _unet(self) -> dict:
        blocks = [[]]  # the numbers of a level's residual blocks
        for i in range(1, self._count(UNET + "input_blocks")):
            if UNET + f"input_blocks.{i}.0.op.weight" in self.shapes:
                blocks.append([])
            else:
                blocks[-1].append(i)
        if not all(blocks):
            raise ConfigError(f"{self.where}: its input_blocks are not those of an SD 1.x or 2.x UNet")
        widths = [self._shape(UNET + f"input_blocks.{level[-1]}.0.out_layers.3.weight")[0] for level in blocks]
        attends = [UNET + f"input_blocks.{level[0]}.1.proj_in.weight" in self.shapes for level in blocks]
        text = "middle_block.1.transformer_blocks.0.attn2.to_k.weight"
        embedding = [key for key in self.shapes if key.startswith(UNET + "label_emb.")]
        return {
            "_class_name": "UNet2DConditionModel",
            "sample_size": self.pixels // 2 ** (len(self.config("vae")["block_out_channels"]) - 1),
            "in_channels": self._shape(UNET + "input_blocks.0.0.weight")[1],
            "out_channels": self._shape(UNET + "out.2.weight")[0],
            "block_out_channels": widths,
            "layers_per_block": len(blocks[0]),
            "down_block_types": ["CrossAttnDownBlock2D" if a else "DownBlock2D" for a in attends],
            "up_block_types": ["CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attends)],
            "cross_attention_dim": self._shape(UNET + text)[1],
            # diffusers' name for the number of heads
            "attention_head_dim": 8 if self.version == 1 else [width // HEAD for width in widths],
            "use_linear_projection": self.version == 2,
            "upcast_attention": self.version == 2,
            "addition_embed_type": "text_time" if UNET + "label_emb.0.0.weight" in embedding else None,
            "num_class_embeds": self._shape(embedding[0])[0] if UNET + "label_emb.weight" in embedding else None,
        }

    def _vae(self) -> dict:
        n = self._count(VAE + "encoder.down")
        widths = [self._shape(VAE + f"encoder.down.{i}.block.0.conv1.weight")[0] for i in range(n)]
        return {
            "_class_name": "AutoencoderKL",
            "sample_size": self.pixels,
            "latent_channels": self._shape(VAE + "post_quant_conv.weight")[1],
            "block_out_channels": widths,
            "layers_per_block": self._count(VAE + "encoder.down.0.block"),
            "down_block_types": ["DownEncoderBlock2D"] * n,
            "up_block_types": ["UpDecoderBlock2D"] * n,
            "scaling_factor": SCALING,
        }

    def _text(self) -> dict:
        prefix = self.prefix("text")
        if self.version == 1:
            if any(key.startswith(prefix + "text_model.") for key in self.shapes):  # some files leave that out
                prefix += "text_model."
            tokens, places = "embeddings.token_embedding.weight", "embeddings.position_embedding.weight"
            inner, layers = "encoder.layers.0.mlp.fc1.weight", self._count(prefix + "encoder.layers")
        else:  # ViT-H's 24 blocks less the last
            tokens, places, inner, layers = (
                "token_embedding.weight", "positional_embedding", "transformer.resblocks.0.mlp.c_fc.weight", 23
            )  # fmt: skip
        vocabulary, width = self._shape(prefix + tokens)
        return {
            "model_type": "clip_text_model",
            "vocab_size": vocabulary,
            "hidden_size": width,
            "intermediate_size": self._shape(prefix + inner)[0],
            "num_hidden_layers": layers,
            "num_attention_heads": width // HEAD,
            "max_position_embeddings": self._shape(prefix + places)[0],
            "hidden_act": "quick_gelu" if self.version == 1 else "gelu",
        }

    def _text_model(self, config: dict, dtype: torch.dtype):
        from diffusers.loaders import single_file_utils as ldm
        from transformers import CLIPTextConfig, CLIPTextModel

        config = CLIPTextConfig(**{k: v for k, v in config.items() if k != "model_type"})
        with torch.device("meta"):
            model = CLIPTextModel(config)
        if self.version == 1:
            state = self._convert("text", ldm.convert_ldm_clip_checkpoint, dtype)
        else:
            state = self._convert("text", lambda tensors: ldm.convert_open_clip_checkpoint(model, tensors), dtype)
        state = {key.removeprefix("text_model."): tensor for key, tensor in state.items()}
        self._complete("text", model, state)
        with quiet.loading():
            return CLIPTextModel.from_pretrained(None, config=config, state_dict=state, dtype=dtype)

    def _convert(self, part: str, convert, dtype: torch.dtype, *arguments) -> dict:
        """diffusers' names for the tensors of one part, read from the file."""
        from diffusers.loaders.single_file_utils import SD_2_TEXT_ENCODER_KEYS_TO_IGNORE

        prefix = self.prefix(part)
        unused = {*SD_2_TEXT_ENCODER_KEYS_TO_IGNORE} | {prefix + name for name in UNUSED}
        with open_safetensors(self.path) as file:
            names = [key for key in self.shapes if key.startswith(prefix) and key not in unused]
            tensors = {key: file.get_tensor(key).to(dtype) for key in names}
        try:
            return convert(tensors, *arguments)
        except (KeyError, AttributeError, IndexError) as error:
            raise ConfigError(f"{self.where}: its {NAMES[part]} is not one of SD {self.version}.x: {error}") from error

    def _complete(self, part: str, model: torch.nn.Module, state: dict) -> None:
        expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        found = {name: tuple(tensor.shape) for name, tensor in state.items()}
        for name in [*expected, *found]:
            if expected.get(name) != found.get(name):
                raise ConfigError(
                    f"{self.where}: its {NAMES[part]} is not one of SD {self.version}.x: {name} (diffusers' name) is "
                    f"{found.get(name, 'missing')}, expected {expected.get(name, 'no such tensor')}"
                )

    def _shape(self, key: str) -> tuple[int, ...]:
        if key not in self.shapes:
            raise ConfigError(f"{self.where}: tensor {key} is missing; expected a checkpoint of SD 1.x or 2.x")
        return self.shapes[key]

    def _count(self, prefix: str) -> int:
        """How many numbers follow a prefix: prefix.0, prefix.1, ..."""
        found = re.compile(re.escape(prefix) + r"\.(\d+)\.")
        return len({match[1] for key in self.shapes if (match := found.match(key))})
