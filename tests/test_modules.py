"""The site of a bottleneck adaptation against the written equations, and what it owns."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastadapt as fa
from fastadapt.config import BottleneckConfig
from fastadapt.modules.bottleneck import Site
from fastadapt.modules.plain import replaced

HIDDEN, WIDTH = 24, 7
PLACE = {"device": torch.device("cpu"), "dtype": torch.float64}


def make_site(config: BottleneckConfig, norm: nn.LayerNorm | None = None) -> Site:
    torch.manual_seed(0)
    site = Site(config, HIDDEN, WIDTH, norm, **PLACE)
    with torch.no_grad():
        for p in site.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return site


def make_norm() -> nn.LayerNorm:
    norm = nn.LayerNorm(HIDDEN, eps=1e-12, dtype=torch.float64)
    with torch.no_grad():
        norm.weight.add_(0.2 * torch.randn(HIDDEN))
        norm.bias.add_(0.2 * torch.randn(HIDDEN))
    return norm


def a1(site: Site, u: torch.Tensor, activation=F.relu) -> torch.Tensor:
    return site.up(activation(site.down(u)))


@pytest.fixture
def tensors():
    torch.manual_seed(3)
    return [torch.randn(2, 5, HIDDEN, dtype=torch.float64, requires_grad=True) for _ in range(2)]


def check(site: Site, expected, tensors, norm: nn.Module) -> None:
    f, x = tensors
    y, want = site(f, x, norm), expected(f, x)
    torch.testing.assert_close(y, want)
    parameters = [p for p in (*site.parameters(), *norm.parameters()) if p.requires_grad]
    seed = torch.randn_like(y)
    ours = torch.autograd.grad(y, [f, x, *parameters], seed, allow_unused=True)
    theirs = torch.autograd.grad(want, [f, x, *parameters], seed, allow_unused=True)
    for a, b in zip(ours, theirs, strict=True):
        if b is None:
            assert a is None or not a.any()
        else:
            torch.testing.assert_close(a, b)


def test_houlsby(tensors):
    norm = make_norm()
    site = make_site(fa.HoulsbyConfig())
    check(site, lambda f, x: norm(a1(site, f, F.gelu) + f + x), tensors, norm)


def test_pfeiffer(tensors):
    norm = make_norm()
    site = make_site(fa.PfeifferConfig())
    check(site, lambda f, x: norm(f + a1(site, norm(f + x)) + x), tensors, norm)


@pytest.mark.parametrize("scale", [4.0, "learned", "channel"])
def test_parallel(tensors, scale):
    norm = make_norm()
    site = make_site(fa.ParallelConfig(scale=scale))
    check(site, lambda f, x: norm(f + site.scale * a1(site, x) + x), tensors, norm)


def test_gate_and_new_layer_norms(tensors):
    norm = make_norm()
    site = make_site(fa.PfeifferConfig(gate=True, ln_before=True, ln_after=True))

    def expected(f, x):
        u = norm(f + x)
        gate = torch.sigmoid(site.gate(u)).mean(dim=1, keepdim=True)
        return norm(site.norm_after(gate * a1(site, site.norm_before(u))) + f + x)

    check(site, expected, tensors, norm)


def test_a_hooked_layer_norm_is_called(tensors):
    norm = make_norm()
    site = make_site(fa.PfeifferConfig())
    f, x = tensors
    before = site(f, x, norm)
    calls = []
    norm.register_forward_hook(lambda module, args, out: calls.append(1) or 2 * out)
    u = 2 * F.layer_norm(f + x, (HIDDEN,), norm.weight, norm.bias, norm.eps)
    want = 2 * F.layer_norm(f + a1(site, u) + x, (HIDDEN,), norm.weight, norm.bias, norm.eps)
    torch.testing.assert_close(site(f, x, norm), want)
    assert len(calls) == 2 and not torch.allclose(before, want)


def test_dropout_is_drawn_in_training_only(tensors):
    norm = make_norm()
    site = make_site(fa.HoulsbyConfig(dropout=0.5))
    f, x = tensors
    torch.manual_seed(0)
    once = site.train()(f, x, norm)
    torch.manual_seed(0)
    assert torch.equal(site(f, x, norm), once)
    assert not torch.equal(site(f, x, norm), once)
    torch.testing.assert_close(site.eval()(f, x, norm), norm(a1(site, f, F.gelu) + f + x))


def test_initialisation():
    torch.manual_seed(0)
    big = {"hidden": 256, "width": 64, "norm": None, **PLACE}
    houlsby = Site(fa.HoulsbyConfig(), **big)
    for w in (houlsby.down.weight, houlsby.up.weight):
        assert w.abs().max() <= 2e-3 and 0.8e-3 < w.std() < 0.95e-3  # truncation at two std leaves 0.88 of it
    assert not houlsby.down.bias.any() and not houlsby.up.bias.any()
    bert = Site(fa.HoulsbyConfig(init="bert"), **big)
    assert 0.019 < bert.down.weight.std() < 0.021 and bert.down.weight.abs().max() > 0.05
    for init in ("mam_adapter", "lora"):
        zero = Site(fa.ParallelConfig(init=init), **big)
        assert not zero.up.weight.any() and zero.down.weight.abs().max() <= 1 / 16 and zero.down.weight.std() > 0.03
    norm = make_norm()
    copied = Site(fa.HoulsbyConfig(), HIDDEN, None, norm, **PLACE)
    assert copied.down is None and copied.LayerNorm.eps == norm.eps
    assert torch.equal(copied.LayerNorm.weight, norm.weight) and torch.equal(copied.LayerNorm.bias, norm.bias)
    assert copied.LayerNorm.weight is not norm.weight


def test_names_that_trainers_go_by():
    site = make_site(fa.HoulsbyConfig(gate=True, ln_before=True, ln_after=True, scale="channel"), make_norm())
    assert {name for name, _ in site.named_parameters()} == {
        "scale", "down.weight", "down.bias", "up.weight", "up.bias", "gate.weight", "gate.bias", "norm_before.weight",
        "norm_before.bias", "norm_after.weight", "norm_after.bias", "LayerNorm.weight", "LayerNorm.bias",
    }  # fmt: skip


def test_replaced_tells_why():
    linear = nn.Linear(2, 2)
    assert replaced(linear, nn.Linear) is None
    assert "LayerNorm" in replaced(nn.LayerNorm(2), nn.Linear)
    handle = linear.register_forward_pre_hook(lambda m, a: None)
    assert "hooks" in replaced(linear, nn.Linear)
    handle.remove()
    linear.forward = lambda x: x
    assert "patched" in replaced(linear, nn.Linear)
    assert replaced(nn.LayerNorm(2, bias=False), nn.LayerNorm)
    assert "Parametrized" in replaced(nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)), nn.Linear)


# -- configurations ----------------------------------------------------------------------------------------------

NAN, INF = float("nan"), float("inf")
BAD = {
    "bottleneck": [0, -1, 2.5, "64", True, NAN],
    "reduction_factor": [0, -2, "x", {}, {"default": 0}, NAN, INF, {"default": NAN}, {"0": 4, "default": "x"}],
    "activation": ["gloo", "", None, ["gelu"]],
    "placements": ["intermediate", (), ("output", "output"), ("output", "ffn"), None, 3, [["output"]]],
    "parallel": [1, None],
    "scale": ["big", None, True, NAN, INF, -INF, 10**400],
    "dropout": [-0.1, 1.5, "0.1", NAN, INF],
    "init": ["zeros", None],
    "leave_out": [3, (-1,), ("0",), None, [[1]], (NAN,)],
    "gate": ["yes"],
    "train_layer_norm": [True, "embeddings"],
    "residual_before_ln": ["pre_add", 1],
}


@pytest.mark.parametrize(("field", "value"), [(f, v) for f, values in BAD.items() for v in values])
def test_a_bad_field_is_named(field, value):
    with pytest.raises((ValueError, TypeError), match=rf"^{field}.*accepted"):
        fa.PfeifferConfig(**{field: value})


def test_fields_that_contradict_each_other():
    with pytest.raises(ValueError, match="got both"):
        fa.HoulsbyConfig(bottleneck=8, reduction_factor=2)
    with pytest.raises(ValueError, match="bottleneck"):
        BottleneckConfig()
    with pytest.raises(ValueError, match="original_ln_before"):
        fa.ParallelConfig(original_ln_before=True)
    with pytest.raises(ValueError, match="post_add"):
        fa.HoulsbyConfig(residual_before_ln="post_add")


def test_presets_and_widths():
    assert fa.HoulsbyConfig().bottleneck == 64 and fa.HoulsbyConfig(16).bottleneck == 16
    assert fa.HoulsbyConfig(reduction_factor=16).width(0, 768) == 48
    assert fa.PfeifferConfig().width(3, 768) == 48 and fa.ParallelConfig().width(3, 768) == 384
    assert fa.PfeifferConfig(reduction_factor=1000).width(0, 768) == 1
    mapped = fa.PfeifferConfig(reduction_factor={1: 8, "default": 16})
    assert [mapped.width(i, 768) for i in range(3)] == [48, 96, 48]
    with pytest.raises(ValueError, match="layer 0"):
        fa.PfeifferConfig(reduction_factor={"1": 8}).width(0, 768)
    with pytest.raises(AttributeError):
        fa.HoulsbyConfig().bottleneck = 3
    assert fa.HoulsbyConfig(leave_out=[2, 0, 2]).leave_out == (0, 2)
    assert fa.PfeifferConfig(placements="attention_output").placements == ("attention_output",)
