"""The embedded world's ViLT, pretrained as ViLT is (arXiv 2102.03334): an image transformer that names what a picture shows,
then words that are masked, and texts that are matched with pictures.

    naming     which colours and shapes are there, binary cross-entropy; of ImageNet's labels in the paper
    masking    some words of a caption, or all its colours, all its shapes, its relation: cross-entropy of the words
    matching   a caption, or another picture's, of those in the batch that are false the one with most words in common:
               cross-entropy of two

No label says which colour has which shape, and no caption is made up: what the student knows of that it has from captions.
"""

from pathlib import Path

import torch
import torch.nn.functional as F

from fastsds.crossmodal import vilt
from fastsds.crossmodal.model import CrossModal
from fastsds.world import models
from fastsds.world.optimize import adamw, cosine, update
from fastsds.world.scenes import COLOURS, RELATIONS, SHAPES, WorldSource

SETTINGS = {"steps": 3000, "batch": 64, "lr": 1e-3, "naming": 0.375, "matched": 32, "masked": 0.3}
FIRST, FIRST_NAMED = 1 << 25, 1 << 26  # ids of its scenes: no other scene has them
MASK = "\N{LATIN CAPITAL LETTER A WITH MACRON}"  # the byte 0, which no text has


def train_vilt(folder: Path, seed: int, log, steps: int) -> None:
    """Write a transformers folder in fp16."""
    torch.manual_seed(seed)
    config, processor, tokenizer = models.vilt_parts()
    model, hp, source = models.vilt(config), SETTINGS, WorldSource(seed=seed)
    vilt.in_order(model)
    student = CrossModal(model, vilt.make(config, processor, tokenizer, "vilt"), answers=2)
    log(f"vilt: {sum(p.numel() for p in model.parameters()):,} parameters, {steps} steps of {hp['batch']}")
    _name(student, source, log, round(hp["naming"] * steps))
    words = torch.nn.Linear(config.hidden_size, len(tokenizer))
    parameters = [*student.parameters(), *words.parameters()]
    rule, generator = adamw(parameters, hp["lr"]), torch.Generator().manual_seed(seed)
    ids = [torch.tensor([tokenizer(word, add_special_tokens=False).input_ids[0] for word in of]) for of in _kinds()]
    mask, special = tokenizer.convert_tokens_to_ids(MASK), torch.tensor(tokenizer.all_special_ids)
    n, half = hp["matched"], hp["matched"] // 2
    for k in range(steps):
        samples = _load(source, FIRST + k * hp["batch"], hp["batch"])
        tokens = student.tokenize(samples.captions)
        hidden = _hidden(tokens, ids, special, hp["masked"], generator)
        wrong = _hardest(tokens[:, 1:], special, source.scenes(samples.rows).layout())
        other = torch.cat([tokens[wrong[:half]], tokens[half:n]])
        pixels = torch.cat([samples.pixels, samples.pixels[:n]])
        out = student(pixels, torch.cat([tokens.masked_fill(hidden, mask), other]))
        found, said = words(out.text[: hp["batch"]][hidden]), tokens[hidden]
        matching = F.cross_entropy(out.logits[hp["batch"] :], (torch.arange(n) < half).long())
        masking = F.cross_entropy(found, said)
        update(rule, masking + matching, parameters, hp["lr"] * cosine(k, steps, 200))
        if k % 20 == 0 or k == steps - 1:
            right = float((found.argmax(1) == said).float().mean())
            log(f"vilt step {k}/{steps} masking {masking:.3f} ({right:.0%} right), matching {matching:.3f}", k == steps - 1)
    model.half().save_pretrained(folder)
    for part in (processor, tokenizer):
        part.save_pretrained(folder)


def _name(student: CrossModal, source: WorldSource, log, steps: int) -> None:
    """The image transformer: which colours and shapes a picture has, without a text."""
    heads, hp = torch.nn.Linear(student.width, len(COLOURS) + len(SHAPES)), SETTINGS
    parameters = [*student.model.parameters(), *heads.parameters()]
    rule, silence = adamw(parameters, hp["lr"]), student.tokenize([""]).expand(hp["batch"], -1)
    for k in range(steps):
        first = FIRST_NAMED + k * hp["batch"]
        scenes, pixels = source.scenes(torch.arange(first, first + hp["batch"])), _load(source, first, hp["batch"]).pixels
        there = torch.cat([F.one_hot(scenes.colour, len(COLOURS)).sum(1), F.one_hot(scenes.shape, len(SHAPES)).sum(1)], 1)
        loss = F.binary_cross_entropy_with_logits(heads(student(pixels, silence).visual.mean(1)), there.clamp(max=1).float())
        update(rule, loss, parameters, hp["lr"] * cosine(k, steps, 100))
        if k % 20 == 0 or k == steps - 1:
            log(f"vilt naming {k}/{steps} {loss:.3f}", k == steps - 1)


def _hidden(
    tokens: torch.Tensor, kinds: list[torch.Tensor], special: torch.Tensor, share: float, generator: torch.Generator
) -> torch.Tensor:
    """Which tokens are masked: of a quarter of the captions a share of the words, of the others all of one kind.

    Shapes: int64 [b, L] -> bool [b, L].
    """
    how = torch.randint(len(kinds) + 1, (len(tokens), 1), generator=generator)
    words = CrossModal.mask(tokens) & ~torch.isin(tokens, special)
    hidden = words & (torch.rand(tokens.shape, generator=generator) < share) & (how == len(kinds))
    for number, of in enumerate(kinds):
        hidden |= torch.isin(tokens, of) & (how == number)
    return hidden


def _hardest(tokens: torch.Tensor, special: torch.Tensor, layout: torch.Tensor) -> torch.Tensor:
    """Of each picture, the caption of another that is false of it and shares most words with its own.

    Shapes: tokens int64 [b, L], layout int64 [b, 5], what each picture shows -> int64 [b].
    """
    words = torch.zeros(len(tokens), int(tokens.max()) + 1)
    words.scatter_add_(1, tokens.clamp(min=0), (CrossModal.mask(tokens) & ~torch.isin(tokens, special)).float())
    shared = torch.minimum(words[:, None], words).sum(2)
    return shared.masked_fill((layout[:, None] == layout).all(2), -1.0).argmax(1)


def _kinds() -> tuple[list[str], ...]:
    return list(COLOURS), list(SHAPES), [relation.split()[0] for relation in RELATIONS]


def _load(source: WorldSource, first: int, n: int):
    ids = torch.arange(first, first + n)
    return source.load(ids, torch.zeros_like(ids), models.SIZE)
