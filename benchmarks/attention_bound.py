"""The bound of scaled cosine similarity attention beside the published theorems, and how close attacks come to it.

    python benchmarks/attention_bound.py [--record] [--figure docs/attention-bound.svg]     about 5 minutes, one core

Projections have norm 1 and ν = 1. Three parts: the formulas over N, τ and ε; the largest quotient of two inputs that
gradient ascent finds for random orthogonal projections, over 60 configurations; dot-product attention on a ball,
against Castin, Ablin, Peyré (2024). docs/attention-bound.md says what the formulas are and what follows.
"""

from __future__ import annotations

import argparse
import math
import statistics
from pathlib import Path

import torch
from matplotlib.figure import Figure
from results import record
from torch import Tensor, nn

from lipcert.attacks.ascent import lipschitz_lower
from lipcert.bounds import audit
from lipcert.bounds.attention import Rows, coefficients, column_sums
from lipcert.report.drawing import COLOURS, settings, settle, svg
from lipcert.report.figures import plain_log


def ours(tokens: int, tau: float, eps: float) -> float:
    """ε^(-1/2) (τ + τ√c' + √c), c and c' the bounds of the column sums."""
    one = Rows(1.0, 1.0)
    return sum(coefficients(one, one, one, tau, column_sums(2.0 * tau, None, tokens, tokens))) / math.sqrt(eps)


def theorem(tokens: int, tau: float, eps: float) -> float:
    """LipsFormer, arXiv 2304.09856, theorem 1."""
    return 2.0 / math.sqrt(eps) * (tokens * (tokens - 1) * tau + (tokens - 1) * tau + tokens)


def refined(tokens: int, tau: float, eps: float) -> float:
    """The same with softmax's constant 1/2: arXiv 2510.23012, theorem 2."""
    return (tokens**2 * tau + tokens * tau + 2.0 * tokens) / math.sqrt(eps)


def castin(tokens: int, scale: float, radius: float) -> float:
    """Dot-product attention on rows in a ball, V = I and A = scale·I: arXiv 2312.14820, theorem 3.3."""
    return math.sqrt(3.0) * math.sqrt(scale**2 * radius**4 * (4.0 * tokens + 1.0) + tokens)


def on_ball(tokens: int, scale: float, radius: float) -> float:
    """The same attention by the inequality of `lipcert.bounds.attention`."""
    rows = Rows(radius, radius)
    column = column_sums(2.0 * scale * radius**2, None, tokens, tokens)
    return sum(coefficients(rows, rows, rows, scale, column))


class Cosine(nn.Module):
    """Scaled cosine similarity attention with orthogonal projections."""

    def __init__(self, dim: int, tau: float, eps: float, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.q, self.k, self.v = (nn.Linear(dim, dim, bias=False) for _ in range(3))
        for layer in (self.q, self.k, self.v):
            nn.init.orthogonal_(layer.weight)
        self.tau, self.eps = tau, eps

    def forward(self, x: Tensor) -> Tensor:  # (n, tokens, dim)
        q, k, v = (layer(x) for layer in (self.q, self.k, self.v))
        q, k, v = (y / (y.square().sum(-1, keepdim=True) + self.eps).sqrt() for y in (q, k, v))
        return (self.tau * q @ k.transpose(1, 2)).softmax(-1) @ v


def attained(tokens: int, tau: float, eps: float, seed: int, dim: int = 4) -> tuple[float, float]:
    """Return the largest quotient found and the proved bound of one configuration."""
    model = Cosine(dim, tau, eps, seed).double().eval()
    reach = 3.0 * max(1.0, math.sqrt(eps))
    proved = audit(model, (tokens, dim), (-reach, reach)).upper.require_upper()
    torch.manual_seed(seed)
    scales = math.sqrt(eps) * torch.tensor([1e-3, 0.1, 0.5, 1.0, 2.0], dtype=torch.float64)
    starts = (scales[:, None, None] * torch.randn(5, tokens, dim, dtype=torch.float64)).clamp(-reach, reach)
    found = lipschitz_lower(model, (tokens, dim), starts, 150, (-reach, reach), seed)
    return found.value, proved


def draw() -> Figure:
    with settings():
        figure = Figure(figsize=(9.6, 3.3), layout="constrained")
        axes = figure.subplots(1, 3)
        tokens = [2**k for k in range(1, 13)]
        for axis, tau in zip(axes[:2], (10.0, 0.5), strict=True):
            rows = (("LipsFormer, theorem 1", theorem), ("with softmax ≤ 1/2", refined), ("lipcert", ours))
            for (name, bound), colour in zip(rows, (COLOURS[1], COLOURS[4], COLOURS[0]), strict=True):
                axis.plot(tokens, [bound(n, tau, 1.0) for n in tokens], color=colour, label=name)
            axis.set(xscale="log", yscale="log", xlabel="tokens N", title=f"cosine attention, τ = {tau:g}, ε = 1")
            axis.xaxis.set_major_formatter("{x:g}")
        radii = [0.25 * k for k in range(1, 17)]
        for name, bound, colour in (("Castin et al.", castin, COLOURS[1]), ("lipcert", on_ball, COLOURS[0])):
            axes[2].plot(radii, [bound(64, 0.5, r) for r in radii], color=colour, label=name)
        axes[2].set(yscale="log", xlabel="radius R of the rows", title="dot-product attention, N = 64, A = I/2")
        axes[0].set_ylabel("bound of the Lipschitz constant")
        for axis in axes:
            plain_log(axis)
        for axis in axes[::2]:
            axis.legend(loc="upper left")
        return settle(figure)


def main(arguments: argparse.Namespace) -> None:
    print(f"{'N':>6} {'τ':>5} {'theorem 1':>12} {'refined':>12} {'ours':>10} {'ratio':>8}")
    for tokens in (4, 16, 49, 196, 784, 3136):
        for tau in (0.1, 1.0, 10.0):
            a, b, c = (bound(tokens, tau, 1.0) for bound in (theorem, refined, ours))
            print(f"{tokens:6} {tau:5g} {a:12.1f} {b:12.1f} {c:10.2f} {a / c:8.0f}")
    ratios = []
    for tokens in (1, 2, 4, 8, 16):
        for tau in (0.3, 1.0, 3.0, 10.0):
            for eps in (0.01, 0.1, 1.0):
                found, proved = attained(tokens, tau, eps, len(ratios))
                ratios.append(proved / found)
                both = f"attained {found:9.3f}, proved {proved:9.3f}, {proved / found:5.2f}"
                print(f"N {tokens:3} τ {tau:4g} ε {eps:5g}: {both}")
    line = (
        f"scaled cosine attention, 60 configurations (N 1 to 16, τ 0.3 to 10, ε 0.01 to 1), proved / attained: least "
        f"{min(ratios):.2f}, median {statistics.median(ratios):.2f}, largest {max(ratios):.2f}; N = 49, τ = 10, ε = 1: "
        f"theorem {theorem(49, 10.0, 1.0):.0f}, refined {refined(49, 10.0, 1.0):.0f}, ours {ours(49, 10.0, 1.0):.1f}"
    )
    print(line)
    for tokens, radius in ((8, 1.0), (8, 2.0), (64, 1.0), (64, 2.0), (1024, 2.0)):
        a, b = castin(tokens, 0.5, radius), on_ball(tokens, 0.5, radius)
        both = f"Castin et al. {a:9.2f}, ours {b:9.2f}, ratio {a / b:.2f}"
        print(f"dot product, A = I/2, N {tokens:5} R {radius:g}: {both}")
    if arguments.figure:
        arguments.figure.write_bytes(svg(draw()))
    if arguments.record:
        record("Attention", line)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--figure", type=Path, help="write the figure (SVG)")
    parser.add_argument("--record", action="store_true", help="add a row to RESULTS.md")
    main(parser.parse_args())
