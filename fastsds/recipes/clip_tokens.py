"""A frozen CLIP's features of every word and patch, in the space where it compares texts with images.

    text    project(ln_final(x_j)) of every token j      visual    project(ln_post(y_p)) of every patch p

so that the token that CLIP pools has exactly CLIP's text feature. Patches are not what CLIP was trained to compare: only the
class token, which reads them, is. A patch's cosine to a text is a heuristic.

Where a token lies in the text is the tokenizer's own account where it has one (the fast kind), and is read off the pieces of
open_clip's SimpleTokenizer, which has none. open_clip cleans a text first (ftfy, entities, blanks, case): places in the
cleaned text are led back by a comparison of the two, a changed stretch as a whole.
"""

import hashlib
import json
from collections.abc import Sequence
from difflib import SequenceMatcher
from typing import NamedTuple

import torch
from torch import nn

from fastsds.config import ConfigError
from fastsds.student import Student
from fastsds.student.hf import Transformers
from fastsds.student.model import at_least_fp32

Span = tuple[int, int] | None
PROBES = ("a red ring", "It's  THE 2nd ring, isn't it?", "word " * 200, "naïve 雪 \N{SNOWMAN}", "salt &amp; pepper", "")
END_OF_WORD = "</w>"


class TokenFeatures(NamedTuple):
    """Of any length, fp32 or wider. Shapes: text [b, L, d], visual [b, P, d] in the grid's order, pooled_text [b, d],
    pooled_image [b, d].
    """

    text: torch.Tensor
    visual: torch.Tensor
    pooled_text: torch.Tensor
    pooled_image: torch.Tensor


class ClipTokens:
    """A student of `fastsds.student`, frozen, as the teacher of CLIP-TD: it is put in eval mode, and nothing of it trains.

    grid: rows and columns of its patches. Raises: ConfigError for a CLIP without features of words or patches in the joint
    space, or whose tokenizer does not say where a token lies.
    """

    def __init__(self, clip: Student):
        self._encode, self.grid = _reader(clip)
        self.clip, self.family = clip.eval().requires_grad_(False), clip.family
        self.image_size, self.width = clip.image_size, clip.width
        for text, (ids, _) in zip(PROBES, self._read(PROBES), strict=True):
            if ids != clip.tokenize([text])[0, : len(ids)].tolist():
                raise ConfigError(f"{self.family.where}: its tokenizer does not say where the tokens of {text[:30]!r} lie")

    @property
    def device(self) -> torch.device:
        return self.clip.clip.logit_scale.device

    @property
    def scale(self) -> torch.Tensor:
        """CLIP's logit scale, exponentiated. 0-dim."""
        return self.clip().logit_scale

    @torch.no_grad()
    def __call__(self, pixels: torch.Tensor, tokens: torch.Tensor) -> TokenFeatures:
        """Shapes: uint8 [b, 3, S, S], int64 [b, L]."""
        found = self._encode(self.clip.clip, self.clip.normalise(pixels), tokens)
        return TokenFeatures(*(at_least_fp32(x) for x in found))

    @torch.no_grad()
    def encode_texts(self, texts: list[str], batch: int = 256) -> torch.Tensor:
        """CLIP's text features. Shapes: [n] strings -> [n, d], of unit length."""
        parts = (self.clip.tokenize(texts[k : k + batch]).to(self.device) for k in range(0, len(texts), batch))
        return torch.cat([self.clip(None, part).text for part in parts])

    def tokenize(self, texts: list[str]) -> torch.Tensor:
        """Shapes: [n] strings -> int64 [n, L]."""
        return self.clip.tokenize(texts)

    def spans(self, texts: Sequence[str]) -> list[list[Span]]:
        """Where each token of `tokenize(texts)` lies: text[first:last]; None for special tokens, padding included."""
        return [spans for _, spans in self._read(texts)]

    def tokenizer_digest(self) -> str:
        """What tells this CLIP's reading of texts from another's."""
        if (fast := _fast(self.family)) is not None:
            return tokenizer_digest(fast)
        simple = self.family.tokenizer
        rules = (simple.bpe_ranks, simple.all_special_ids, simple.clean_fn.__name__, simple.context_length)
        return hashlib.blake2b(repr(rules).encode(), digest_size=16).hexdigest()

    def _read(self, texts: Sequence[str]) -> list[tuple[list[int], list[Span]]]:
        """Ids and spans of each text."""
        length, fast = self.clip.context_length, _fast(self.family)
        clean = getattr(self.family.tokenizer, "clean_fn", None)  # what open_clip does to a text first
        cleaned = [clean(text) if clean else text for text in texts]
        if fast is None:
            found = [_simple(self.family.tokenizer, text, length) for text in cleaned]
        else:
            options = dict(return_offsets_mapping=True, return_special_tokens_mask=True)
            read = fast(cleaned, padding="max_length", truncation=True, max_length=length, **options)
            found = [
                (ids, [None if s else tuple(at) for at, s in zip(places, special, strict=True)])
                for ids, places, special in zip(read.input_ids, read.offset_mapping, read.special_tokens_mask, strict=True)
            ]
        return [
            (ids, spans if text == said else _led_back(said, text, spans))
            for said, text, (ids, spans) in zip(texts, cleaned, found, strict=True)
        ]


def tokenizer_digest(tokenizer) -> str:
    """A fast tokenizer's rules, whatever its last call padded and cut to."""
    rules = json.loads(tokenizer.backend_tokenizer.to_str())
    for state in ("padding", "truncation"):
        rules.pop(state, None)
    return hashlib.blake2b(json.dumps(rules, sort_keys=True).encode(), digest_size=16).hexdigest()


def _reader(clip: Student):
    """(clip, images, tokens -> text, visual, pooled text, pooled image), and the grid. Raises: ConfigError."""
    model, where = clip.clip, clip.family.where
    refused = f"{where}: a teacher of CLIP-TD needs features of every word and patch in the joint space; "
    expected = "; expected a CLIP with a ViT: open_clip's, or transformers' CLIPModel"
    if isinstance(clip.family, Transformers):
        if model.config.model_type != "clip":
            raise ConfigError(f"{refused}a {type(model).__name__} pools its patches by attention{expected}")
        vision = model.config.vision_config
        return _transformers, (vision.image_size // vision.patch_size,) * 2
    from open_clip.transformer import TextTransformer, VisionTransformer

    visual, text = model.visual, getattr(model, "text", None)
    if not isinstance(visual, VisionTransformer):
        raise ConfigError(f"{refused}its image tower is a {type(visual).__name__}{expected}")
    if visual.attn_pool is not None or visual.pool_type == "none":
        raise ConfigError(f"{refused}its image tower pools its patches by attention, or not at all{expected}")
    if text is not None and not isinstance(text, TextTransformer):
        raise ConfigError(f"{refused}its text tower is a {type(text).__name__}{expected}")
    kind = model.text_pool_type if text is None else "cls" if text.cls_emb is not None else text.pool_type
    if kind not in ("argmax", "eos"):
        raise ConfigError(f"{refused}its text tower pools {kind!r}, not the end token{expected}")
    return _open_clip, tuple(visual.grid_size)


def _open_clip(model: nn.Module, images: torch.Tensor, tokens: torch.Tensor) -> tuple[torch.Tensor, ...]:
    found = model.forward_intermediates(
        images, tokens, image_indices=1, text_indices=1, normalize=False, normalize_intermediates=True, image_output_fmt="NLC"
    )  # the last block's tokens, through ln_post and ln_final
    text, visual = found["text_intermediates"][-1], found["image_intermediates"][-1]
    projection = getattr(model, "text", model).text_projection
    if projection is not None:
        text = projection(text) if isinstance(projection, nn.Linear) else text @ projection
    return text, visual @ model.visual.proj, found["text_features"], found["image_features"]


def _transformers(model: nn.Module, images: torch.Tensor, tokens: torch.Tensor) -> tuple[torch.Tensor, ...]:
    text = model.get_text_features(input_ids=tokens, return_dict=True)
    image = model.get_image_features(pixel_values=images, return_dict=True)
    patches = model.vision_model.post_layernorm(image.last_hidden_state[:, 1:])  # without the class token
    words = model.text_projection(text.last_hidden_state)  # its final_layer_norm is behind it
    return words, model.visual_projection(patches), text.pooler_output, image.pooler_output


def _fast(family):
    """The fast tokenizer inside, or None for open_clip's SimpleTokenizer. Raises: ConfigError for another kind."""
    from open_clip.tokenizer import HFTokenizer, SimpleTokenizer

    outer = family.tokenizer
    if isinstance(outer, SimpleTokenizer) and outer.reduction_fn is None:
        return None
    inner = family.library[2] if isinstance(family, Transformers) else getattr(outer, "tokenizer", None)
    known = isinstance(family, Transformers) or (isinstance(outer, HFTokenizer) and not outer.tokenizer_mode)
    if not known or not getattr(inner, "is_fast", False):
        kind = type(outer if inner is None else inner).__name__
        raise ConfigError(f"{family.where}: its tokenizer ({kind}) does not say where a token lies in the text")
    return inner


def _simple(tokenizer, cleaned: str, length: int) -> tuple[list[int], list[Span]]:
    """SimpleTokenizer's ids and where their pieces lie in the cleaned text. A character of several bytes may be in several
    pieces, and lies in each of them whole.
    """
    ids, spans = [tokenizer.sot_token_id], [None]
    for match in tokenizer.pat.finditer(cleaned):
        word, at = match.group(), 0
        place = [match.start() + k for k, letter in enumerate(word) for _ in letter.encode()]  # of each byte
        for piece in tokenizer.bpe("".join(tokenizer.byte_encoder[b] for b in word.encode())).split(" "):
            n = len(piece.removesuffix(END_OF_WORD))
            ids.append(tokenizer.encoder[piece])
            special = ids[-1] in tokenizer.all_special_ids
            spans.append(None if special else (place[at], place[at + n - 1] + 1))
            at += n
    ids, spans = ids[: length - 1] + [tokenizer.eot_token_id], spans[: length - 1] + [None]
    return ids, spans + [None] * (length - len(spans))


def _led_back(text: str, cleaned: str, spans: list[Span]) -> list[Span]:
    """Spans of the cleaned text as spans of the text it was made from."""
    before, after = _folded(text), _folded(cleaned)
    places: list[list[int]] = [[] for _ in cleaned]  # of each cleaned character: those it came from
    pairs = SequenceMatcher(None, [c for c, _ in before], [c for c, _ in after], autojunk=False)
    for kind, i, i_end, j, j_end in pairs.get_opcodes():
        for n in range(j, j_end):
            came = range(i + n - j, i + n - j + 1) if kind == "equal" else range(i, i_end)
            places[after[n][1]] += [before[m][1] for m in came]
    found = []
    for span in spans:
        came = [] if span is None else [m for n in range(*span) for m in places[n]]
        found.append((min(came), max(came) + 1) if came else None)
    return found


def _folded(text: str) -> list[tuple[str, int]]:
    """The characters in lower case, which may be more, each with its place."""
    return [(c, k) for k, letter in enumerate(text) for c in letter.lower()]
