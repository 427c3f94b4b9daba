"""analysis/captions.py, CLIP's text side and its command, against the reference's numbers and
transformers' CLIP."""

import gzip
import sys

import forked
import golden
import numpy as np
import pytest
import torch
from PIL import Image

from analysis import captions
from runtime.networks import NOT_WEIGHTS, clip_of, load_clip

KEYS, _ = golden.case("zero123_keys")
TINY = dict(embed_dim=32, image_resolution=64, vision_layers=2, vision_width=128,
            vision_patch_size=16, transformer_width=64, transformer_heads=1, transformer_layers=2)


def golden_state(**sizes):
    """The golden weights of a CLIP with its text tower, by their names."""
    with torch.device("meta"):
        model = captions.CLIP(**sizes)
    return {name: golden.weight(name, p.shape) for name, p in model.named_parameters()}


@pytest.fixture(scope="module")
def tokenizer():
    try:
        return captions.Tokenizer(captions.find_vocabulary())
    except FileNotFoundError as err:
        pytest.skip(str(err))


# ---- the network

def test_whole_clip_adds_the_text_transformer_to_the_checkpoints_names():
    with torch.device("meta"):
        image_side, whole = captions.clip.CLIP().state_dict(), captions.CLIP().state_dict()
    extra = {name: list(tensor.shape) for name, tensor in whole.items() if name not in image_side}
    expected = KEYS["full_clip_vit_l14_extra_keys_relative_to_cond_stage_model_model"]
    assert list(extra.items()) == [(name, shape) for name, (shape, _) in expected.items()]
    assert image_side.keys() < whole.keys()


@pytest.mark.parametrize("case", ["clip_tiny", "clip_full"])
@torch.no_grad()
def test_text_embedding_and_logits_equal_the_reference(case, monkeypatch):
    description, expected = golden.case(case)
    # the image tower is test_clip.py's
    state = golden_state(**description["config"] | {"vision_layers": 0})
    model = clip_of(state, captions.CLIP)
    (observed, _) = description["tolerance_observed"].values()
    tokens = expected["tokens"]
    golden.assert_close(model.encode_text(tokens), expected["encode_text"], observed["encode_text"])
    monkeypatch.setattr(model, "encode_image", lambda image: image)
    logits = model(expected["encode_image"], tokens)
    golden.assert_close(logits, expected["logits_per_image"])
    golden.assert_close(logits.T, expected["logits_per_text"])


def test_size_is_read_off_the_shapes():
    with torch.device("meta"):
        model = captions.CLIP(**TINY)
        again = captions.CLIP(**captions.CLIP.sizes_of(model.state_dict()))
    shapes = [{k: v.shape for k, v in m.state_dict().items()} for m in (model, again)]
    assert shapes[0] == shapes[1]
    heads = [[m.heads for m in each.modules() if hasattr(m, "heads")] for each in (model, again)]
    assert heads[0] == heads[1]


def test_the_image_tower_is_taken_of_a_file_with_both():
    state = golden_state(**TINY)
    model = clip_of(state)
    assert torch.equal(model.visual.proj, state["visual.proj"])
    assert not hasattr(model, "transformer")


# ---- tokenizer

def test_tokenizer_equals_the_reference(tokenizer):
    description, _ = golden.case("clip_tokenizer")
    for case in description["cases"]:
        assert tokenizer.encode(case["text"]) == case["ids"]
        if case["n_ids"] <= 75:
            [row] = tokenizer.tokenize([case["text"]]).tolist()
            assert row in description["tokenize_truncate_true"]


def test_html_is_unescaped_twice_even_where_ftfy_leaves_it(tokenizer):
    assert tokenizer.encode("<b> &amp;amp;") == tokenizer.encode("<b> &")


def test_too_long_texts_are_refused(tokenizer):
    description, _ = golden.case("clip_tokenizer")
    too_long = description["tokenize_raises_without_truncate"]["indices"]
    for i, case in enumerate(description["cases"]):
        if i in too_long:
            with pytest.raises(ValueError, match=f"{case['n_ids']} tokens, at most 75 fit"):
                tokenizer.tokenize([case["text"]])
        else:
            tokenizer.tokenize([case["text"]])


def test_tokens_of_the_golden_texts_are_the_tokenizers(tokenizer):
    for case in ("clip_tiny", "clip_full"):
        description, expected = golden.case(case)
        for text, row in zip(description["texts"], expected["tokens"].tolist()):
            if row[-1] == 0:            # it fits
                assert tokenizer.tokenize([text]).tolist() == [row]


def test_vocabulary_is_found_in_a_package_that_is_not_imported(tmp_path, monkeypatch):
    package = tmp_path / "open_clip"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('torchvision is missing')")
    (package / captions.VOCABULARY).write_bytes(b"")
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    assert captions.find_vocabulary() == package / captions.VOCABULARY


def test_missing_vocabulary_is_said_with_the_remedy(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    with pytest.raises(FileNotFoundError, match="pip install --no-deps open_clip_torch"):
        captions.find_vocabulary()


@pytest.mark.parametrize("content", [
    b"<html>not found</html>", gzip.compress(b"i n\nt h\n", mtime=0), gzip.compress(b"i n\n" * 60000, mtime=0)[:80],
    gzip.compress(b"\xff\xfe" * 9, mtime=0), gzip.compress(b"one two three\n" * 60000, mtime=0), b"",
    gzip.compress(b"", mtime=0)[:10] + b"\xff" * 50])
def test_broken_vocabulary_is_refused_in_one_line(content, tmp_path):
    path = tmp_path / captions.VOCABULARY
    path.write_bytes(content)
    with pytest.raises(ValueError) as error:
        captions.Tokenizer(path)
    assert str(error.value).startswith(f"{path}: not {captions.VOCABULARY}: ")
    assert "\n" not in str(error.value)


# ---- command line

def sharp_state():
    """The small CLIP with the logit scale of trained ones: random weights see no chairs or dogs."""
    return golden_state(**TINY) | {"logit_scale": torch.tensor(100.0).log()}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """An image, and a small CLIP as OpenAI stores it, as zero123 stores it, and as safetensors."""
    from safetensors.torch import save_file
    folder = tmp_path_factory.mktemp("clip")
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (40, 60, 4), dtype=np.uint8)
    Image.fromarray(pixels, "RGBA").save(folder / "image.png")
    state = sharp_state()
    half = {name: tensor.half() for name, tensor in state.items()}
    numbers = {name: torch.tensor(1) for name in NOT_WEIGHTS}
    torch.save(half | numbers, folder / "openai.pt")
    zero123 = {f"cond_stage_model.model.{name}": tensor for name, tensor in state.items()
               if not name.startswith("transformer.")}
    torch.save({"state_dict": zero123 | {"betas": torch.zeros(9)}}, folder / "zero123.ckpt")
    save_file(state, folder / "clip.safetensors")
    save_file({"weight": torch.zeros(2)}, folder / "other.safetensors")
    return folder


def test_probabilities_are_printed_from_every_kind_of_weights(files, tokenizer, capsys):
    model = clip_of(sharp_state(), captions.CLIP)
    with torch.no_grad():
        logits = model(captions.read_image(files / "image.png"),
                       tokenizer.tokenize(["a chair", "a dog"]))
    expected = logits[0].softmax(dim=0).tolist()
    for weights in (["openai.pt"], ["clip.safetensors"], ["zero123.ckpt", "openai.pt"]):
        captions.main(captions.parser().parse_args(
            [str(files / "image.png"), "--text", "a chair", "a dog",
             "--weights", *[str(files / name) for name in weights]]))
        lines = [line.split("%  ") for line in capsys.readouterr().out.splitlines()]
        assert [text for _, text in lines] == ["a chair", "a dog"]
        # one decimal is printed, and half precision weights differ in the fourth digit
        assert [float(number) / 100 for number, _ in lines] == pytest.approx(expected, abs=3e-3)


class Published(captions.CLIP):
    """CLIP as OpenAI traced it: the image is preprocessed outside, a size is stored as a buffer."""
    def forward(self, image, tokens):
        return self.visual(image), self.encode_text(tokens)


@pytest.mark.filterwarnings("ignore")      # torch.jit is deprecated, but OpenAI's files use it
def test_torchscript_archive_is_read_as_its_weights(tmp_path):
    state = golden_state(**TINY)
    model = Published(**TINY)
    model.load_state_dict(state)
    del model.mean, model.std
    model.register_buffer("input_resolution", torch.tensor(64))
    inputs = torch.zeros(1, 3, 64, 64), torch.zeros(1, 77, dtype=torch.int64)
    torch.jit.trace(model, inputs, check_trace=False).save(str(tmp_path / "traced.pt"))
    loaded = load_clip([tmp_path / "traced.pt"], captions.CLIP).state_dict()
    assert loaded.keys() == state.keys()
    assert all(torch.equal(loaded[name], state[name]) for name in state)


def test_earlier_weights_win_over_later_ones(files):
    state = sharp_state()
    model = load_clip([files / "zero123.ckpt", files / "openai.pt"], captions.CLIP)
    assert torch.equal(model.visual.proj, state["visual.proj"])
    halved = state["transformer.resblocks.0.mlp.c_fc.weight"].half().float()
    assert torch.equal(model.transformer.resblocks[0].mlp.c_fc.weight, halved)


@pytest.mark.parametrize("weights, image, message", [
    ("zero123.ckpt", "image.png", "texts need OpenAI's whole ViT-L-14.pt"),
    ("other.safetensors", "image.png", "no CLIP image tower"),
    ("missing.pt", "image.png", "missing.pt"),
    ("openai.pt", "missing.png", "missing.png"),
    ("openai.pt", "openai.pt", "is not an image that Pillow can read"),
])
def test_bad_arguments_end_in_one_line(weights, image, message, files, tokenizer, capsys):
    args = captions.parser().parse_args([str(files / image), "--text", "a chair", "--weights",
                                         str(files / weights)])
    with pytest.raises(SystemExit) as end:
        captions.command.run("captions", captions.main, args)
    out, err = capsys.readouterr()
    assert end.value.code == 2 and out == ""
    assert err.startswith("captions: ") and err.count("\n") == 1 and message in err


def test_script_runs_by_itself(files, tokenizer):
    done = forked.run("-m", "analysis.captions", files / "image.png", "--text", "a dog", "--weights",
                      files / "openai.pt")
    assert (done.returncode, done.stdout, done.stderr) == (0, "100.0%  a dog\n", "")


def test_image_is_cropped_to_its_centre_over_white(tmp_path):
    pixels = np.zeros((10, 30, 4), dtype=np.uint8)
    pixels[:, 10:20] = (255, 0, 0, 255)          # the middle is red, the sides are transparent
    Image.fromarray(pixels, "RGBA").save(tmp_path / "image.png")
    x = captions.read_image(tmp_path / "image.png")
    assert x.shape == (1, 3, captions.CROP, captions.CROP)
    # bicubic takes in a little of the sides; uncropped, only the middle third would be red
    assert x[..., 32:-32].eq(torch.tensor([1.0, -1.0, -1.0]).view(3, 1, 1)).all()
    Image.fromarray(np.zeros((8, 8, 4), dtype=np.uint8), "RGBA").save(tmp_path / "image.png")
    assert captions.read_image(tmp_path / "image.png").eq(1).all()


# ---- transformers

def transformers_state(state):
    """Our tensors under the names of transformers' CLIPModel."""
    whole = {"visual.class_embedding": "vision_model.embeddings.class_embedding",
             "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
             "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
             "positional_embedding": "text_model.embeddings.position_embedding.weight",
             "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
             "logit_scale": "logit_scale"}
    parts = {"visual.transformer.resblocks": "vision_model.encoder.layers",
             "transformer.resblocks": "text_model.encoder.layers",
             "visual.ln_pre": "vision_model.pre_layrnorm", "ln_1": "layer_norm1",
             "visual.ln_post": "vision_model.post_layernorm", "ln_2": "layer_norm2",
             "ln_final": "text_model.final_layer_norm",
             "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2", "attn.": "self_attn."}
    theirs = {"visual_projection.weight": state["visual.proj"].T,
              "text_projection.weight": state["text_projection"].T}
    for name, tensor in state.items():
        if name in whole:
            theirs[whole[name]] = tensor
        elif name not in ("visual.proj", "text_projection"):
            for ours, other in parts.items():
                name = name.replace(ours, other)
            if "in_proj_" in name:
                for letter, part in zip("qkv", tensor.chunk(3)):
                    theirs[name.replace("in_proj_", f"{letter}_proj.")] = part
            else:
                theirs[name] = tensor
    return theirs


@torch.no_grad()
def test_equals_transformers_clip_in_float64():
    transformers = pytest.importorskip("transformers", reason="oracle: pip install transformers")
    end, length = 98, 20
    ours = captions.CLIP(**TINY | dict(context_length=length, vocab_size=end + 1))
    golden.fill(ours).double()
    common = dict(hidden_act="quick_gelu", num_hidden_layers=2, projection_dim=TINY["embed_dim"])
    theirs = transformers.CLIPModel(transformers.CLIPConfig(
        text_config=common | dict(hidden_size=64, intermediate_size=256, num_attention_heads=1,
                                  vocab_size=end + 1, max_position_embeddings=length,
                                  bos_token_id=0, eos_token_id=end),
        vision_config=common | dict(hidden_size=128, intermediate_size=512, num_attention_heads=2,
                                    image_size=64, patch_size=16),
        projection_dim=TINY["embed_dim"])).double().eval()
    report = theirs.load_state_dict(transformers_state(ours.state_dict()), strict=False)
    assert not report.unexpected_keys
    assert all(name.endswith("position_ids") for name in report.missing_keys)
    x = golden.network_input("oracle/image", (2, 3, 90, 70), tanh=True).double()
    tokens = torch.zeros(3, length, dtype=torch.int64)
    for row, words in zip(tokens, (3, 7, length - 1)):
        row[:words] = torch.arange(1, words + 1)
        row[words] = end
    expected = theirs(input_ids=tokens, pixel_values=ours.preprocess(x))
    found = ours(x, tokens)
    # float64 rounding over a few layers
    torch.testing.assert_close(found, expected.logits_per_image, rtol=1e-11, atol=1e-11)
    for embedding, normalised in ((ours.encode_image(x), expected.image_embeds),
                                  (ours.encode_text(tokens), expected.text_embeds)):
        embedding = embedding / embedding.norm(dim=-1, keepdim=True)
        torch.testing.assert_close(embedding, normalised, rtol=0, atol=1e-12)
