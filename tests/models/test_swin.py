"""Swin, CSwin and LipsFormer: the originals' outputs and formulas, published sizes, and the certified arrangement."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lipcert.attacks.ascent import lipschitz_lower
from lipcert.bounds import audit
from lipcert.errors import InputError
from lipcert.export import export
from lipcert.models.lipsformer_certified import AttentionBlock, unit_nu
from lipcert.models.official import load_official
from lipcert.registry import create_model

PRECISIONS = [(torch.float32, 1e-5), (torch.float64, 1e-10)]


def close(a: Tensor, b: Tensor, tolerance: float) -> None:
    """Compare logits relative to the largest of them."""
    torch.testing.assert_close(a, b, rtol=0, atol=tolerance * float(b.abs().max()))


def scatter(model: nn.Module) -> None:
    """Give every parameter a value of its own, so that no two may be taken for each other."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)


@pytest.mark.parametrize(
    "name, millions",
    [("lipsformer_swin_tiny", 30.9), ("lipsformer_swin_small", 54.5), ("lipsformer_swin_base", 96.0),
     ("swin_tiny", 28.3), ("swin_small", 49.6), ("swin_base", 87.8), ("cswin_tiny", 22.3),
     ("lipsformer_cswin_tiny", 23.8)],
)  # fmt: skip
def test_sizes_are_the_published_ones(name: str, millions: float) -> None:
    with torch.device("meta"):
        model = create_model(name, num_classes=1000, img_size=224)
        assert model(torch.empty(1, 3, 224, 224)).shape == (1, 1000)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.05)


@pytest.mark.parametrize("dtype, tolerance", PRECISIONS)
@pytest.mark.parametrize("size", [64, 36])  # windows that divide the maps, and padding everywhere
@torch.no_grad()
def test_torchvision_weights_give_torchvision_outputs(dtype, tolerance, size, tmp_path: Path) -> None:
    torchvision = pytest.importorskip("torchvision")
    torch.manual_seed(0)
    sizes = dict(embed_dim=24, depths=[2, 2, 2], num_heads=[2, 4, 8])
    theirs = torchvision.models.SwinTransformer(
        patch_size=[4, 4], window_size=[4, 4], num_classes=5, **sizes
    ).eval().to(dtype)  # fmt: skip
    scatter(theirs)
    torch.save(theirs.state_dict(), tmp_path / "swin.pth")
    ours = create_model("swin_tiny", num_classes=5, img_size=size, window_size=4, **sizes).eval().to(dtype)
    load_official(ours, tmp_path / "swin.pth")
    x = torch.rand(3, 3, size, size, dtype=dtype)
    close(ours(x), theirs(ours.normalize(x)), tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("ours, theirs", [("swin_tiny", "swin_t"), ("swin_small", "swin_s"), ("swin_base", "swin_b")])
@torch.no_grad()
def test_the_real_sizes_agree_with_torchvision(ours: str, theirs: str) -> None:
    torchvision = pytest.importorskip("torchvision")
    torch.manual_seed(0)
    original = getattr(torchvision.models, theirs)(weights=None).eval()
    model = load_official(create_model(ours, num_classes=1000, img_size=224).eval(), original.state_dict())
    x = torch.rand(1, 3, 224, 224)
    close(model(x), original(model.normalize(x)), 1e-5)


def released_state(dim: int, depths: list[int], heads: list[int], side: int, classes: int) -> dict[str, Tensor]:
    """Return random weights under the names and in the shapes of LipsFormer's code."""
    shapes: dict[str, tuple[int, ...]] = {"patch_embed.proj.weight": (dim, 3, 4, 4), "patch_embed.proj.bias": (dim,)}

    def linear(name: str, outputs: int, inputs: int) -> None:
        shapes.update({f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)})

    def norm(name: str, width: int) -> None:
        shapes.update({f"{name}.weight": (width,), f"{name}.bias": (width,)})

    norm("patch_embed.norm", dim)
    for i, (depth, number) in enumerate(zip(depths, heads, strict=True)):
        for j in range(depth):
            at = f"layers.{i}.blocks.{j}"
            linear(f"{at}.attn.qkv", 3 * dim, dim)
            linear(f"{at}.attn.proj", dim, dim)
            linear(f"{at}.mlp.fc1", 4 * dim, dim)
            linear(f"{at}.mlp.fc2", dim, 4 * dim)
            shapes[f"{at}.attn.relative_position_bias_table"] = ((2 * side - 1) ** 2, number)
            shapes[f"{at}.attn.relative_position_index"] = (side**2, side**2)
            for k in range(2):
                norm(f"{at}.norm{k + 1}", dim)
                shapes[f"{at}.dwconv_layers.{k}.weight"], shapes[f"{at}.dwconv_layers.{k}.bias"] = (
                    (dim, 1, 7, 7),
                    (dim,),
                )
                shapes[f"{at}.scale_layers.{k}.scale"] = shapes[f"{at}.alpha{k + 1}.scale"] = (dim,)
            shapes[f"{at}.nin.weight"], shapes[f"{at}.nin.bias"] = (dim, dim, 1, 1), (dim,)
        if i + 1 < len(depths):
            norm(f"layers.{i}.downsample.norm", 4 * dim)
            shapes[f"layers.{i}.downsample.reduction.weight"] = (2 * dim, 4 * dim)
            dim *= 2
    norm("norm", dim)
    linear("head", classes, dim)
    return {name: 0.3 * torch.randn(shape) for name, shape in shapes.items()}


def formulas(state: dict[str, Tensor], x: Tensor, depths: list[int], heads: list[int], side: int, attend) -> Tensor:
    """Compute LipsFormer-Swin from a state dict, channels first and pixel by pixel where that is shorter."""

    def norm(name: str, x: Tensor) -> Tensor:  # (n, c, h, w)
        width = x.shape[1]
        centred = (x - x.mean(1, keepdim=True)) * width / (width - 1)
        return centred * state[f"{name}.weight"].view(1, -1, 1, 1) + state[f"{name}.bias"].view(1, -1, 1, 1)

    def pointwise(name: str, x: Tensor) -> Tensor:
        weight = state[f"{name}.weight"]
        return F.conv2d(x, weight.reshape(*weight.shape[:2], 1, 1), state.get(f"{name}.bias"))

    def gelu(x: Tensor) -> Tensor:
        return x * (1 + torch.erf(x / math.sqrt(2))) / 2

    x = norm(
        "patch_embed.norm", F.conv2d(x, state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], stride=4)
    )
    for i, depth in enumerate(depths):
        for j in range(depth):
            at = f"layers.{i}.blocks.{j}"

            def depthwise(k: int, x: Tensor, at: str = at) -> Tensor:
                name = f"{at}.dwconv_layers.{k}"
                return F.conv2d(x, state[f"{name}.weight"], state[f"{name}.bias"], padding=3, groups=x.shape[1])

            def scaled(name: str, x: Tensor, at: str = at) -> Tensor:
                return state[f"{at}.{name}.scale"].view(1, -1, 1, 1) * x

            x = x + scaled("scale_layers.0", gelu(pointwise(f"{at}.nin", gelu(depthwise(0, x)))))
            x = x + scaled("scale_layers.1", gelu(depthwise(1, x)))
            out = torch.zeros_like(x)
            qkv = pointwise(f"{at}.attn.qkv", x)
            table = state[f"{at}.attn.relative_position_bias_table"]
            for top in range(0, x.shape[2], side):
                for left in range(0, x.shape[3], side):
                    block = (slice(None), slice(None), slice(top, top + side), slice(left, left + side))
                    out[block] = attend(qkv[block], table, heads[i], side)
            x = norm(f"{at}.norm1", x + scaled("alpha1", pointwise(f"{at}.attn.proj", out)))
            mlp = pointwise(f"{at}.mlp.fc2", gelu(pointwise(f"{at}.mlp.fc1", x)))
            x = norm(f"{at}.norm2", x + scaled("alpha2", mlp))
        if i + 1 < len(depths):
            x = torch.cat([x[..., 0::2, 0::2], x[..., 1::2, 0::2], x[..., 0::2, 1::2], x[..., 1::2, 1::2]], 1)
            x = pointwise(f"layers.{i}.downsample.reduction", norm(f"layers.{i}.downsample.norm", x))
    return norm("norm", x).mean((2, 3)) @ state["head.weight"].T + state["head.bias"]


def attention_formula(
    qkv: Tensor, table: Tensor, heads: int, side: int, *, tau: float, nu: float, row, value
) -> Tensor:
    """Return attention inside one window, (n, 3c, side, side) -> (n, c, side, side)."""
    n, c = qkv.shape[0], qkv.shape[1] // 3
    q, k, v = (part.reshape(n, heads, c // heads, side * side) for part in qkv.chunk(3, 1))
    q, k, v = row(q), row(k), value(v)
    scores = tau * torch.einsum("nhdi,nhdj->nhij", q, k)
    for i in range(side * side):
        for j in range(side * side):
            down, right = i // side - j // side, i % side - j % side
            scores[:, :, i, j] += table[(down + side - 1) * (2 * side - 1) + right + side - 1]
    return nu * torch.einsum("nhij,nhdj->nhdi", scores.softmax(-1), v).reshape(n, c, side, side)


@pytest.mark.parametrize("dtype, tolerance", PRECISIONS)
@pytest.mark.parametrize("released", [True, False])
@torch.no_grad()
def test_lipsformer_is_its_formulas_on_the_names_of_its_code(dtype, tolerance, released: bool) -> None:
    """One block a stage: the published form shifts the second block's windows, which the formula here does not."""
    torch.manual_seed(0)
    depths, heads = ([2, 1] if released else [1, 1]), [2, 4]
    state = {name: tensor.to(dtype) for name, tensor in released_state(8, depths, heads, 4, 5).items()}
    sizes = dict(embed_dim=8, depths=depths, num_heads=heads, window_size=4)
    if released:
        options = dict(released=True)
        forms = dict(tau=10.0, nu=1.0, row=lambda x: x / x.norm(dim=2, keepdim=True), value=lambda x: x)
    else:
        options = dict(tau=3.0, nu=0.7, eps=0.2)
        row = lambda x: x / torch.sqrt((x * x).sum(2, keepdim=True) + 0.2)  # noqa: E731
        forms = dict(tau=3.0, nu=0.7, row=row, value=row)
    model = create_model("lipsformer_swin_tiny", num_classes=5, img_size=32, **sizes, **options).eval().to(dtype)
    load_official(model, {"model": state}["model"])
    x = torch.rand(2, 3, 32, 32, dtype=dtype)
    expected = formulas(state, model.normalize(x), depths, heads, 4, lambda *a: attention_formula(*a, **forms))
    close(model(x), expected, tolerance)


def test_weights_of_another_model_are_refused() -> None:
    state = released_state(8, [1], [2], 4, 5)
    model = create_model("lipsformer_swin_tiny", num_classes=5, img_size=16, embed_dim=8, depths=[1], num_heads=[2])
    load_official(model, state)
    with pytest.raises(InputError, match=r"lack stages\.0\.blocks\.0\.scales\.2\.alpha;"):
        load_official(model, {name: value for name, value in state.items() if ".alpha1." not in name})
    with pytest.raises(InputError, match="also hold extra"):
        load_official(model, {**state, "extra": torch.zeros(1)})
    with pytest.raises(InputError, match=r"head\.bias of the weights is \(4,\), not \(5,\)"):
        load_official(model, {**state, "head.bias": torch.zeros(4)})


def stripes_by_hand(block, x: Tensor, tau: float | None, divide: bool) -> Tensor:
    """Compute cross-shaped attention of a block (n, h, w, c), stripe by stripe; `tau` None: dot products."""
    attention, out = block.attn.attention, torch.zeros_like(x)
    qkv = x @ attention.qkv.weight.T + attention.qkv.bias
    c, shares = x.shape[-1], len(block.attn.windows)
    width = c // shares
    for share, (a, b) in enumerate(block.attn.windows):
        channels = slice(share * width, (share + 1) * width)
        q, k, v = (part[..., channels] for part in qkv.chunk(3, -1))
        heads = attention.heads // shares
        for top in range(0, x.shape[1], a):
            for left in range(0, x.shape[2], b):
                stripe = (slice(None), slice(top, top + a), slice(left, left + b))
                rows = [part[stripe].reshape(len(x), a * b, heads, -1) for part in (q, k, v)]
                scale = (width // heads) ** -0.5
                if tau is not None:
                    rows[:2] = [row / row.norm(dim=-1, keepdim=True) for row in rows[:2]]
                    scale = tau
                weights = (scale * torch.einsum("nihd,njhd->nhij", rows[0], rows[1])).softmax(-1)
                mixed = torch.einsum("nhij,njhd->nihd", weights, rows[2]).reshape(len(x), a, b, width)
                conv = block.attn.lepe[share]
                image = F.conv2d(v[stripe].permute(0, 3, 1, 2), conv.weight, conv.bias, padding=1, groups=width)
                out[(*stripe, channels)] = mixed + image.permute(0, 2, 3, 1)
        if divide:
            out[..., channels] /= math.sqrt(heads)
    return out @ attention.proj.weight.T + attention.proj.bias


@pytest.mark.parametrize("dtype, tolerance", PRECISIONS)
@pytest.mark.parametrize("name", ["cswin_tiny", "lipsformer_cswin_tiny"])
@torch.no_grad()
def test_cross_shaped_attention_is_its_formula(name: str, dtype, tolerance) -> None:
    torch.manual_seed(0)
    options = dict(released=True) if "lips" in name else {}
    sizes = dict(embed_dim=8, depths=[1, 1], num_heads=[4, 4], splits=[2, 2], mlp_ratio=2)
    model = create_model(name, num_classes=3, img_size=32, **sizes, **options).eval().to(dtype)
    scatter(model)
    for stage, width, side in ((0, 8, 8), (1, 16, 4)):  # crossing stripes, then the whole map
        block = model.stages[stage].blocks[0]
        assert block.attn.windows == (((8, 2), (2, 8)) if stage == 0 else ((4, 4),))
        x = torch.randn(2, side, side, width, dtype=dtype)
        attended = stripes_by_hand(block, x, 12.0 if options else None, bool(options))
        close(block.attn(x), attended, tolerance)
        if not options:
            y = x + stripes_by_hand(block, block.norm1(x), None, False)
            close(block(x), y + block.mlp(block.norm2(y)), tolerance)


@pytest.mark.parametrize("shape", [(8, 8), (6, 4)])
def test_unit_nu_gives_the_attention_the_constant_one(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    window = shape[1] // 2
    block = AttentionBlock(
        (8, *shape), heads=2, window=window, shift=False, tau=1.0, eps=0.5, residual="convex", start=0.3
    )
    nn.init.zeros_(block.attention.table)
    assert audit(export(block.mix), (*shape, 8), (-math.inf, math.inf)).upper.value == pytest.approx(1.0, rel=5e-3)
    assert block.attention.nu == unit_nu(window**2, 1.0, 0.5)


@pytest.mark.parametrize(
    "options",
    [dict(depths=[2]), dict(depths=[2], attention=[True], residual="weighted", eps=0.3, orthogonal=False, start=0.2),
     dict(depths=[1, 2], attention=[False, True], residual="convex"),
     dict(depths=[1, 2], attention=[0, 1], channel_mix=[1, 0]),
     dict(depths=[1, 1], attention=[1, 1], num_heads=[2, 3], tau=3.0, window_size=2, start=0.2, residual="convex"),
     dict(depths=[2], attention=[False])],
)  # fmt: skip
def test_estimate_proof_and_attack_agree(options: dict) -> None:
    torch.manual_seed(0)
    model = create_model(
        "lipsformer_swin_tiny_1lip", num_classes=3, img_size=8, in_chans=1,
        **{**dict(embed_dim=12, neck=16, patch_size=1, num_heads=2), **options},
    )  # fmt: skip
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    estimate = model.lipschitz_estimate(300).item()
    plain = export(model)
    proof = audit(plain, (1, 8, 8))
    proved = proof.head.penultimate.require_upper()
    assert 0.8 * proved <= estimate <= 1.25 * proved
    assert lipschitz_lower(plain, (1, 8, 8), steps=10).value <= proof.upper.require_upper()


def test_a_convex_branch_of_constant_one_costs_nothing_and_a_weighted_one_its_weight() -> None:
    torch.manual_seed(0)
    for residual, constant in (("convex", 1.0), ("weighted", 1.3)):
        block = AttentionBlock((8, 4, 4), heads=2, window=2, shift=True, tau=1.0, eps=1.0, residual=residual, start=0.3)
        nn.init.zeros_(block.attention.table)
        proved = audit(export(block), (8, 4, 4)).upper.require_upper()
        assert proved == pytest.approx(constant, rel=5e-3)


def test_whatever_training_does_a_convex_branch_stays_bounded_by_its_biases() -> None:
    """Projections of norm at most 1: after any step the constant is that of ν, times what the position biases add."""
    torch.manual_seed(0)
    block = AttentionBlock((8, 4, 4), heads=2, window=2, shift=True, tau=1.0, eps=1.0, residual="convex", start=0.9)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter += 30 * torch.randn_like(parameter)
        block.attention.table.clamp_(-0.5, 0.5)
    worst = math.exp(-3.0)  # spread 2τ + 1
    q = 1 / (1 + 3 * worst)
    limit = unit_nu(4, 1.0, 1.0) * (1 + 2 * math.sqrt(4 * q))
    assert audit(export(block), (8, 4, 4)).upper.require_upper() <= max(1.0, limit) * 1.01


@pytest.mark.parametrize(
    "options, expected",
    [(dict(depths=[3]), "BBBAC"), (dict(depths=[1, 2]), "BMBBAC"), (dict(depths=[2], attention=[True]), "BACBAC"),
     (dict(depths=[2, 1], attention=[1, 0]), "BBACMB"), (dict(depths=[2], attention=[0]), "BB"),
     (dict(depths=[2], attention=[0], channel_mix=[True]), "BCBC"),
     (dict(depths=[2], attention=[1], channel_mix=[0]), "BBA")],
)  # fmt: skip
def test_the_last_blocks_attend(options: dict, expected: str) -> None:
    model = create_model("lipsformer_swin_tiny_1lip", img_size=8, embed_dim=12, num_heads=2, patch_size=1, **options)
    letters = {"LinearShiftBlock": "B", "AttentionBlock": "A", "ChannelMix": "C", "Affine": "M"}
    assert "".join(letters.get(type(part).__name__, "") for part in model.parts) == f"M{expected}M"


@pytest.mark.parametrize("eps", [1e-6, 1.0])
def test_our_bound_is_far_below_the_published_theorem(eps: float) -> None:
    torch.manual_seed(0)
    model = create_model(
        "lipsformer_swin_tiny", num_classes=3, img_size=32, embed_dim=8, depths=[1, 1], num_heads=[2, 2], window_size=4,
        eps=eps,
    )  # fmt: skip
    claim = model.published_bound()
    proved = audit(export(model), (3, 32, 32)).head.penultimate.require_upper()
    assert proved < claim["refined"] < claim["value"]
    assert claim["value"] > 20 * proved  # two attentions among 16 tokens; more blocks and tokens, and the factor grows
    raw = create_model(
        "lipsformer_swin_tiny", img_size=32, embed_dim=8, depths=[1], num_heads=[2], released=True
    ).published_bound()
    assert raw["value"] == math.inf
    assert create_model("swin_tiny", img_size=32, embed_dim=8, depths=[1], num_heads=[2]).published_bound() is None


@pytest.mark.parametrize(
    "name, options",
    [("swin_tiny", dict(num_heads=[3, 5, 12, 24])), ("swin_tiny", dict(depths=[2])), ("cswin_tiny", dict(patch_size=3)),
     ("cswin_tiny", dict(splits=[3, 2, 2, 2], img_size=64)), ("cswin_tiny", dict(splits=[1])),
     ("lipsformer_swin_tiny_1lip", dict(residual="none")), ("lipsformer_swin_tiny_1lip", dict(window_size=3)),
     ("lipsformer_swin_tiny_1lip", dict(attention=[True, True])), ("lipsformer_swin_tiny_1lip", dict(num_heads=3)),
     ("lipsformer_swin_tiny_1lip", dict(start=1.0)), ("lipsformer_swin_tiny_1lip", dict(attention=[5])),
     ("lipsformer_swin_tiny_1lip", dict(channel_mix=[-1])), ("lipsformer_swin_tiny_1lip", dict(num_heads=[4, 4]))],
)  # fmt: skip
def test_wrong_arguments_are_refused(name: str, options: dict) -> None:
    with pytest.raises(InputError):
        create_model(name, **{"img_size": 32, **options})


@pytest.mark.parametrize("name", ["swin_tiny", "lipsformer_swin_tiny", "cswin_tiny", "lipsformer_cswin_tiny"])
def test_default_sizes_run_on_small_images(name: str) -> None:
    with torch.device("meta"):
        assert create_model(name, img_size=32)(torch.empty(1, 3, 32, 32)).shape == (1, 10)
