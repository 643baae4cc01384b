"""Which class is which; oracles: apportionment by brute force, a model asked for the same class by its number."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from PIL import Image

from halfstep.app import inspection, verbs
from halfstep.core.errors import DataError, ModelError, PlanError
from halfstep.core.recipe import Recipe, SampleSpec
from halfstep.data.classes import listed, numbers_of, read_classes, spread
from halfstep.data.images import Images
from halfstep.engine.bank import Bank
from halfstep.engine.conditions import Conditions
from halfstep.engine.sampling import reference_plan, sample_images
from halfstep.engine.stepaware import StepAwarePipeline
from halfstep.measure.features import Extractor
from halfstep.measure.judge import Judge
from halfstep.measure.restore import Tiles, restore_picture, with_noise
from halfstep.methods.continuous import continuous_net
from halfstep.nets.denoiser import cond_of, predictor
from halfstep.nets.fit import fit
from halfstep.nets.fresh import new_model
from halfstep.nets.models import load_classes
from halfstep.search.damage import error_table
from halfstep.search.space import Space
from tiny import recipes, unet

tiny = recipes("""
model.channels=4,8 model.groups=2 model.head_dim=4 model.attention=false,false data.size=8 data.channels=1 train.steps=2
train.batch=4 train.warmup=0 train.sample_every=0 sample.steps=2 sample.batch=8
""")


net = partial(unet, channels=(4, 8), norm_num_groups=2)


def conditional(count: int = 3) -> UNet2DModel:
    """A net whose classes give clearly different pictures."""
    model = net(num_class_embeds=count)
    torch.nn.init.normal_(model.class_embedding.weight, std=20)
    return model


def bank_of(classes=("cat", "dog", "eel")) -> Bank:
    return Bank({"full": conditional()}, "full", "epsilon", classes=classes)


def pipeline_of(bank: Bank) -> StepAwarePipeline:
    plan = reference_plan(bank, DDPMScheduler().config, SampleSpec(steps=2), {"full": 1})
    pipe = StepAwarePipeline(bank, plan)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def images(labels, classes, n: int = 12) -> Images:
    pixels = np.random.default_rng(0).integers(0, 256, (n, 1, 8, 8), dtype=np.uint8)
    found = None if labels is None else np.array(labels, dtype=np.int64)
    return Images(name="these", pixels=pixels, labels=found, classes=tuple(classes), fingerprint="0" * 16)


def in_folders(root: Path, *names: str) -> str:
    for k, name in enumerate(names):
        (root / name).mkdir(parents=True)
        for i in range(4):
            Image.fromarray(np.full((8, 8), 20 * k + i, np.uint8)).save(root / name / f"{i}.png")
    return f"folder:{root}"


# ---- the data's mix of classes -------------------------------------------------------------------------------------


@pytest.mark.parametrize("counts", [(5, 5, 5), (1, 7, 3), (0, 2, 9), (40, 1)])
def test_every_beginning_has_the_datas_mix(counts):
    labels = np.random.default_rng(1).permutation(np.repeat(np.arange(len(counts)), counts))
    found = spread(labels)
    taken = np.zeros(len(counts))
    for label in found:  # Sainte-Laguë by its definition: the next seat goes to the largest quotient
        assert label == int(np.argmax(np.array(counts) / (2 * taken + 1)))
        taken[label] += 1
    assert sorted(found) == sorted(labels)
    if len(set(counts)) == 1:
        assert (found == np.arange(len(labels)) % len(counts)).all()


def test_a_judge_draws_the_classes_of_its_images_and_the_error_table_too():
    bank = bank_of()
    data = images([0] * 9 + [2] * 3, ("cat", "dog", "eel"))
    judge = Judge(bank, data, Extractor("pixels", 64, lambda x: x.flatten(1)), cache=None, batch=3)
    drawn = judge.conditions.at(0, 24)["class_labels"].tolist()
    assert [drawn.count(c) for c in range(3)] == [18, 0, 6]
    plan = pipeline_of(bank).plan
    wanted = torch.cat(list(sample_images(bank, plan, 8, seed=4, conditions=Conditions.of_classes(drawn))))
    np.testing.assert_allclose(judge.features(plan, 8, 4)[0], wanted.flatten(1), atol=1e-5)
    twin = Bank({"full": conditional(), "other": net(num_class_embeds=3)}, "full", "epsilon")
    plan = reference_plan(twin, DDPMScheduler().config, SampleSpec(steps=2), {"full": 2, "other": 1})
    seen = []
    space = Space.of(plan, twin.names, 1)
    list(
        error_table(
            twin, plan, space, lambda x, y: seen.append(x) or 0.0, images=8, seed=4, conditions=judge.conditions
        )
    )
    assert torch.allclose(
        seen[0], torch.cat(list(sample_images(twin, plan, 8, seed=4, conditions=judge.conditions))), atol=1e-5
    )


# ---- images and the model's classes --------------------------------------------------------------------------------


def test_labels_are_matched_by_name_where_the_model_knows_its_names():
    config, data = conditional().config, images([0, 1] * 6, ("eel", "cat"))
    found, told = fit(config, data, names=("cat", "dog", "eel"))
    assert [found.classes[k] for k in found.labels] == [data.classes[k] for k in data.labels]
    assert "by name" in told and "no images of dog" in told and "numbers differ" in told
    assert found.fingerprint != data.fingerprint  # what was learnt under the old numbers is not used again
    same = images([0, 1] * 6, ("cat", "dog"))
    found, told = fit(config, same, names=("cat", "dog", "eel"))
    assert found.fingerprint == same.fingerprint and (found.labels == same.labels).all()


def test_without_names_labels_are_matched_by_number_and_it_is_said():
    data = images([0, 1] * 6, ("eel", "cat"))
    found, told = fit(conditional().config, data)
    assert found is data and "by number" in told and "no images of 2" in told


@pytest.mark.parametrize(
    ("data", "names", "told"),
    [
        (images(None, ()), (), "without labels"),
        (images([0, 1, 2, 3] * 3, "abcd"), (), "4 classes (a, b, c, d)"),
        (images([0, 1] * 6, ("cat", "zebra")), ("cat", "dog", "eel"), "'zebra'"),
        (replace(images([0] * 12, ("cat",)), pixels=np.zeros((12, 3, 8, 8), np.uint8)), (), "3 channels"),
    ],
)  # fmt: skip
def test_images_that_do_not_fit_are_refused_in_words(data, names, told):
    with pytest.raises(DataError) as caught:
        fit(conditional().config, data, names=names)
    assert told in str(caught.value)


def test_a_class_that_has_no_picture_is_not_asked_for():
    data = images([0] * 12, ("cat", "zebra"))  # zebra's pictures are in another split
    assert (fit(conditional().config, data, names=("cat", "dog", "eel")).images.labels == 0).all()


@pytest.mark.parametrize("kind", ["identity", "timestep"])
def test_a_conditioning_that_is_no_class_number_is_refused(kind):
    with pytest.raises(ModelError, match="class_embed_type"):
        Bank({"full": net(class_embed_type=kind)}, "full", "epsilon")


@pytest.mark.parametrize("edit", ["model.kind=unet", "model.kind=uvit model.layers=2 model.patch=2", "continuous"])
def test_a_fresh_conditional_net_needs_labels(edit):
    recipe = tiny("model.class_conditional=true", *(edit.split() if "=" in edit else []))
    make = (lambda i: new_model(recipe.model, i, 1000)) if "=" in edit else (lambda i: continuous_net(recipe, i))
    with pytest.raises(DataError, match="without labels"):
        make(images(None, ()))
    assert make(images([0, 1] * 6, "ab")).config.num_class_embeds == 2


# ---- names beside the weights --------------------------------------------------------------------------------------


def test_a_pipeline_keeps_the_names_of_its_classes(tmp_path):
    pipeline_of(bank_of()).save_pretrained(tmp_path / "p")
    assert StepAwarePipeline.from_pretrained(tmp_path / "p").bank.classes == ("cat", "dog", "eel")
    pipeline_of(bank_of(())).save_pretrained(tmp_path / "q")
    assert StepAwarePipeline.from_pretrained(tmp_path / "q").bank.classes == ()
    assert not (tmp_path / "q" / "classes.json").exists()


@pytest.mark.parametrize("names", ["cat", ["a", "b"], ["a", "b", "b"], ["a", "b", 3], ["a", "b", ""], None, {"a": 0}])
def test_other_names_than_the_model_has_classes_are_refused(tmp_path, names):
    (tmp_path / "classes.json").write_text(json.dumps({"classes": names}))
    with pytest.raises(ModelError, match=r"classes\.json"):
        read_classes(tmp_path, 3)


def test_the_names_go_from_training_through_compression(tmp_path):
    data = in_folders(tmp_path / "data", "bright", "round")
    recipe = tiny("model.class_conditional=true")
    dense = verbs.train(data, tmp_path / "dense", recipe)
    assert load_classes(dense, {"num_class_embeds": 2}) == ("bright", "round")
    assert DDPMPipeline.from_pretrained(dense).unet.config.num_class_embeds == 2
    other = in_folders(tmp_path / "other", "round", "alpine")
    with pytest.raises(DataError, match="'alpine'"):
        verbs.train(other, tmp_path / "no", recipe, model=str(dense.parent))
    with pytest.raises(DataError, match="'alpine'"):
        verbs.make("regularized", str(dense.parent), other, tmp_path / "no", recipe)
    assert not (tmp_path / "no").exists()
    fewer = in_folders(tmp_path / "fewer", "round")  # 0 in its folder, 1 in the model
    bank = verbs.make("regularized", str(dense.parent), fewer, tmp_path / "reg", recipe).bank
    assert bank.classes == ("bright", "round")
    before = DDPMPipeline.from_pretrained(dense).unet.class_embedding.weight
    moved = (bank["r=0.1"].class_embedding.weight - before).abs().amax(1)
    assert moved[1] > 10 * moved[0]  # AdamW decays what gets no gradient, by lr * 1e-2


def test_unlabelled_images_for_a_conditional_net_leave_no_folder(tmp_path):
    np.savez(tmp_path / "x.npz", images=images(None, ()).pixels[:, 0])
    recipe = tiny()
    with pytest.raises(DataError, match="without labels"):
        verbs.train(f"npz:{tmp_path / 'x.npz'}", tmp_path / "run", recipe.edit(["model.class_conditional=true"]))
    assert not (tmp_path / "run").exists()
    verbs.train(f"npz:{tmp_path / 'x.npz'}", tmp_path / "run", recipe)  # the corrected command goes on


# ---- classes asked for ---------------------------------------------------------------------------------------------


def test_a_class_is_asked_for_by_name_or_number():
    names = ("cat", "dog", "2")
    assert numbers_of(["dog", 0, "1", "2"], 3, names) == [1, 0, 1, 2]
    assert numbers_of(["1"], 3) == [1]
    for asked in ("dgo", "3", -1, 1.0, True, "", "1e9", "9" * 5000):
        with pytest.raises(PlanError):
            numbers_of([asked], 3, names)
    with pytest.raises(PlanError, match="did you mean 'dog'"):
        numbers_of(["dgo"], 3, names)
    with pytest.raises(PlanError, match="unconditional"):
        numbers_of(["dog"], 0)
    assert len(listed(["x" * 5000] * 100)) < 500


def test_the_pipeline_takes_names_and_numbers_and_refuses_others():
    pipe = pipeline_of(bank_of())
    draw = lambda asked, n=2: pipe(batch_size=n, class_labels=asked, seed=3, output_type="np").images  # noqa: E731
    assert np.array_equal(draw(["dog", "eel"]), draw([1, 2]))
    assert np.array_equal(draw("dog"), draw(torch.tensor([1, 1])))
    assert np.array_equal(draw(None), draw([0, 1])) and not np.allclose(draw(None), draw([1, 1]))
    for asked in ([0], [0, 3], [0, -1], ["cat", "bird"], torch.tensor([0.0, 1.0])):
        with pytest.raises(PlanError):
            draw(asked)
    plain = pipeline_of(Bank({"full": net()}, "full", "epsilon"))
    with pytest.raises(PlanError, match="unconditional"):
        plain(batch_size=2, class_labels=[0, 1])


def test_sample_draws_the_classes_asked_for(tmp_path):
    pipe = pipeline_of(bank_of())
    pipe.save_pretrained(tmp_path / "p")
    verbs.sample(str(tmp_path / "p"), tmp_path / "out", Recipe().edit(["seed=3"]), count=2, classes=["eel"])
    wanted = pipe(batch_size=2, class_labels="eel", seed=3).images
    for k in range(2):
        assert np.array_equal(np.asarray(Image.open(tmp_path / "out" / f"{k:06d}.png")), np.asarray(wanted[k]))
    with pytest.raises(PlanError):
        verbs.sample(str(tmp_path / "p"), tmp_path / "other", Recipe(), count=2, classes=["bird"])
    assert not (tmp_path / "other").exists()


def test_denoise_restores_as_the_class_asked_for_and_refuses_to_guess(tmp_path):
    bank = bank_of()
    pipeline_of(bank).save_pretrained(tmp_path / "p")
    clean = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (1, 12, 12), dtype=np.uint8)).float() / 255
    Image.fromarray((clean[0] * 255).round().byte().numpy()).save(tmp_path / "x.png")
    call = partial(
        inspection.denoise, [str(tmp_path / "p")], [tmp_path / "x.png"], tmp_path / "out", inspection.Noise(level=0.1)
    )
    with pytest.raises(PlanError, match="cat, dog, eel"):
        call()
    assert not (tmp_path / "out").exists()
    found = {record.name: record.psnr_db for record in call(classes=["eel", 0])}
    config = {**DDPMScheduler().config, "prediction_type": "epsilon"}
    for name, label in (("full as eel, 1 step", 2), ("full as 0, 1 step", 0)):
        noisy, cond = with_noise(clean, 0.1, 0, 0), cond_of(torch.tensor([label]))
        restored = restore_picture(
            predictor(bank["full"]), noisy, 0.1, config, Tiles(size=8, channels=1), steps=1, cond=cond
        )
        error = (restored.clamp(0, 1) - clean).square().mean()
        assert found[name] == pytest.approx(float(-10 * error.log10()), abs=1e-3)
    assert found["full as eel, 1 step"] != found["full as 0, 1 step"]
