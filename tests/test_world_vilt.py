"""The pretraining of the embedded world's ViLT."""

import json
from collections import Counter

import torch

from fastsds.crossmodal import load_crossmodal
from fastsds.world import models, pretrain, vilt
from fastsds.world.scenes import COLOURS, SHAPES, WorldSource


def drawn(n=64):
    _, _, tokenizer = models.vilt_parts()
    source = WorldSource(seed=3)
    samples = vilt._load(source, vilt.FIRST, n)
    read = tokenizer(samples.captions, padding=True, return_tensors="pt")
    tokens = read.input_ids.where(read.attention_mask.bool(), -1)
    return tokenizer, tokens, samples.captions, source.scenes(samples.rows)


def test_the_hardest_caption_is_false_and_shares_most_words():
    tokenizer, tokens, captions, scenes = drawn()
    layout = scenes.layout()
    found = vilt._hardest(tokens, torch.tensor(tokenizer.all_special_ids), layout)
    words = [Counter(tokenizer(text, add_special_tokens=False).input_ids) for text in captions]
    for k, chosen in enumerate(found.tolist()):
        false = [j for j in range(len(captions)) if not torch.equal(layout[j], layout[k])]
        shared = {j: sum((words[k] & words[j]).values()) for j in false}
        assert chosen in false and shared[chosen] == max(shared.values())


def test_what_is_masked_is_words_some_or_all_of_a_kind():
    tokenizer, tokens, captions, _ = drawn()
    kinds = [torch.tensor([tokenizer(w, add_special_tokens=False).input_ids[0] for w in of]) for of in vilt._kinds()]
    special = torch.tensor(tokenizer.all_special_ids)
    hidden = vilt._hidden(tokens, kinds, special, 0.3, torch.Generator().manual_seed(0))
    assert not hidden[(tokens < 0) | torch.isin(tokens, special)].any()
    whole = [row for row, of in zip(hidden, tokens, strict=True) for ids in kinds if torch.equal(row, torch.isin(of, ids))]
    assert len(whole) > len(captions) / 2 and 0.1 < hidden.float().mean() < 0.4
    names = [set(COLOURS), set(SHAPES), {"left", "right", "above", "below"}]
    assert [set(of) for of in vilt._kinds()] == names


def test_a_short_pretraining_gives_a_folder_and_again_the_same(tmp_path):
    for name in ("a", "b"):
        pretrain.main(["--only", "vilt", "--steps", "3", "--output", str(tmp_path / name)])
    weights = [(tmp_path / name / "vilt" / "model.safetensors").read_bytes() for name in ("a", "b")]
    assert weights[0] == weights[1] and len(weights[0]) < 1.2e6
    student = load_crossmodal(tmp_path / "a" / "vilt", classes=3)
    assert student.grid == (4, 4) and student.tokenize(["a red ring"]).shape == (1, 5)
    stage = json.loads((tmp_path / "a" / "manifest.json").read_text())["stages"]["vilt"]
    assert stage["seed"] == 0 and "--only vilt" in stage["command"]
