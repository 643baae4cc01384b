"""Sparse kernels. Oracles: torch's convolution, torch's own 2:4 packing, one-line refusals; the GPU test needs one."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from halfstep.core.errors import ModelError
from halfstep.engine.kernels import GemmConv2d, gemm_matrix, misfit, require_supported, use_semi_structured
from halfstep.methods.sparse import sparsify
from halfstep.nets.masks import Masking, Pattern, masked
from halfstep.nets.uvit import UViT2DModel

TWO_FOUR = Pattern(2, 4)


@pytest.mark.parametrize(("kernel", "stride", "padding"), [(1, 1, 0), (3, 1, 1), (3, 2, 1), (1, 2, 0), (2, 2, 0)])
def test_a_convolution_is_a_matrix_product(kernel, stride, padding):
    torch.manual_seed(0)
    conv = nn.Conv2d(8, 6, kernel, stride, padding)
    x = torch.randn(2, 8, 9, 7)
    assert torch.allclose(GemmConv2d(gemm_matrix(conv), conv)(x), conv(x), atol=1e-5)


def test_a_masked_convolution_s_matrix_is_what_torch_packs():
    from torch.sparse._semi_structured_conversions import (
        sparse_semi_structured_from_dense_cutlass,
        sparse_semi_structured_to_dense_cutlass,
    )

    conv = nn.Conv2d(64, 32, 3)
    conv.weight.data = masked(conv.weight.detach(), TWO_FOUR)
    matrix = gemm_matrix(conv).half()
    packed = sparse_semi_structured_from_dense_cutlass(matrix)
    assert torch.equal(sparse_semi_structured_to_dense_cutlass(*packed), matrix)


@pytest.mark.parametrize(
    ("layer", "fits"),
    [
        (nn.Linear(128, 64), True),
        (nn.Linear(100, 64), False),
        (nn.Linear(128, 40), False),
        (nn.Conv2d(64, 32, 3), True),
        (nn.Conv2d(64, 32, 3, groups=2), False),
        (nn.Conv2d(64, 32, 3, padding="same"), False),
        (nn.LayerNorm(64), False),
    ],
)
def test_layers_that_do_not_fit_are_named_with_a_reason(layer, fits):
    assert (misfit(layer, torch.bfloat16) == "") == fits


def test_a_cpu_is_refused_in_one_line_and_the_model_is_left_alone():
    model = UViT2DModel(sample_size=8, embed_dim=64, depth=2, num_heads=2).bfloat16()
    net = sparsify(model)
    baked = net.bake(TWO_FOUR)
    with pytest.raises(ModelError, match="compress slimmable") as caught:
        use_semi_structured(baked, Masking(TWO_FOUR, net.names))
    assert "\n" not in str(caught.value)
    assert all(isinstance(module, nn.Module) and "Gemm" not in type(module).__name__ for module in baked.modules())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_sparse_kernels_compute_the_same_and_odd_requests_are_refused():
    device = torch.device("cuda")
    for dtype, pattern in ((torch.float32, TWO_FOUR), (torch.bfloat16, Pattern(1, 4))):
        with pytest.raises(ModelError):
            require_supported(device, dtype, pattern)
    torch.manual_seed(0)
    model = UViT2DModel(embed_dim=1024, depth=2, num_heads=16).to(device, torch.bfloat16).eval()
    net = sparsify(model)
    baked = net.bake(TWO_FOUR)
    x, t = torch.randn(16, 3, 32, 32, device=device, dtype=torch.bfloat16), torch.tensor(7, device=device)
    with torch.no_grad():
        before = baked(x, t).sample
        table = use_semi_structured(baked, Masking(TWO_FOUR, net.names), batch=16)
        assert torch.allclose(baked(x, t).sample, before, atol=0.05)
    assert len(table) == len(net.names) and all(row.why for row in table)
