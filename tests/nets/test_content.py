"""The content of a net. Oracles: nets that differ in one thing."""

from __future__ import annotations

import pytest
import torch

from halfstep.nets.content import digest_tensors, fingerprint


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
def test_a_digest_changes_with_every_bit_name_shape_and_type(dtype: torch.dtype):
    one = {"a": torch.ones(2, 3).to(dtype), "b": torch.ones(()).to(dtype)}
    others = [
        {"a": one["a"].clone(), "b": torch.zeros(()).to(dtype)},
        {"a": one["a"].reshape(3, 2), "b": one["b"]},
        {"c": one["a"], "b": one["b"]},
        {"a": one["a"]},
        {"a": one["a"].to(torch.float16), "b": one["b"]},
    ]
    digests = {digest_tensors(tensors) for tensors in [one, *others]}
    assert len(digests) == 6 and digest_tensors(dict(reversed(one.items()))) in digests
    assert digest_tensors(one, "step 1") not in digests


def test_a_fingerprint_is_of_weights_and_config_alone():
    net = torch.nn.Linear(2, 2)
    twin = torch.nn.Linear(2, 2)
    twin.load_state_dict(net.state_dict())
    assert fingerprint(net, {"b": 1, "a": (2,)}) == fingerprint(twin, {"a": [2], "b": 1, "_diffusers_version": "9"})
    assert fingerprint(net) != fingerprint(torch.nn.Linear(2, 2)) and fingerprint(None, net) != fingerprint(net)


def test_a_fingerprint_of_a_condition_changes_with_any_bit_of_it():
    text = torch.randn(2, 3000)  # more than a print shows
    cond = {"encoder_hidden_states": text, "added_cond_kwargs": {"text_embeds": text[:, :4]}}
    other = text.clone()
    other[1, 1500] += 1e-6
    assert fingerprint(cond) == fingerprint({**cond, "encoder_hidden_states": text.clone()})
    assert fingerprint(cond) != fingerprint({**cond, "encoder_hidden_states": other})
    assert fingerprint({"class_labels": torch.tensor([1, 2])}) == fingerprint({"class_labels": [1, 2]})
