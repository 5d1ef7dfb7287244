"""A CLIP's features of every word and patch, against its own modules; and where each token lies in its text."""

import json
import random

import pytest
import tiny
import torch
from torch.nn.functional import normalize

from fastsds.config import ConfigError
from fastsds.recipes.clip_tokens import ClipTokens
from fastsds.student import load_student

TEXTS = ["a red ring", "the blue cross is left of a white ring", "", "It's  THE\t2nd ring, isn't it?", "naïve 雪 \N{SNOWMAN}"]
STRANGE = "abcXYZ 019 ,.'!?-  \t\n&<>éÉßİ雪\N{SNOWMAN}\N{GRINNING FACE}\N{COMBINING ACUTE ACCENT}ﬁ½"


def simple(folder):
    """An open_clip folder that names no tokenizer: open_clip's own, which has no account of where a token lies."""
    from open_clip.model import CLIP
    from safetensors.torch import save_file

    config = tiny.student_config(49408)
    del config["model_cfg"]["text_cfg"]["hf_tokenizer_name"]
    config["model_cfg"]["text_cfg"]["context_length"] = 20
    torch.manual_seed(1)
    clip = CLIP(**config["model_cfg"])
    folder.mkdir()
    save_file({k: v.contiguous() for k, v in clip.state_dict().items()}, folder / "open_clip_model.safetensors")
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    return folder


def custom(folder):
    """An open_clip folder whose text tower is a module of its own."""
    from open_clip.model import CustomTextCLIP
    from safetensors.torch import save_file

    tiny.save_student(folder)
    config = json.loads((folder / "open_clip_config.json").read_text())
    torch.manual_seed(1)
    clip = CustomTextCLIP(**config["model_cfg"])
    config["model_cfg"]["custom_text"] = True
    save_file({k: v.contiguous() for k, v in clip.state_dict().items()}, folder / "open_clip_model.safetensors")
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    return folder


MADE = {"open_clip": tiny.save_student, "simple": simple, "custom": custom, "hf": lambda folder: tiny.save_hf(folder, "clip")}
KINDS = ("world", *MADE)


@pytest.fixture(scope="module")
def teachers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    return {name: ClipTokens(load_student("world" if name == "world" else MADE[name](folder / name))) for name in KINDS}


def by_hand(clip, pixels, tokens):
    """The last block's tokens through the library's own ln_post and ln_final, and both projections."""
    kept, model = {}, clip.clip
    hf = hasattr(model, "vision_model")
    towers = (model.vision_model.encoder, model.text_model.encoder) if hf else (
        model.visual.transformer, getattr(model, "text", model).transformer
    )  # fmt: skip
    handles = [
        tower.register_forward_hook(lambda module, _, out, key=key: kept.update({key: out[0] if hf else out}))
        for key, tower in zip(("visual", "text"), towers, strict=True)
    ]
    with torch.no_grad():
        out = clip(pixels, tokens)
        if hf:
            visual = model.visual_projection(model.vision_model.post_layernorm(kept["visual"][:, 1:]))
            text = model.text_projection(model.text_model.final_layer_norm(kept["text"]))
        else:
            own = getattr(model, "text", model)
            visual = model.visual.ln_post(kept["visual"][:, 1:]) @ model.visual.proj
            text = own.ln_final(kept["text"]) @ own.text_projection
    for handle in handles:
        handle.remove()
    return text, visual, out


@pytest.mark.parametrize("name", KINDS)
def test_features_are_those_of_the_librarys_modules(teachers, name):
    teacher = teachers[name]
    pixels, tokens = tiny.pixels(len(TEXTS), teacher.image_size), teacher.tokenize(TEXTS)
    found = teacher(pixels, tokens)
    text, visual, out = by_hand(teacher.clip, pixels, tokens)
    rows, columns = teacher.grid
    assert found.text.shape == (*tokens.shape, teacher.width)
    assert found.visual.shape == (len(TEXTS), rows * columns, teacher.width)
    assert all(x.dtype == torch.float32 and not x.requires_grad for x in found)
    torch.testing.assert_close(found.text, text, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.visual, visual, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(normalize(found.pooled_text, dim=-1), out.text, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(normalize(found.pooled_image, dim=-1), out.image, rtol=1e-5, atol=1e-5)
    *_, pooled = teacher.clip.family.pooling(teacher.clip.clip)
    at = pooled(tokens)  # the token that CLIP pools has CLIP's own text feature
    torch.testing.assert_close(found.text[torch.arange(len(at)), at], found.pooled_text, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(teacher.encode_texts(TEXTS, batch=2), out.text, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(teacher.scale, out.logit_scale)


def test_a_patch_is_where_it_is(teachers):
    """A change inside one patch moves that patch's feature most."""
    teacher = teachers["open_clip"]
    pixels, tokens = tiny.pixels(1, teacher.image_size), teacher.tokenize(["a"])
    changed = pixels.clone()
    changed[:, :, :8, 8:] = 255 - changed[:, :, :8, 8:]  # row 0, column 1 of 2 x 2
    moved = (teacher(changed, tokens).visual - teacher(pixels, tokens).visual).norm(dim=2)[0]
    assert moved.argmax() == 1


def test_it_is_frozen(tmp_path):
    student = load_student(tiny.save_student(tmp_path / "clip")).train()
    teacher = ClipTokens(student)
    assert not teacher.clip.training and not any(p.requires_grad for p in teacher.clip.parameters())


@pytest.mark.parametrize(("make", "says"), [
    (lambda f: tiny.save_student(f, resnet=True), "image tower is a ModifiedResNet"),
    (lambda f: tiny.save_hf(f, "siglip"), "SiglipModel pools its patches by attention"),
    (tiny.save_siglip, "its image tower is a TimmModel"),
])  # fmt: skip
def test_other_towers_are_refused_by_name(make, says, tmp_path):
    with pytest.raises(ConfigError) as error:
        ClipTokens(load_student(make(tmp_path / "clip")))
    assert says in str(error.value) and str(tmp_path / "clip") in str(error.value)
    assert "expected a CLIP with a ViT" in str(error.value)


# where tokens lie


def pieces(teacher, text):
    """(what the token says, what its span holds) of each token that has a span."""
    ids, spans = teacher.tokenize([text])[0].tolist(), teacher.spans([text])[0]
    assert len(ids) == len(spans)
    inner = teacher.clip.family.tokenizer
    inner = getattr(inner, "tokenizer", None) or inner
    if hasattr(teacher.clip.family, "library") and "hf" in str(teacher.clip.family.where):
        inner = teacher.clip.family.library[2]
    return [(inner.decode([i]).replace("</w>", "").strip(), text[slice(*span)]) for i, span in zip(ids, spans) if span]


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("text", ["a red ring", "the blue cross is left of a white ring", "ring,cross", "RING  isn't  2nd"])
def test_a_span_holds_what_its_token_says(teachers, name, text):
    found = pieces(teachers[name], text)
    assert found and all(said.lower() == held.strip().lower() for said, held in found), found


@pytest.mark.parametrize("name", KINDS)
def test_spans_of_whatever_text(teachers, name):
    """In order, inside the text, none of blanks alone; and where nothing was cut off they hold every letter and digit."""
    teacher, draw = teachers[name], random.Random(7)
    for _ in range(60):
        text = "".join(draw.choice(STRANGE) for _ in range(draw.randint(0, 12)))
        spans = [span for span in teacher.spans([text])[0] if span]
        assert all(0 <= a < b <= len(text) for a, b in spans), (text, spans)
        assert spans == sorted(spans), (text, spans)
        assert all(text[a:b].strip() for a, b in spans), (text, spans)
        if len(spans) < teacher.clip.context_length - 2:
            held = {k for a, b in spans for k in range(a, b)}
            assert all(k in held for k, c in enumerate(text) if c.isascii() and c.isalnum()), (text, spans)


@pytest.mark.parametrize("name", ["simple", "open_clip", "hf"])
def test_the_bytes_of_whatever_piece_lie_in_its_span(teachers, name):
    """A byte-level piece says some bytes of what its span holds; the pieces of one text say all of its bytes but blanks'."""
    from open_clip.tokenizer import bytes_to_unicode

    byte_of, draw = {c: b for b, c in bytes_to_unicode().items()}, random.Random(11)
    teacher, fit = teachers[name], 0
    inner = teacher.clip.family.library[2] if name == "hf" else teacher.clip.family.tokenizer
    piece = inner.decoder.__getitem__ if name == "simple" else getattr(inner, "tokenizer", inner).convert_ids_to_tokens
    for _ in range(80):
        words = ("".join(draw.choices("abc019,.!?éß雪\N{GRINNING FACE}½", k=draw.randint(1, 4))) for _ in range(2))
        text = " ".join(words)
        spans, ids, said = teacher.spans([text])[0], teacher.tokenize([text])[0].tolist(), b""
        for i, span in zip(ids, spans, strict=True):
            if span:
                own = bytes(byte_of[c] for c in piece(i).removesuffix("</w>"))
                assert own in text[slice(*span)].encode(), (text, own, span)
                said += own
        whole = text.replace(" ", "").encode()
        assert whole.startswith(said), (text, said)
        fit += said == whole
    assert fit > 5  # not all were cut off


@pytest.mark.parametrize("name", KINDS)
def test_special_tokens_and_padding_have_none(teachers, name):
    teacher = teachers[name]
    spans, tokens = teacher.spans(["ring"])[0], teacher.tokenize(["ring"])[0]
    assert len(spans) == len(tokens) and spans[0] is None and spans[-1] is None
    assert not any(teacher.spans([""])[0])
    long = teacher.spans(["ring " * 100])[0]
    assert len(long) == teacher.clip.context_length and long[0] is None and long[-1] is None and all(long[1:-1])


def test_an_entity_s_token_is_led_back_to_its_place(teachers):
    text = "salt &amp; pepper"
    assert [text[slice(*span)] for span in teachers["simple"].spans([text])[0] if span] == ["salt", "&", "pepper"]


def test_a_slow_tokenizer_is_refused(tmp_path):
    folder = tiny.save_student(tmp_path / "clip")
    student = load_student(folder)
    student.family.tokenizer.tokenizer = type("Slow", (), {"is_fast": False})()
    with pytest.raises(ConfigError, match="does not say where a token lies"):
        ClipTokens(student)


def test_tokenizers_are_told_apart(teachers):
    digests = {name: teachers[name].tokenizer_digest() for name in KINDS}
    assert digests["open_clip"] == digests["custom"] and len({digests[name] for name in ("open_clip", "simple", "world")}) == 3
    teachers["open_clip"].spans(["ring"])  # pads and cuts
    assert teachers["open_clip"].tokenizer_digest() == digests["open_clip"]
