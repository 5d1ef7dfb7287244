"""Very small instances of the real classes, untrained, saved in the real formats."""

import json
import string
from pathlib import Path

import torch

IMAGE, LATENT, CONTEXT, WIDTH = 16, (4, 4, 4), 16, 16
START, END = "<|startoftext|>", "<|endoftext|>"
WORDS = ("a", "the", "red", "blue", "ring", "square", "is", "left", "right", "of", "above", "cross", "white")


def save_tokenizer(folder: Path) -> int:
    """A byte-level CLIPTokenizer without merges; returns its size. END has the highest id."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPTokenizer

    letters = sorted(ByteLevel.alphabet())
    words = letters + [letter + "</w>" for letter in letters] + [START, END]
    CLIPTokenizer(
        vocab={word: i for i, word in enumerate(words)},
        merges=[],
        unk_token=END,
        bos_token=START,
        eos_token=END,
        pad_token=END,
        model_max_length=CONTEXT,
    ).save_pretrained(folder)
    return len(words)


def save_teacher(folder: Path, prediction_type: str = "epsilon", scale: float = 0.5) -> Path:
    """A diffusers folder: latents 4x4x4 of 16x16 images."""
    from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        size = save_tokenizer(folder / "tokenizer")
        UNet2DConditionModel(
            sample_size=LATENT[1],
            in_channels=LATENT[0],
            out_channels=LATENT[0],
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            block_out_channels=(8, 16),
            layers_per_block=1,
            attention_head_dim=4,
            norm_num_groups=4,
            cross_attention_dim=WIDTH,
        ).save_pretrained(folder / "unet")
        AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            block_out_channels=(8, 8, 8),
            layers_per_block=1,
            norm_num_groups=4,
            latent_channels=LATENT[0],
            sample_size=IMAGE,
            scaling_factor=scale,
        ).save_pretrained(folder / "vae")
        text = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=size,
                hidden_size=WIDTH,
                intermediate_size=2 * WIDTH,
                num_hidden_layers=1,
                num_attention_heads=2,
                max_position_embeddings=CONTEXT,
                bos_token_id=size - 2,
                eos_token_id=size - 1,
                pad_token_id=size - 1,
            )
        )
        for (
            parameter
        ) in text.parameters():  # untrained embeddings are so small that captions would hardly differ
            if parameter.ndim == 2:
                parameter.data.normal_(std=0.3)
        text.save_pretrained(folder / "text_encoder")
        DDPMScheduler(
            num_train_timesteps=1000,
            beta_schedule="scaled_linear",
            beta_start=0.00085,
            beta_end=0.012,
            prediction_type=prediction_type,
        ).save_pretrained(folder / "scheduler")
    return folder


def student_config(vocabulary: int, resnet: bool = False) -> dict:
    vision = {"image_size": IMAGE, "layers": 1, "width": WIDTH, "head_width": 8, "patch_size": 8}
    if resnet:
        vision = {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "head_width": 8}
    return {
        "model_cfg": {
            "embed_dim": 12,
            "vision_cfg": vision,
            "text_cfg": {
                "context_length": CONTEXT,
                "vocab_size": vocabulary,
                "hf_tokenizer_name": ".",
                "width": WIDTH,
                "heads": 2,
                "layers": 1,
            },
        },
        "preprocess_cfg": {"mean": [0.5, 0.4, 0.3], "std": [0.25, 0.3, 0.35], "interpolation": "bicubic"},
    }


def save_student(folder: Path, resnet: bool = False) -> Path:
    """An open_clip folder."""
    from open_clip.model import CLIP
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        config = student_config(save_tokenizer(folder), resnet)
        clip = CLIP(**config["model_cfg"])
    save_file(
        {k: v.contiguous() for k, v in clip.state_dict().items()}, folder / "open_clip_model.safetensors"
    )
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    return folder


def save_pieces(folder: Path) -> int:
    """A T5Tokenizer of letters and WORDS, as SigLIP's are: an end token and padding after it. Returns its size."""
    from transformers import T5Tokenizer

    space = "\N{LOWER ONE EIGHTH BLOCK}"
    pieces = ["<pad>", "</s>", "<unk>", *(space + word for word in WORDS if len(word) > 1), space, *string.ascii_lowercase]
    vocab = [(piece, 0.0 if i < 3 else -1.0 * len(pieces) / (1 + len(piece))) for i, piece in enumerate(pieces)]
    T5Tokenizer(vocab=vocab, extra_ids=0, model_max_length=CONTEXT).save_pretrained(folder)
    return len(vocab)


def save_siglip(folder: Path) -> Path:
    """An open_clip folder of SigLIP's kind: a timm tower, text without a causal mask, pooled at its last place, a bias."""
    from open_clip.model import CustomTextCLIP
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    text = dict(context_length=CONTEXT, vocab_size=save_pieces(folder), hf_tokenizer_name=".", width=WIDTH, heads=2, layers=1)
    text |= dict(no_causal_mask=True, proj_bias=True, pool_type="last", tokenizer_kwargs={"clean": "canonicalize"})
    vision = dict(image_size=160, timm_model_name="test_vit", timm_model_pretrained=False, timm_pool="map", timm_proj="none")
    config = dict(embed_dim=64, init_logit_bias=-10, custom_text=True, vision_cfg=vision, text_cfg=text)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        clip = CustomTextCLIP(**{key: value for key, value in config.items() if key != "custom_text"})
    save_file({k: v.contiguous() for k, v in clip.state_dict().items()}, folder / "open_clip_model.safetensors")
    preprocess = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "resize_mode": "squash"}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": preprocess}))
    return folder


def save_hf(folder: Path, kind: str) -> Path:
    """A transformers folder: a CLIPModel or a SiglipModel."""
    import transformers

    folder.mkdir(parents=True, exist_ok=True)
    size = save_tokenizer(folder) if kind == "clip" else save_pieces(folder)
    shared = dict(hidden_size=WIDTH, intermediate_size=2 * WIDTH, num_hidden_layers=1, num_attention_heads=2)
    text = shared | dict(vocab_size=size, max_position_embeddings=CONTEXT, bos_token_id=size - 2, eos_token_id=size - 1)
    vision = shared | dict(image_size=IMAGE, patch_size=8)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        if kind == "clip":
            config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)
            model = transformers.CLIPModel(config)
            crop = {"height": IMAGE, "width": IMAGE}
            processor = transformers.CLIPImageProcessor(size={"shortest_edge": IMAGE}, crop_size=crop)
        else:
            config = transformers.SiglipConfig(text_config=text, vision_config=vision)
            model = transformers.SiglipModel(config)
            processor = transformers.SiglipImageProcessor(size={"height": IMAGE, "width": IMAGE})
    for parameter in model.parameters():  # CLIP's own start is so small that captions would hardly differ
        if parameter.ndim == 2:
            parameter.data.normal_(std=0.3)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def save_words(folder: Path) -> int:
    """A BertTokenizer of WORDS and of letters, that start and go on a word. Returns its size."""
    from transformers import BertTokenizer

    letters = string.ascii_lowercase
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *("##" + c for c in letters), *WORDS[1:]]
    BertTokenizer(vocab={word: i for i, word in enumerate(words)}).save_pretrained(folder)
    return len(words)


def save_vilt(folder: Path, kind: str = "ViltModel", size: int = 32, made: int = 32, dtype=torch.float32, **options):
    """A transformers folder: a ViltModel, or one with a head; returns it. size: of its images; made: by its image processor."""
    import transformers

    folder.mkdir(parents=True, exist_ok=True)
    config = transformers.ViltConfig(
        vocab_size=save_words(folder), max_position_embeddings=CONTEXT, hidden_size=WIDTH, num_hidden_layers=2,
        num_attention_heads=2, intermediate_size=2 * WIDTH, image_size=size, patch_size=8, **options,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = getattr(transformers, kind)(config)
        for parameter in model.parameters():  # its places start at zero, its words so small that texts would hardly differ
            if parameter.ndim > 1:
                parameter.data.normal_(std=0.3)
    model.to(dtype).save_pretrained(folder)
    transformers.ViltImageProcessor(size={"shortest_edge": made}, size_divisor=8).save_pretrained(folder)
    return folder


def captions(n: int, seed: int = 0) -> list[str]:
    generator = torch.Generator().manual_seed(seed)
    return [
        " ".join(WORDS[i] for i in row)
        for row in torch.randint(len(WORDS), (n, 6), generator=generator).tolist()
    ]


def pixels(n: int, size: int = IMAGE, seed: int = 0) -> torch.Tensor:
    """Smooth random images. uint8 [n, 3, size, size]."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(n, 3, 4, 4, generator=generator)
    return (torch.nn.functional.interpolate(coarse, size=(size, size), mode="bilinear") * 255).to(torch.uint8)
