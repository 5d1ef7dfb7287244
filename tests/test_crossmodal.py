"""The cross-modal student: ViltModel's own numbers, in the grid's order; its head, its tokens, its folder, its errors."""

import json
import re
import time

import crossmodal_steps
import pytest
import runs
import tiny
import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import cross_entropy

from fastsds import config as recipes
from fastsds.config import ConfigError, StudentConfig
from fastsds.crossmodal import load_crossmodal, make_crossmodal, read_crossmodal, save_crossmodal
from fastsds.crossmodal.saving import read_head
from fastsds.engine import TorchEngine

TEXTS = ["the red ring", "a blue square is left of the white cross", "xyz"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.save_vilt(tmp_path_factory.mktemp("vilt"))


@pytest.fixture
def student(folder):
    return load_crossmodal(folder, 3).eval()


def plain(folder, pixels, texts):
    """(text [n, L, h], visual [n, L, h] in the grid's order, pooled, mask) of transformers alone, by its own processor."""
    from PIL import Image
    from transformers import AutoProcessor, ViltModel

    model = ViltModel.from_pretrained(folder).eval()
    drawn, embed = [], model.embeddings.visual_embed

    def watched(*arguments, **options):
        found = embed(*arguments, **options)
        drawn.append(found[2][0])
        return found

    model.embeddings.visual_embed = watched
    images = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in pixels]
    inputs = AutoProcessor.from_pretrained(folder)(images=images, text=texts, return_tensors="pt", padding=True)
    with torch.no_grad():
        out = model(**inputs)
    n, side = inputs.input_ids.shape[1], int(inputs.pixel_values.shape[-1] // 8)
    place = drawn[0][..., 0] * side + drawn[0][..., 1]  # [n, L], each a permutation
    visual = out.last_hidden_state[:, n + 1 :]
    visual = torch.stack([image[order.argsort()] for image, order in zip(visual, place, strict=True)])
    return out.last_hidden_state[:, :n], visual, out.pooler_output, inputs.attention_mask.bool(), place


@pytest.mark.parametrize("kind", ["Model", "ForMaskedLM", "ForQuestionAnswering", "ForImagesAndTextClassification"])
def test_features_are_those_of_plain_vilt(tmp_path, kind):
    folder = tiny.save_vilt(tmp_path, f"Vilt{kind}", num_images=1)
    student, pixels = load_crossmodal(folder, 3), tiny.pixels(3, 32)
    out, tokens = student(pixels, student.tokenize(TEXTS)), student.tokenize(TEXTS)
    text, visual, pooled, mask, drawn = plain(folder, pixels, TEXTS)
    assert torch.equal(student.mask(tokens), mask)
    assert not torch.equal(drawn, torch.arange(16).expand(3, 16))  # transformers' own order is drawn
    for ours, theirs in ((out.text[mask], text[mask]), (out.visual, visual), (out.pooled, pooled)):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out.logits, student.head(out.pooled))
    assert out.visual.std(dim=(0, 1)).min() > 1e-3 and out.logits.shape == (3, 3)


def test_another_image_size_interpolates_places_as_vilt_does(tmp_path):
    folder = tiny.save_vilt(tmp_path, made=48)
    student, pixels = load_crossmodal(folder, 3), tiny.pixels(3, 48)
    assert student.grid == (6, 6) and student.image_size == 48
    out = student(pixels, student.tokenize(TEXTS))
    text, visual, pooled, mask, _ = plain(folder, pixels, TEXTS)
    torch.testing.assert_close(out.visual, visual, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out.text[mask], text[mask], rtol=1e-5, atol=1e-5)


def test_all_patches_are_kept_whatever_the_configuration_would_drop(tmp_path, student):
    few = load_crossmodal(tiny.save_vilt(tmp_path, max_image_length=4), 3)
    few.head.load_state_dict(student.head.state_dict())
    pixels, tokens = tiny.pixels(2, 32), student.tokenize(TEXTS[:2])
    assert all(torch.equal(a, b) for a, b in zip(few(pixels, tokens), student(pixels, tokens), strict=True))


def test_a_patch_is_the_token_of_its_place_in_the_grid(student):
    seen = []
    student.model.embeddings.register_forward_hook(lambda module, given, out: seen.append(out[0]))
    pixels, tokens = tiny.pixels(1, 32), student.tokenize(TEXTS[:1])
    student(pixels, tokens)
    for row, column in ((0, 1), (1, 0), (3, 2)):
        changed = pixels.clone()
        changed[:, :, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8] ^= 255
        student(changed, tokens)
        differs = (seen[-1] != seen[0]).any(dim=2)[0]
        expected = tokens.shape[1] + 1 + row * student.grid[1] + column
        assert differs.nonzero().flatten().tolist() == [expected]


def test_the_same_call_gives_the_same_and_draws_nothing(student):
    state, call = torch.get_rng_state(), (tiny.pixels(3, 32), student.tokenize(TEXTS))
    first, second = student(*call), student(*call)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert torch.equal(torch.get_rng_state(), state)


def test_longer_texts_in_a_batch_change_nothing(student):
    pixels, tokens = tiny.pixels(3, 32), student.tokenize(TEXTS)
    whole = student(pixels, tokens)
    for k, text in enumerate(TEXTS):
        alone = student.tokenize([text])
        n = alone.shape[1]
        assert torch.equal(tokens[k, :n], alone[0]) and not student.mask(tokens[k, n:]).any()
        out = student(pixels[k : k + 1], alone)
        torch.testing.assert_close(whole.text[k, :n], out.text[0], rtol=1e-5, atol=1e-5)
        for ours, theirs in zip(whole[1:], out[1:], strict=True):
            torch.testing.assert_close(ours[k], theirs[0], rtol=1e-5, atol=1e-5)


def test_spans_say_where_tokens_lie(student):
    text = "The  Réd ring, xyz [SEP] above 雪!"
    spans, tokens = student.spans([text])[0], student.tokenize([text])[0]
    assert len(spans) == len(tokens) and spans[0] is None and spans[-1] is None
    pieces = student.family.tokenizer.convert_ids_to_tokens(tokens)
    for piece, (first, last) in zip(pieces[1:-1], spans[1:-1], strict=True):
        found = text[first:last].lower().replace("é", "e")
        assert piece in ("[UNK]", "[SEP]") or found == piece.removeprefix("##")
    covered = sorted({k for first, last in spans[1:-1] for k in range(first, last)})
    assert "".join(text[k] for k in covered) == re.sub(r"\s", "", text)
    long = "ring square " * 40
    assert len(student.spans([long])[0]) == student.tokenize([long]).shape[1] == student.family.length
    assert student.spans([""]) == [[None, None]]
    together = student.spans(["ring", long])
    assert [len(of) for of in together] == [student.family.length] * 2 and not any(together[0][3:])


def test_multiple_choice_scores_each_choice_as_if_it_were_alone(folder):
    student, pixels = load_crossmodal(folder, 0), tiny.pixels(2, 32)
    texts = [["the red ring", "a blue ring is left", "x"], ["a cross", "white", "square square square"]]
    tokens = student.tokenize(texts)
    assert tokens.shape[:2] == (2, 3) and torch.equal(tokens[1, 2], student.tokenize([t for c in texts for t in c])[5])
    out, named = student(pixels, tokens), student(pixels, tokens, torch.tensor([2, 1]))
    assert out.logits.shape == (2, 3) and out.text.shape[:2] == (2, tokens.shape[2]) and out.visual.shape[:2] == (2, 16)
    assert torch.equal(out.logits, named.logits)
    for k in range(2):
        for c in range(3):
            alone = student(pixels[k : k + 1], tokens[k : k + 1, c : c + 1])
            torch.testing.assert_close(out.logits[k, c], alone.logits[0, 0], rtol=1e-5, atol=1e-5)
            for some, chosen in ((out, 0), (named, (2, 1)[k])):
                if c == chosen:
                    for feature, one in zip(some[:3], alone[:3], strict=True):
                        torch.testing.assert_close(feature[k], one[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("classes", "shape", "of", "words"),
    [
        (3, (2, 3, 5), None, r"tokens: \(2, 3, 5\), this student expects \[b, L\]: it has 3 classes"),
        (0, (2, 5), None, r"tokens: \(2, 5\), this student expects \[b, choices, L\]: its head scores choices"),
        (3, (3, 5), None, r"tokens: \(3, 5\), expected \[2, L\] or \[2, choices, L\], L at most 16"),
        (3, (2, 17), None, "L at most 16"),
        (3, (2, 5), (2,), r"of: \(2,\), expected \[2\], beside tokens \[b, choices, L\]"),
        (0, (2, 3, 5), (3,), r"of: \(3,\), expected \[2\]"),
    ],
)
def test_shapes_that_do_not_fit_are_named(folder, classes, shape, of, words):
    of = None if of is None else torch.zeros(of, dtype=torch.int64)
    with pytest.raises(ValueError, match=words):
        load_crossmodal(folder, classes)(tiny.pixels(2, 32), torch.ones(shape, dtype=torch.int64), of)


def test_pixels_and_choices_that_do_not_fit_are_named(student):
    with pytest.raises(ValueError, match=r"pixels: torch.uint8 \(2, 3, 16, 16\), expected uint8 \[B, 3, 32, 32\]"):
        student(tiny.pixels(2), student.tokenize(TEXTS[:2]))
    with pytest.raises(ValueError, match=r"choices: \[1, 2\] a text, expected the same number for all"):
        student.tokenize([["a", "the"], ["red"]])


@pytest.mark.parametrize(("classes", "kind", "dtype"), [(3, "ViltModel", torch.float32), (0, "ViltForMaskedLM", torch.float16)])
def test_saved_and_read_again_is_the_same_bit_for_bit_and_plain_vilt(tmp_path, classes, kind, dtype):
    student = load_crossmodal(tiny.save_vilt(tmp_path / "from", kind, dtype=dtype), classes, seed=5)
    student.projections = torch.nn.ModuleDict({"text": torch.nn.Linear(tiny.WIDTH, 12)})
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.01)
    save_crossmodal(student.state_dict(), student, tmp_path / "a")
    state = read_crossmodal(tmp_path / "a")
    assert state.keys() == student.state_dict().keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in student.state_dict().items())
    again, pixels = load_crossmodal(tmp_path / "a"), tiny.pixels(3, 32)
    assert again.classes == classes
    tokens = again.tokenize([TEXTS, TEXTS[::-1], TEXTS]) if classes == 0 else again.tokenize(TEXTS)
    assert all(torch.equal(a, b) for a, b in zip(again(pixels, tokens), student(pixels, tokens), strict=True))
    save_crossmodal(again.state_dict(), again, tmp_path / "a")  # over itself
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    assert (config["architectures"], config["dtype"]) == (["ViltModel"], "float32")
    text, visual, pooled, mask, _ = plain(tmp_path / "a", pixels, TEXTS)
    encoded = again.tokenize(TEXTS)
    ours = student.family.encode(student.model, student._normalise(pixels, torch.float32), encoded.where(mask, 0), mask)
    torch.testing.assert_close(ours[0][mask], text[mask], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours[1], visual, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours[2], pooled, rtol=1e-5, atol=1e-5)


def test_what_trains_is_what_the_recipe_says(folder, tmp_path):
    heads = [f"head.{name}" for name in ("0.weight", "0.bias", "1.weight", "1.bias", "3.weight", "3.bias")]
    model = str(folder)
    student, trained = make_crossmodal(StudentConfig(model, tune="all"), 3)
    assert trained == [name for name, _ in student.named_parameters()]
    _, trained = make_crossmodal(StudentConfig(model, tune=("model.encoder.layer.1.*", "model.pooler.*")), 3)
    assert all(name.startswith(("model.encoder.layer.1.", "model.pooler.", "head.")) for name in trained)
    assert trained[-6:] == heads and len(trained) == 16 + 2 + 6
    student, trained = make_crossmodal(StudentConfig(model, tune="layernorm"), 3)
    assert len(trained) == 2 * (1 + 4 + 1) + 6 and all("norm" in name.lower() for name in trained if name not in heads)
    with pytest.raises(ConfigError, match=r"'model.decoder.\*' matches no parameter of this student; the nearest are model"):
        make_crossmodal(StudentConfig(model, tune=("model.decoder.*",)), 3)
    with pytest.raises(ConfigError, match="student.pretrained: 'openai', expected null"):
        make_crossmodal(StudentConfig(model, pretrained="openai"), 3)

    lora = recipes.LoRAConfig(2, 4.0, ("*attention*weight",))
    student, trained = make_crossmodal(StudentConfig(model, tune="lora", lora=lora), 3)
    assert {name for name in trained if name.startswith("head.")} == set(heads) and len(trained) == 2 * 2 * 4 + 6
    for name in trained:
        torch.nn.init.normal_(student.get_parameter(name), std=0.1)
    save_crossmodal(student.state_dict(), student, tmp_path)
    pixels, tokens = tiny.pixels(3, 32), student.tokenize(TEXTS)
    torch.testing.assert_close(load_crossmodal(tmp_path)(pixels, tokens).logits, student(pixels, tokens).logits)


@pytest.mark.parametrize("tune", ["all", ("model.encoder.*",)])
def test_gradients_reach_what_trains_and_blocks_run_again_give_the_same(folder, tune):
    pixels, labels, grads = tiny.pixels(3, 32), torch.tensor([0, 2, 1]), []
    for again in (False, True):
        student, trained = make_crossmodal(StudentConfig(str(folder), tune=tune, checkpoint=again), 3)
        student.train()
        out = student(pixels, student.tokenize(TEXTS))
        (cross_entropy(out.logits, labels) + out.text.square().mean() + out.visual.square().mean()).backward()
        grads.append({name: parameter.grad for name, parameter in student.named_parameters()})
        assert all((grad is not None and bool(grad.isfinite().all())) == (n in trained) for n, grad in grads[-1].items())
    for name in trained:
        torch.testing.assert_close(grads[0][name], grads[1][name])


def test_an_engine_trains_it(folder):
    recipe = recipes.load_recipe(overrides=["precision=bf16", "data.accumulation=1", f"student.model={folder}"])
    student, _ = make_crossmodal(recipe.student, 3)
    engine = TorchEngine(student, recipe)
    pixels, tokens = tiny.pixels(8, 32), student.tokenize(tiny.captions(8))
    losses = []
    for _ in range(12):
        out = engine(pixels, tokens)
        assert {x.dtype for x in out} == {torch.float32}
        losses.append(cross_entropy(out.logits, torch.arange(8) % 3))
        engine.backward(losses[-1])
        engine.step()
    assert losses[-1] < 0.5 * losses[0]
    assert engine.state(moments=False)[0].keys() == student.state_dict().keys()


def test_no_weights_are_read_on_the_meta_device(folder, tmp_path):
    for name in ("config.json", "preprocessor_config.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    shapes = {name: tensor.shape for name, tensor in load_crossmodal(folder, 3).state_dict().items()}
    student = load_crossmodal(tmp_path, 3, "meta")
    assert {name: tensor.shape for name, tensor in student.state_dict().items()} == shapes
    assert all(tensor.is_meta for tensor in student.parameters())


@pytest.mark.slow
def test_a_compiled_model_gives_the_same(folder, monkeypatch):
    """Traced without a break, texts of several lengths, and differentiated ahead of time."""
    compiled = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, mode: compiled(self, backend="aot_eager", fullgraph=True))
    torch.compiler.reset()
    students = [make_crossmodal(StudentConfig(str(folder), compile=c), 3)[0] for c in ("default", None)]
    for texts in (TEXTS, TEXTS[:1] * 3, TEXTS[1:] + TEXTS[:1]):
        grads = []
        for student in students:
            out = student(tiny.pixels(3, 32), student.tokenize(texts))
            student.zero_grad()
            (out.logits.logsumexp(dim=1).sum() + out.visual.square().sum() + out.text[:, 0].sum()).backward()
            grads.append([out.logits, *(parameter.grad for parameter in student.parameters())])
        for ours, theirs in zip(*grads, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_two_ranks_are_one(folder, tmp_path):
    """ZeRO 2, and ZeRO 3 with every parameter partitioned and gathered where it is used, against plain torch."""
    zero3 = {"stage": 3, "stage3_param_persistence_threshold": 0, "stage3_prefetch_bucket_size": 0}
    files = []
    for name, section in (("two", {"stage": 2}), ("three", zero3)):
        files.append(tmp_path / f"{name}.json")
        files[-1].write_text(json.dumps({"zero_optimization": section, "steps_per_print": 10**9}))
    crossmodal_steps.steps(str(folder), tmp_path / "none.safetensors", None)
    done = runs.deepspeed(crossmodal_steps.__file__, folder, tmp_path, *files, ranks=2)
    assert done.returncode == 0, done.stderr[-4000:]
    one, *others = (load_file(tmp_path / f"{name}.safetensors") for name in ("none", "two", "three"))
    assert one["losses"][0] != one["losses"][1]
    for other in others:
        assert other.keys() == one.keys()
        for name, tensor in one.items():
            if not name.endswith("key.bias"):  # it moves all scores alike: its gradient is rounding, Adam makes steps of that
                torch.testing.assert_close(other[name], tensor, rtol=0, atol=2e-5, msg=lambda m, name=name: f"{name}: {m}")


# -- the embedded world ------------------------------------------------------------------------------------------------


def test_the_world_has_a_small_vilt(tmp_path):
    start = time.monotonic()
    student, trained = make_crossmodal(StudentConfig(), 3, seed=1)
    assert time.monotonic() - start < 10
    assert (student.grid, student.image_size) == ((4, 4), 32) and sum(p.numel() for p in student.parameters()) < 1e6
    same, other = (make_crossmodal(StudentConfig(), 3, seed=seed)[0].state_dict() for seed in (1, 2))
    assert all(torch.equal(same[name], tensor) for name, tensor in student.state_dict().items())
    assert {name.partition(".")[0] for name in same if not torch.equal(other[name], same[name])} == {"head"}
    save_crossmodal(student.state_dict(), student, tmp_path)
    again, pixels, tokens = load_crossmodal(tmp_path), tiny.pixels(2, 32), student.tokenize(TEXTS[:2])
    assert all(torch.equal(a, b) for a, b in zip(again(pixels, tokens), student(pixels, tokens), strict=True))
    assert torch.equal(again.tokenize(TEXTS), student.tokenize(TEXTS))
    text = "a red ring [SEP] left — of 雪 <|endoftext|> it"
    assert [text[span[0] : span[1]] for span in student.spans([text])[0][1:4]] == ["a", "red", "ring"]
    assert len(student.spans([text])[0]) == int(student.mask(student.tokenize([text])).sum())  # its padding is its end token


@pytest.mark.parametrize("name", ["world_entailment", "world_questions", "world_choice"])
def test_texts_of_the_worlds_tasks_fit(name):
    from fastsds.data.tasks import load_task

    sizes = dict.fromkeys(("train", "dev", "test", "dev_shift", "shift"), 300)
    task, student = load_task(name, sizes=sizes), load_crossmodal("world", 0)
    texts = [t for split in task.splits.values() for e in split for t in ([f"{e.text} {c}" for c in e.choices] or [e.text])]
    tokens = student.tokenize(texts)
    assert tokens.shape[1] < student.family.length  # none was cut


# -- what is refused ---------------------------------------------------------------------------------------------------


def damaged(case, folder, tmp_path):
    made = tiny.save_vilt(tmp_path / "f", made=36 if case == "size" else 32)
    if case == "no configuration":
        (made / "config.json").unlink()
    if case == "other model":
        tiny.save_hf(made, "clip")
    if case == "no processor":
        (made / "preprocessor_config.json").unlink()
    if case == "no words":
        (made / "tokenizer.json").unlink()
    if case in ("cut", "no weights"):
        path = made / "model.safetensors"
        path.write_bytes(path.read_bytes()[:1000])
        if case == "no weights":
            path.unlink()
    if case == "tensor":
        shape = json.loads((made / "config.json").read_text()) | {"num_hidden_layers": 3}
        (made / "config.json").write_text(json.dumps(shape))
    if case in ("head", "classes", "head file", "head tensor"):
        student = load_crossmodal(made, 5)
        save_crossmodal(student.state_dict(), student, made)
        if case == "head file":
            (made / "head.safetensors").write_bytes(b"nothing")
        if case == "head tensor":
            state = student.state_dict()
            state["head.0.bias"] = state["head.0.bias"][:3]
            save_crossmodal(state, student, made)
    return made


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("no configuration", "config.json is missing"),
        ("other model", "model_type is 'clip'; expected a cross-modal model: vilt"),
        ("no processor", "preprocessor_config.json"),
        ("no words", "its tokenizer knows no words: tokenizer.json and vocab.txt are missing or empty"),
        ("size", "its image processor makes images of 36, expected a multiple of the patch, 8"),
        ("cut", "model.safetensors: truncated or damaged"),
        ("no weights", "no file named model.safetensors"),
        ("tensor", r"tensor encoder.layer.2.\S+ is missing"),
        ("classes", "its head has 5 classes, the task asks for 3 classes: remove it"),
        ("head", "its head has 5 classes, the task asks for one score a choice"),
        ("head file", "head.safetensors: truncated or damaged"),
        ("head tensor", r"head.safetensors: tensor head.0.bias is \(3,\), expected \(32,\)"),
    ],
)
def test_what_is_wrong_in_a_folder_is_named(folder, tmp_path, case, words):
    made = damaged(case, folder, tmp_path)
    with pytest.raises(ConfigError, match=words) as caught:
        load_crossmodal(made, 0 if case == "head" else 5 if case == "head tensor" else 3)
    assert str(made) in str(caught.value)


def test_a_head_knows_what_its_classes_are_called(folder, tmp_path):
    """A head whose answers stand in another order, but are as many, answers wrongly without a word."""
    names = ("no", "yes", "two")
    student = load_crossmodal(folder, names)
    assert (student.classes, student.answers) == (3, names)
    save_crossmodal(student.state_dict(), student, tmp_path)
    assert all(load_crossmodal(tmp_path, asked).answers == names for asked in (None, 3, names))
    with pytest.raises(ConfigError, match="head.safetensors: its head's class 1 is 'yes', the task's 'two': remove it, for a"):
        load_crossmodal(tmp_path, ("no", "two", "yes"))
    (tmp_path / "other").mkdir()
    for classes in ("no, yes, two", '["no", 1]', "[]", "-1", "true", "null", "", "\N{SUPERSCRIPT TWO}", "9" * 5000):
        save_file(read_head(tmp_path).state, tmp_path / "other" / "head.safetensors", metadata={"classes": classes})
        with pytest.raises(ConfigError, match="head.safetensors: not the head of a cross-modal student"):
            read_head(tmp_path / "other")
    save_file(read_head(tmp_path).state, tmp_path / "head.safetensors", metadata={"classes": "3"})  # names that nobody knew
    assert load_crossmodal(tmp_path).answers == () and load_crossmodal(tmp_path, names).answers == names


def test_a_name_that_is_nothing_is_named(folder):
    with pytest.raises(ConfigError, match="'vilt-base' is no folder; expected a transformers folder, hf-hub"):
        load_crossmodal("vilt-base", 3)
    with pytest.raises(ConfigError, match="'./org/vilt' is no folder"):
        load_crossmodal("./org/vilt", 3)
    with pytest.raises(ConfigError, match="no head.safetensors, so the number of classes must be given"):
        load_crossmodal(folder)
    with pytest.raises(ConfigError, match="no head.safetensors: not a cross-modal student's folder"):
        read_crossmodal(folder)


@pytest.mark.parametrize("name", ["hf-hub:org/vilt", "org/vilt"])
def test_offline_a_hub_name_is_read_from_the_disk_or_refused_at_once(folder, tmp_path, monkeypatch, name):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    start = time.monotonic()
    with pytest.raises(ConfigError, match=r"config.json of hf-hub:org/vilt is not on this disk.*\(hf download org/vilt\)"):
        load_crossmodal(name, 3)
    assert time.monotonic() - start < 5
    snapshot = tmp_path / "models--org--vilt" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (tmp_path / "models--org--vilt" / "refs").mkdir()
    (tmp_path / "models--org--vilt" / "refs" / "main").write_text("0" * 40)
    for file in folder.iterdir():
        if file.name != "model.safetensors":
            (snapshot / file.name).write_bytes(file.read_bytes())
    with pytest.raises(ConfigError, match="model.safetensors of hf-hub:org/vilt is not on this disk"):
        load_crossmodal(name, 3)
    (snapshot / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    ours, theirs = load_crossmodal(name, 3), load_crossmodal(folder, 3)
    assert all(torch.equal(tensor, theirs.state_dict()[key]) for key, tensor in ours.state_dict().items())


# -- at its real size --------------------------------------------------------------------------------------------------
