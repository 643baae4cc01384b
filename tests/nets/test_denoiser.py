"""The door to a network. Oracles: torch's own moves, tensor by tensor."""

from __future__ import annotations

import torch

from halfstep.nets.denoiser import cond_to, repeated

COND = {
    "encoder_hidden_states": torch.randn(1, 7, 4),
    "added_cond_kwargs": {"text_embeds": torch.randn(1, 4), "image_embeds": [torch.randn(1, 2, 3)]},
    "cross_attention_kwargs": {"scale": 0.5},
    "class_labels": None,
}


def test_a_condition_moves_with_all_that_is_in_it():
    moved = cond_to(COND, "meta")
    added = moved["added_cond_kwargs"]
    assert [one.device.type for one in (moved["encoder_hidden_states"], added["text_embeds"])] == ["meta"] * 2
    assert added["image_embeds"][0].is_meta and moved["cross_attention_kwargs"] == {"scale": 0.5}
    assert moved["class_labels"] is None and not COND["encoder_hidden_states"].is_meta


def test_a_condition_of_one_sample_is_repeated_inside_of_mappings_too():
    three = repeated(COND, 3)
    assert torch.equal(three["encoder_hidden_states"], torch.cat([COND["encoder_hidden_states"]] * 3))
    assert torch.equal(three["added_cond_kwargs"]["text_embeds"], COND["added_cond_kwargs"]["text_embeds"].expand(3, 4))
    assert three["added_cond_kwargs"]["image_embeds"][0].shape == (3, 2, 3)
    assert three["cross_attention_kwargs"] == {"scale": 0.5}


def test_only_what_is_no_integer_takes_a_dtype():
    moved = cond_to(
        {"class_labels": torch.tensor([3]), "encoder_hidden_states": torch.ones(1, 2, 3)}, "cpu", torch.half
    )
    assert moved["class_labels"].dtype == torch.int64 and moved["encoder_hidden_states"].dtype == torch.half
