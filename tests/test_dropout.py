"""The dropout stream: Philox against its published answers, the mask's statistics, the same mask everywhere."""

from __future__ import annotations

import pytest
import torch

import fastadapt as fa
from fastadapt.ops.dropout import dropout, keep_mask, philox_words, resolve_seed, threshold
from tests import ops_cases as cases

RUNNERS = cases.runners()


def _signed(word: int) -> int:
    return word - 2**64 if word >= 2**63 else word


# kat_vectors of Random123 (Salmon et al., SC 2011), philox4x32 with 10 rounds: counter, key, answer; low word first.
@pytest.mark.parametrize(
    ("counter", "key", "answer"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
    ids=["zeros", "ones", "pi"],
)
def test_philox_gives_its_published_answers(counter, key, answer):
    low = torch.tensor([_signed(counter[0] | counter[1] << 32)])
    seed = torch.tensor(_signed(key[0] | key[1] << 32))
    words = philox_words(low, seed, upper=counter[2] | counter[3] << 32)
    assert tuple(int(w) for w in words) == answer


def test_an_element_reads_the_word_that_the_stream_assigns_to_it():
    rows, cols, p, seed = 5, 100, 0.37, torch.tensor(1234567890123456789)
    mask = keep_mask(rows, cols, p, seed)
    padded = 128
    for r, c in [(0, 0), (0, 15), (0, 16), (0, 63), (0, 64), (2, 33), (4, 99)]:
        e = r * padded + c
        words = philox_words(torch.tensor([(e >> 6) * 16 + (e & 15)]), seed)
        assert bool(mask[r, c]) == (int(words[(e >> 4) & 3]) >= threshold(p)), (r, c)


@pytest.mark.parametrize("p", [0.05, 0.1, 0.5])
def test_the_mask_keeps_its_share(p):
    """Six standard deviations of a binomial, over the whole, every row and every column."""
    mask = keep_mask(1024, 768, p, torch.tensor(99)).double()
    for part, n in ((mask.mean(), mask.numel()), (mask.mean(0), 1024), (mask.mean(1), 768)):
        assert ((part - (1 - p)).abs() <= 6 * (p * (1 - p) / n) ** 0.5).all()


def test_two_seeds_give_unrelated_masks():
    a, b = (keep_mask(256, 768, 0.5, torch.tensor(s)) for s in (1, 2))
    share = (a == b).double().mean().item()
    assert abs(share - 0.5) < 6 * 0.5 / a.numel() ** 0.5


def test_rows_keep_their_mask_when_rows_are_added():
    seed = torch.tensor(3)
    assert torch.equal(keep_mask(64, 100, 0.1, seed)[:17], keep_mask(17, 100, 0.1, seed))


def test_p_of_zero_and_one():
    x = torch.randn(4, 5)
    assert dropout(x, 0.0, torch.tensor(1)) is x
    assert (dropout(x, 1.0, torch.tensor(1)) == 0).all()
    assert resolve_seed(7, 0.0, x.device) is None


def test_a_seed_is_checked():
    device = torch.device("cpu")
    with pytest.raises(TypeError, match="seed: got float"):
        resolve_seed(1.5, 0.1, device)
    with pytest.raises(TypeError, match="seed: got bool"):
        resolve_seed(True, 0.1, device)
    with pytest.raises(ValueError, match=r"seed: got a tensor of shape \(2,\)"):
        resolve_seed(torch.zeros(2, dtype=torch.int64), 0.1, device)
    with pytest.raises(ValueError, match=r"dropout_p: got 1\.5"):
        fa.ops.add_norm(torch.ones(2, 4), None, torch.ones(4), torch.ones(4), dropout_p=1.5)


def test_no_seed_draws_from_pytorchs_generator():
    x, one, zero = torch.randn(8, 64), torch.ones(64), torch.zeros(64)

    def run():
        return fa.ops.add_norm(x, None, one, zero, dropout_p=0.5)

    torch.manual_seed(1)
    first, second = run(), run()
    torch.manual_seed(1)
    assert torch.equal(first, run()) and not torch.equal(first, second)


# -- the same mask in every backend ------------------------------------------------------------------------------


@pytest.mark.parametrize("runner", RUNNERS, ids=str)
@pytest.mark.parametrize("p", [1e-3, 0.1, 0.5, 0.999, 1.0])
@pytest.mark.parametrize("seed", [0, 2**63 - 1, -12345678901234567])
@pytest.mark.parametrize(("rows", "cols"), [(3, 32), (17, 100), (2, 768)])
@pytest.mark.parametrize("op", ["bottleneck", "add_norm", "linear"])
def test_every_backend_draws_the_same_mask(runner, op, rows, cols, seed, p):
    device = runner.device
    facts = {"bottleneck": {"hidden": cols, "bottleneck": 16}, "add_norm": {"hidden": cols}, "linear": {"features": 32}}
    reason = runner.refusal(f"{op}_forward", torch.float32, **facts[op])
    if reason is not None:
        pytest.skip(reason)
    one, zero = torch.ones(cols, device=device), torch.zeros
    with runner.running():
        if op == "bottleneck":
            y = fa.ops.bottleneck(
                zero(rows, cols, device=device), zero(16, cols, device=device), None, zero(cols, 16, device=device),
                one, skip=False, dropout_p=p, seed=seed,
            )  # fmt: skip
        elif op == "add_norm":
            x = torch.ones(rows, cols, device=device)
            y = fa.ops.add_norm(x, None, one, one, dropout_p=p, seed=seed, eps=1e-5, return_sum=True)[1]
        else:
            x = zero(rows, 32, device=device)
            y = fa.ops.linear(x, zero(cols, 32, device=device), one, dropout_p=p, seed=seed)
    want = keep_mask(rows, cols, p, torch.tensor(seed))
    assert torch.equal(y.cpu() != 0, want)
    assert torch.allclose(y.cpu()[want], torch.tensor(1.0 / (1.0 - p) if p < 1 else 0.0), rtol=1e-6)


@pytest.mark.parametrize("runner", RUNNERS, ids=str)
@pytest.mark.parametrize("op", ["bottleneck", "add_norm", "linear"])
def test_backward_draws_the_mask_of_forward(runner, op):
    """Of a linear map y = mask · x / (1 - p) the gradient is the mask again, bit for bit."""
    rows, cols, p, device = 19, 100, 0.3, runner.device
    facts = {
        "bottleneck": {"hidden": cols, "bottleneck": 16},
        "add_norm": {"hidden": cols},
        "linear": {"features": cols},
    }
    reason = runner.refusal(f"{op}_backward", torch.float32, **facts[op])
    if reason is not None:
        pytest.skip(reason)
    want = keep_mask(rows, cols, p, torch.tensor(8)).float() / (1 - p)
    x = torch.ones(rows, cols, device=device, requires_grad=True)
    one = torch.ones(cols, device=device, requires_grad=True)
    eye, zero = torch.eye(cols, device=device), torch.zeros
    with runner.running():
        if op == "bottleneck":  # b_up's gradient is the mask's sum over rows
            y = fa.ops.bottleneck(
                x.detach(), zero(16, cols, device=device), None, zero(cols, 16, device=device), one, skip=False,
                dropout_p=p, seed=8,
            )  # fmt: skip
            (got,), want = torch.autograd.grad(y.sum(), one), want.sum(0)
        elif op == "add_norm":
            s = fa.ops.add_norm(x, None, one, one, dropout_p=p, seed=8, eps=1e-5, return_sum=True)[1]
            (got,) = torch.autograd.grad(s.sum(), x)
        else:
            (got,) = torch.autograd.grad(fa.ops.linear(x, eye, dropout_p=p, seed=8).sum(), x)
    torch.testing.assert_close(got.cpu(), want, rtol=1e-6, atol=0)


@pytest.mark.parametrize("runner", RUNNERS, ids=str)
@pytest.mark.parametrize("p", [0.1, 1.0])
@pytest.mark.parametrize("before", [0, 40])
def test_attention_draws_the_same_mask(runner, p, before):
    """Equal scores and V = identity: the output is the mask of the probabilities, the prefix's columns first."""
    heads, length, keys = 2, 32, before + 32
    reason = runner.refusal("attention_forward", torch.float32, head_dim=keys, length=keys)
    if reason is not None:
        pytest.skip(reason)
    values = torch.eye(keys, device=runner.device)
    qkv = torch.zeros(3, length, 3, heads, keys, device=runner.device)
    qkv[:, :, 2] = values[before:, None, :]
    prefix = torch.stack([torch.zeros_like(values), values])[:, :before].repeat(1, 1, heads)
    with runner.running():
        y = fa.ops.attention(qkv.flatten(2), heads, prefix=prefix if before else None, dropout_p=p, seed=21)
    want = keep_mask(3 * heads * length, keys, p, torch.tensor(21)).view(3, heads, length, keys)
    assert torch.equal(y.cpu().view(3, length, heads, keys).transpose(1, 2) != 0, want)
