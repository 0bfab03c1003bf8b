"""Every rule on a small model: never below the Jacobian or a secant, and as tight as its table row says.

The number of each row is the slack that is allowed above what the attack attains: 1e-8 where the bound is the norm itself,
a few per cent where zero padding is bounded as part of a torus, None where only soundness is asked for.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from dense import Apply, assert_sound
from torch import nn

from lipcert.bounds import audit

EXACT = 1e-8
IMAGE = (4, 5, 5)


def conv(**options):
    return nn.Conv2d(4, 4, 3, **{"padding": 1, **options})


def batch_norm():
    norm = nn.BatchNorm2d(4)
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.3, 2.0)
    nn.init.normal_(norm.weight)
    return norm


def weight(*shape):
    return nn.Parameter(torch.randn(*shape))


def peak():
    w = torch.zeros(5, 5)
    w[2, 1] = 100.0
    return nn.Parameter(w)


def halves(x):
    return torch.maximum(*x.chunk(2, 1)), torch.minimum(*x.chunk(2, 1))


LINEAR = {
    "conv2d": (lambda m, x: m.a(x), lambda: dict(a=conv()), IMAGE, EXACT),
    "strided": (lambda m, x: m.a(x), lambda: dict(a=nn.Conv2d(4, 6, 3, stride=2, padding=1)), IMAGE, EXACT),
    "circular": (lambda m, x: m.a(x), lambda: dict(a=conv(padding_mode="circular")), IMAGE, EXACT),
    "same padding, even kernel": (lambda m, x: m.a(x), lambda: dict(a=nn.Conv2d(4, 4, 4, padding="same")), IMAGE, EXACT),
    "dilated, grouped": (
        lambda m, x: m.a(x), lambda: dict(a=nn.Conv2d(4, 8, 3, padding=2, dilation=2, groups=2)), IMAGE, EXACT,
    ),
    "reflected": (lambda m, x: m.a(x), lambda: dict(a=conv(padding_mode="reflect")), IMAGE, None),
    "conv1d": (lambda m, x: m.a(x), lambda: dict(a=nn.Conv1d(3, 5, 3, padding=1)), (3, 9), EXACT),
    "conv3d": (lambda m, x: m.a(x), lambda: dict(a=nn.Conv3d(2, 3, 2)), (2, 3, 4, 4), EXACT),
    "transposed": (
        lambda m, x: m.a(x), lambda: dict(a=nn.ConvTranspose2d(4, 3, 3, stride=2, padding=1, output_padding=1)), (4, 3, 3), EXACT,
    ),
    "depthwise and pointwise": (
        lambda m, x: m.b(m.a(x)), lambda: dict(a=nn.Conv2d(4, 4, 3, padding=1, groups=4), b=nn.Conv2d(4, 6, 1)), IMAGE, EXACT,
    ),
    "two circular": (
        lambda m, x: m.b(m.a(x)), lambda: dict(a=conv(padding_mode="circular"), b=conv(padding_mode="circular")), IMAGE, EXACT,
    ),
    "two valid": (lambda m, x: m.b(m.a(x)), lambda: dict(a=conv(padding=0), b=conv(padding=0)), (4, 6, 6), EXACT),
    "two zero-padded": (lambda m, x: m.b(m.a(x)), lambda: dict(a=conv(), b=conv()), IMAGE, None),
    "conv and BatchNorm": (lambda m, x: m.b(m.a(x)), lambda: dict(a=conv(), b=batch_norm()), IMAGE, EXACT),
    "patches": (lambda m, x: m.b(m.a(x)), lambda: dict(a=nn.Conv2d(4, 5, 2, stride=2), b=nn.Conv2d(5, 4, 3, padding=1)),
                (4, 6, 6), EXACT),
    "linear residual": (lambda m, x: x + 0.3 * m.a(x), lambda: dict(a=conv()), IMAGE, EXACT),
    "circular residual": (lambda m, x: x + 0.3 * m.a(x), lambda: dict(a=conv(padding_mode="circular")), IMAGE, EXACT),
    "CenterNorm, conv": (lambda m, x: m.a((x - x.mean(1, keepdim=True)) * m.w), lambda: dict(a=conv(), w=weight(4, 1, 1)), IMAGE,
                         EXACT),
    "centred in space": (lambda m, x: x - x.mean((2, 3), keepdim=True), dict, IMAGE, EXACT),
    "pooled, linear": (
        lambda m, x: m.b(F.adaptive_avg_pool2d(m.a(x), 1).flatten(1)), lambda: dict(a=nn.Conv2d(4, 5, 1), b=nn.Linear(5, 3)),
        IMAGE, EXACT,
    ),
    "flattened, linear": (lambda m, x: m.b(m.a(x).flatten(1)), lambda: dict(a=conv(), b=nn.Linear(100, 3)), IMAGE, EXACT),
    "flattened channels last": (
        lambda m, x: m.b(m.a(x).permute(0, 2, 3, 1).flatten(1)), lambda: dict(a=nn.Conv2d(4, 5, 1), b=nn.Linear(125, 3)), IMAGE,
        EXACT,
    ),
    "channels last and first": (
        lambda m, x: m.b(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2) + m.a(x), lambda: dict(a=conv(), b=nn.Linear(4, 4)), IMAGE,
        EXACT,
    ),
    "tokens": (lambda m, x: x + m.a(x), lambda: dict(a=nn.Linear(6, 6)), (5, 6), EXACT),
    "token mixing": (lambda m, x: x + m.a(x.transpose(1, 2)).transpose(1, 2), lambda: dict(a=nn.Linear(5, 5)), (5, 6), EXACT),
    "addmm": (lambda m, x: torch.addmm(m.b, x, m.w), lambda: dict(b=weight(3), w=weight(5, 3)), (5,), EXACT),
    "matrix on the left": (lambda m, x: m.w @ x, lambda: dict(w=weight(3, 5)), (5, 4), EXACT),
    "stack of matrices": (lambda m, x: x @ m.w, lambda: dict(w=weight(5, 4, 3)), (5, 6, 4), EXACT),
    "cumulative sum": (lambda m, x: m.a(x.cumsum(1)), lambda: dict(a=nn.Conv2d(4, 4, 1)), IMAGE, EXACT),
    "swapped": (lambda m, x: m.a(x.swapdims(1, 2)), lambda: dict(a=nn.Linear(5, 3)), (5, 6), EXACT),
    "average pool": (lambda m, x: F.avg_pool2d(m.a(x), 2), lambda: dict(a=nn.Conv2d(4, 4, 1)), (4, 6, 6), EXACT),
    "overlapping average": (lambda m, x: F.avg_pool2d(x, 3, 2, 1), dict, IMAGE, EXACT),
    "average without the pad": (lambda m, x: F.avg_pool2d(x, 3, 2, 1, count_include_pad=False), dict, IMAGE, 1e-7),
    "average, ceil mode": (lambda m, x: F.avg_pool2d(x, 2, 2, ceil_mode=True), dict, IMAGE, 1e-7),
    "adaptive average": (lambda m, x: F.adaptive_avg_pool2d(x, (4, 3)), dict, IMAGE, 1e-7),
    "sums and means": (lambda m, x: torch.cat([x.sum(1).flatten(1), 2 * x.mean((1, 2))], 1), dict, IMAGE, None),
    "arithmetic": (lambda m, x: 3 - (2 * x / 4 - 1) + (-x) * 0.25, dict, IMAGE, EXACT),
    "positions scaled": (lambda m, x: m.a(x) * m.w, lambda: dict(a=nn.Conv2d(4, 4, 1), w=weight(5, 5)), IMAGE, None),
}  # fmt: skip

MOVING = {
    "roll": (lambda m, x: x + 0.5 * torch.roll(x, (1, 2), (2, 3)), dict, IMAGE, EXACT),
    "roll of channels": (lambda m, x: x - 0.5 * torch.roll(x, 1, 1), dict, IMAGE, EXACT),
    "flip": (lambda m, x: torch.flip(x, (2,)) * 2, dict, IMAGE, EXACT),
    "flip of channels": (lambda m, x: x - 0.5 * torch.flip(x, (1,)), dict, IMAGE, EXACT),
    "zero-fill shift": (lambda m, x: x + F.pad(x[:, :, :, 1:], (0, 1)), dict, IMAGE, EXACT),
    "crop": (lambda m, x: m.a(x)[:, :, 1:-1, 2:], lambda: dict(a=nn.Conv2d(4, 4, 1)), IMAGE, EXACT),
    "every second": (lambda m, x: m.a(x[:, :, ::2, ::3]), lambda: dict(a=nn.Conv2d(4, 4, 1)), IMAGE, EXACT),
    "select": (lambda m, x: x[:, 1] + x[:, 0], dict, IMAGE, EXACT),
    "index": (lambda m, x: x[:, [2, 0, 0]], dict, IMAGE, EXACT),
    "expand": (lambda m, x: x[:, :1].expand(-1, 4, -1, -1), dict, IMAGE, EXACT),
    "one channel added to all": (lambda m, x: x + x[:, :1], dict, IMAGE, EXACT),
    "one row added to all": (lambda m, x: x + x[:, :, :1], dict, IMAGE, None),
    "repeat": (lambda m, x: x.repeat(1, 2, 1, 1), dict, IMAGE, EXACT),
    "pad circular": (lambda m, x: F.pad(x, (2, 1, 1, 0), mode="circular"), dict, IMAGE, EXACT),
    "pad reflect": (lambda m, x: F.pad(x, (2, 1, 1, 0), mode="reflect"), dict, IMAGE, EXACT),
    "pad replicate": (lambda m, x: F.pad(x, (2, 1, 1, 0), mode="replicate"), dict, IMAGE, EXACT),
    "pad channels": (lambda m, x: F.pad(x, (0, 0, 0, 0, 1, 2)) + F.pad(m.a(x), (0, 0, 0, 0, 2, 1)),
                     lambda: dict(a=nn.Conv2d(4, 4, 1)), IMAGE, EXACT),
    "pixel unshuffle": (lambda m, x: m.a(F.pixel_unshuffle(x, 2)), lambda: dict(a=nn.Conv2d(16, 3, 1)), (4, 4, 4), EXACT),
    "pixel shuffle": (lambda m, x: m.a(F.pixel_shuffle(x, 2)), lambda: dict(a=nn.Conv2d(1, 3, 3, padding=1)), (4, 3, 3), EXACT),
    "squeezed": (lambda m, x: m.a(x.mean(1, keepdim=True).squeeze(1).unsqueeze(1)), lambda: dict(a=nn.Conv2d(1, 3, 1)), IMAGE,
                 EXACT),
    "different branches": (lambda m, x: torch.cat([m.a(x), m.b(x)], 1), lambda: dict(a=conv(), b=conv(dilation=1)), IMAGE, EXACT),
    "stacked with a constant": (lambda m, x: torch.cat([m.w.expand(x.shape[0], -1, -1), x], 1), lambda: dict(w=weight(1, 1, 4)),
                                (3, 4), EXACT),
    "zeros around": (lambda m, x: torch.cat([torch.zeros_like(x[:, :1]), 2 * x], 1), dict, IMAGE, EXACT),
}  # fmt: skip

NONLINEAR = {
    "relu": (lambda m, x: F.relu(m.a(x)), lambda: dict(a=conv()), IMAGE, None),
    "in place": (lambda m, x: F.relu_(m.a(x)) + x, lambda: dict(a=conv()), IMAGE, None),
    "residual": (lambda m, x: x + m.b(F.relu(m.a(x))), lambda: dict(a=conv(), b=conv()), IMAGE, None),
    "pieces": (lambda m, x: torch.cat([F.relu(x[:, :1]), 2 * F.relu(x[:, 1:3]), x[:, 3:].tanh()], 1), dict, IMAGE, 1e-6),
    "pieces of pieces": (lambda m, x: torch.cat([F.relu(x[:, :2]).abs(), torch.cat([F.relu(x[:, 2:3]), x[:, 3:].abs()], 1)],
                                                1), dict, IMAGE, EXACT),
    "group sort": (lambda m, x: x.reshape(-1, 2, 2, 5, 5).sort(2).values.reshape(-1, 4, 5, 5), dict, IMAGE, EXACT),
    "maxmin": (lambda m, x: torch.cat(halves(m.a(x)), 1), lambda: dict(a=conv()), IMAGE, EXACT),
    "max alone": (lambda m, x: halves(x)[0], dict, IMAGE, EXACT),
    "max pool": (lambda m, x: F.max_pool2d(x, 3, 2, 1), dict, IMAGE, EXACT),
    "max pool, disjoint": (lambda m, x: F.max_pool2d(x, 2), dict, (4, 4, 4), EXACT),
    "adaptive max pool, disjoint": (lambda m, x: F.adaptive_max_pool2d(x, 2), dict, (4, 4, 4), EXACT),
    "adaptive max pool": (lambda m, x: F.adaptive_max_pool2d(x + m.w, (2, 4)), lambda: dict(w=peak()), IMAGE, EXACT),
    "adaptive max pool 1d": (lambda m, x: F.adaptive_max_pool1d(x, 3), dict, (4, 7), None),
    "order statistics": (lambda m, x: x.kthvalue(2, 1).values + x.median(1).values, dict, IMAGE, None),
    "l2 pool": (lambda m, x: torch.linalg.vector_norm(x.reshape(-1, 4, 2, 2, 2, 2), dim=(3, 5)), dict, (4, 4, 4), EXACT),
    "group norm": (lambda m, x: m.a(x), lambda: dict(a=nn.GroupNorm(2, 4, eps=0.1)), IMAGE, None),
    "layer norm": (lambda m, x: m.a(x), lambda: dict(a=nn.LayerNorm(5, eps=0.1)), IMAGE, None),
    "clamp": (lambda m, x: x.clamp(-1, 1) + x.clamp_min(0) + torch.clamp(x, max=2.0), dict, IMAGE, EXACT),
    "leaky, elu": (lambda m, x: F.leaky_relu(x, 1.5) + F.elu(x, 2.0) + m.a(x), lambda: dict(a=nn.PReLU(4)), IMAGE, None),
}  # fmt: skip


@pytest.mark.parametrize("name", [*LINEAR, *MOVING, *NONLINEAR])
def test_rule(name):
    forward, modules, shape, slack = {**LINEAR, **MOVING, **NONLINEAR}[name]
    assert_sound(Apply(forward, **modules()), shape, slack, points=3)


@pytest.mark.nightly
@pytest.mark.parametrize("name", [*LINEAR, *MOVING, *NONLINEAR])
def test_rule_with_a_hundred_random_weights(name):
    """No case is above its bound. How close it comes is the business of the test above, whose weights are fixed."""
    forward, modules, shape, _ = {**LINEAR, **MOVING, **NONLINEAR}[name]
    for seed in range(100):
        torch.manual_seed(seed)
        parts = modules()
        for part in parts.values():
            for parameter in part.parameters() if isinstance(part, nn.Module) else [part]:
                parameter.data.mul_((0.3, 1.0, 3.0)[seed % 3])
        assert_sound(Apply(forward, **parts), shape, points=2)


SLOPES = {
    F.relu: 1.0, torch.tanh: 1.0, torch.sigmoid: 0.25, F.softplus: 1.0, F.silu: 1.0998393201288669, F.hardtanh: 1.0,
    F.gelu: 1.1289041451851548, F.mish: 1.0884981612517279, F.hardswish: 1.5, F.selu: 1.7580993408473769,
    torch.erf: 1.1283791670955126, F.hardsigmoid: 1 / 6, F.relu6: 1.0, torch.abs: 1.0, torch.sin: 1.0, F.softshrink: 1.0, partial(F.threshold, threshold=0.5, value=0.5): 1.0,
}  # fmt: skip


def test_slopes_are_the_largest_and_attained():
    """The constants of the table are the suprema of |f'| over a fine grid, from above and hardly more."""
    rows = audit(nn.Sequential(*(Apply(lambda m, x, f=f: f(x)) for f in SLOPES)), (2,)).layers
    x = torch.linspace(-20, 20, 800_001, dtype=torch.float64, requires_grad=True)
    for (function, slope), row in zip(SLOPES.items(), rows, strict=True):
        steepest = float(torch.autograd.grad(function(x).sum(), x)[0].abs().max())
        steepest /= 1 + 3e-8 * (function in (F.hardsigmoid, F.hardswish))  # whose sixth is that of float32
        assert steepest <= row.upper.value <= steepest * (1 + 1e-6) and row.upper.value >= slope, function


@pytest.mark.parametrize("forward", [lambda m, x: F.celu(x, -1.0), lambda m, x: torch.ops.aten.elu(x, 1.0, 1.0, -2.0)])
def test_exponentials_that_grow_have_no_bound(forward):
    assert audit(Apply(forward), (2,)).upper.value == float("inf")
