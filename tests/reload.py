"""What plain open_clip and plain transformers make of a folder: features and logits of the same pictures and captions."""

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

CAPTIONS = ["a blue cross above a white ring", "two " * 90, "Où est l'œuf? 100 % «naïf»", "x"]


@torch.no_grad()
def open_clip_says(folder, captions=CAPTIONS):
    """(image, text, logits) of plain open_clip."""
    import open_clip

    model, preprocess = open_clip.create_model_from_pretrained(f"local-dir:{folder}")
    size, _ = open_clip.transform.to_2tuple(model.visual.image_size)
    pixels = torch.stack([preprocess(picture) for picture in pictures(size)])
    image, text, scale = model.eval()(pixels, open_clip.get_tokenizer(f"local-dir:{folder}")(captions))
    return image, text, scale * image @ text.T


@torch.no_grad()
def transformers_says(folder, captions=CAPTIONS):
    from transformers import AutoModel, AutoProcessor

    model, processor = AutoModel.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)
    size = model.config.vision_config.image_size
    inputs = processor(images=pictures(size), text=captions, return_tensors="pt", padding=True, truncation=True)
    out = model(**inputs)
    return out.image_embeds, out.text_embeds, out.logits_per_image


def pictures(size: int) -> list:
    generator = np.random.default_rng(7)
    return [Image.fromarray(generator.integers(0, 256, (size, size, 3), dtype=np.uint8)) for _ in range(3)]


def agree(ours, theirs) -> None:
    for a, b in zip(ours[:2], theirs[:2], strict=True):
        assert F.cosine_similarity(a, b).min() > 1 - 1e-5 and (a - b).abs().max() < 1e-5
    assert (ours[0] @ ours[1].T - theirs[0] @ theirs[1].T).abs().max() < 1e-5
    torch.testing.assert_close(ours[2], theirs[2], rtol=1e-4, atol=1e-4)
    assert ours[1].std(dim=0).min() > 1e-3  # captions differ
