"""Models by the hub's names. Oracle: a cache laid out as huggingface_hub documents it, read without a network."""

from __future__ import annotations

import pytest
from diffusers import DDPMPipeline, DDPMScheduler

from halfstep.core.errors import ModelError
from halfstep.nets.models import load_denoiser, pipeline_folder
from tiny import unet


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache with one model, and no network."""
    from huggingface_hub import constants

    home = tmp_path / "models--some--tiny"
    (home / "refs").mkdir(parents=True)
    (home / "refs" / "main").write_text("a" * 40)
    DDPMPipeline(unet(0), DDPMScheduler()).save_pretrained(home / "snapshots" / ("a" * 40))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path


def test_a_cached_model_of_the_hub_is_loaded_by_its_name(cache, monkeypatch):
    folder = pipeline_folder("hub:some/tiny")
    assert folder == cache / "models--some--tiny" / "snapshots" / ("a" * 40)
    model, config = load_denoiser("hub:some/tiny")
    assert config["prediction_type"] == "epsilon"
    assert all((a == b).all() for a, b in zip(model.parameters(), unet(0).parameters(), strict=True))


@pytest.mark.parametrize("name, told", [("some/other", "HF_HUB_OFFLINE is set"), ("not a name!", "OWNER/NAME")])
def test_what_is_not_there_is_refused_in_one_line(cache, name, told):
    with pytest.raises(ModelError, match=told) as error:
        pipeline_folder(f"hub:{name}")
    assert "\n" not in str(error.value)
