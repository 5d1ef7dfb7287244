"""The embedded world's models: small instances of the real classes, untrained. Sizes live here alone."""

from pathlib import Path

from fastsds.world import STUDENT
from fastsds.world.scenes import SIZE
from fastsds.world.tokenizer import CONTEXT

TEXT_WIDTH = 96
LATENT_CHANNELS, LATENT_SIZE = 4, 8


def autoencoder():
    """AutoencoderKL, 3x32x32 <-> 4x8x8."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 24, 32),
        layers_per_block=1,
        norm_num_groups=8,
        latent_channels=LATENT_CHANNELS,
        sample_size=SIZE,
    )


def unet():
    """UNet2DConditionModel on 4x8x8 latents with cross-attention to the text encoder's tokens."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=LATENT_SIZE,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
        block_out_channels=(48, 96),
        layers_per_block=1,
        attention_head_dim=4,
        norm_num_groups=8,
        cross_attention_dim=TEXT_WIDTH,
    )


def text_encoder(vocabulary: int):
    """CLIPTextModel; tokens and positions start at unit scale, or binding is learnt late or never."""
    from transformers import CLIPTextConfig, CLIPTextModel

    model = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=vocabulary,
            hidden_size=TEXT_WIDTH,
            intermediate_size=4 * TEXT_WIDTH,
            projection_dim=TEXT_WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=CONTEXT,
            bos_token_id=vocabulary - 2,
            eos_token_id=vocabulary - 1,
            pad_token_id=vocabulary - 1,
        )
    )
    for name, parameter in model.named_parameters():
        if name.endswith("embedding.weight"):
            parameter.data.normal_()
    return model


def scheduler():
    """Stable Diffusion v1's noise schedule."""
    from diffusers import DDPMScheduler

    return DDPMScheduler(
        num_train_timesteps=1000, beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False
    )


def student_config(vocabulary: int, tokenizer: str | Path) -> dict:
    """open_clip's model configuration of the embedded student."""
    return {
        "embed_dim": 96,
        "vision_cfg": {"image_size": SIZE, "layers": 2, "width": 96, "head_width": 24, "patch_size": 8},
        "text_cfg": {
            "context_length": CONTEXT,
            "vocab_size": vocabulary,
            "hf_tokenizer_name": str(tokenizer),
            "width": 96,
            "heads": 4,
            "layers": 2,
            "pad_id": vocabulary - 1,
        },
    }


def vilt_parts() -> tuple:
    """(ViltConfig, ViltImageProcessor, tokenizer) of the embedded world's cross-modal student.

    Words as its CLIP has them, patches of 8x8, and room for a question with its answer.
    """
    from transformers import AutoTokenizer, ViltConfig, ViltImageProcessor

    tokenizer = AutoTokenizer.from_pretrained(str(STUDENT), local_files_only=True, model_max_length=2 * CONTEXT)
    config = ViltConfig(
        vocab_size=len(tokenizer),
        max_position_embeddings=2 * CONTEXT,
        hidden_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=4 * 96,
        image_size=SIZE,
        patch_size=8,
        initializer_range=96**-0.5,
    )
    return config, ViltImageProcessor(size={"shortest_edge": SIZE}, size_divisor=8), tokenizer


def vilt(config):
    """ViltModel; words and places start at unit scale, matrices keep it (ViLT's 0.02 is for a width of 768)."""
    from transformers import ViltModel

    model = ViltModel(config)
    for name, parameter in model.named_parameters():
        if name.endswith(("embeddings.weight", "position_embeddings")):
            parameter.data.normal_()
    return model
