"""How many models of other people the audit takes: every torchvision classifier and segmenter, and timm's families.

    python benchmarks/coverage.py [--only 'timm:*vit*'] [--record]    hours; a model takes seconds to minutes

Weights are random (seed 0), nothing is downloaded; those that a model starts at zero are drawn from N(0, 0.02²), for
what they multiply would count for nothing. For each model it prints the base-10 logarithm of its proved bound,
or why that is infinite, or what failed, and the seconds. Every model has a process and a time limit of its own; results
are appended to a file of JSON lines, and models that are in it are not run again, so that a killed run continues.

With --quick all spectral norms are bounded by row and column sums: proved as well, but looser by orders of magnitude
for a deep network (some bounds leave the range of numbers), in a tenth of the time. It shows what is missing.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import multiprocessing
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from results import record
from torch import Tensor, nn

from lipcert.bounds import Bound, BoundError, audit
from lipcert.bounds.affine import AffineMap
from lipcert.bounds.rounding import add_up
from lipcert.bounds.rules.linear import schur
from lipcert.report.shares import magnitude

TIMM = """
beit_base_patch16_224 bat_resnext26ts botnet26t_256 caformer_s18 cait_xxs24_224 coat_lite_tiny coat_tiny
coatnet_nano_rw_224 coatnext_nano_rw_224 convformer_s18 convit_tiny convmixer_768_32 convnext_atto convnextv2_atto
crossvit_9_240 cs3darknet_s cspresnet50 darknet53 davit_tiny deit3_small_patch16_224 deit_tiny_distilled_patch16_224
deit_tiny_patch16_224 densenet121 dla34 dpn68 eca_halonext26ts ecaresnet26t edgenext_xx_small efficientformer_l1
efficientformerv2_s0 efficientnet_b0 efficientnetv2_rw_t efficientvit_b0 efficientvit_m0 ese_vovnet19b_dw
eva02_tiny_patch14_224 fasternet_t0 fastvit_t8 fbnetc_100 flexivit_small focalnet_tiny_srf gcresnet33ts gcvit_xxtiny
gernet_s ghostnet_100 ghostnetv2_100 gmixer_24_224 gmlp_ti16_224 hardcorenas_a hgnetv2_b0 hiera_tiny_224
hrnet_w18_small inception_next_atto inception_resnet_v2 inception_v3 inception_v4 lambda_resnet26t lcnet_050
legacy_senet154 legacy_seresnet18 legacy_xception levit_128s levit_conv_128s mambaout_femto maxvit_nano_rw_256
maxvit_tiny_tf_224 mixer_s32_224 mixnet_s mnasnet_small mobilenetv1_100 mobilenetv2_100 mobilenetv3_small_100
mobilenetv4_conv_small mobilenetv4_hybrid_medium mobileone_s0 mobilevit_xxs mobilevitv2_050 mvitv2_tiny nasnetalarge
nest_tiny nextvit_small nf_regnet_b0 nf_resnet50 nfnet_l0 pit_ti_224 pnasnet5large poolformer_s12 poolformerv2_s12
pvt_v2_b0 rdnet_tiny regnetx_002 regnety_002 regnetz_b16 repghostnet_050 repvgg_a0 repvit_m0_9 res2net50_26w_4s
resmlp_12_224 resnest14d resnet10t resnet18 resnetaa50 resnetblur50 resnetrs50 resnetv2_50 resnetv2_50x1_bit resnext26ts
rexnet_100 samvit_base_patch16_224 selecsls42 semnasnet_050 sequencer2d_s seresnet33ts shvit_s1 skresnet18
spnasnet_100 starnet_s050 swiftformer_xs swin_s3_tiny_224 swin_tiny_patch4_window7_224 swinv2_cr_tiny_224
swinv2_tiny_window8_256 tf_efficientnet_b0 tf_mobilenetv3_small_minimal_100 tiny_vit_5m_224 tinynet_e
tnt_s_patch16_224 tresnet_m twins_pcpvt_small twins_svt_small vgg11 vgg11_bn visformer_tiny vit_relpos_small_patch16_224
vit_small_patch16_224 vit_srelpos_small_patch16_224 vit_tiny_patch16_224 vitamin_small_224 volo_d1_224 wide_resnet50_2
xception41 xcit_nano_12_p16_224
""".split()


def models() -> list[str]:
    """Return the names of all models, with the library in front: "torchvision:alexnet"."""
    import torchvision

    names = [
        name
        for module in (torchvision.models, torchvision.models.segmentation)
        for name in torchvision.models.list_models(module=module)
    ]
    return [f"torchvision:{name}" for name in names] + [f"timm:{name}" for name in TIMM]


def build(name: str) -> tuple[nn.Module, tuple[int, int, int]]:
    """Return a model with random weights in evaluation mode, and the shape of the inputs that it is meant for."""
    torch.manual_seed(0)
    model, shape = _plain(name)
    for parameter in model.parameters():
        if not bool(parameter.detach().any()):
            nn.init.normal_(parameter, std=0.02)
    return model.eval(), shape


def _plain(name: str) -> tuple[nn.Module, tuple[int, int, int]]:
    """Return a model as its library builds it, and its input shape."""
    library, _, short = name.partition(":")
    if library == "timm":
        import timm

        model = timm.create_model(short, pretrained=False)
        return model, tuple(model.pretrained_cfg["input_size"])
    import torchvision.models as zoo

    segmenters = zoo.list_models(module=zoo.segmentation)
    options: dict[str, Any] = {"weights_backbone": None} if short in segmenters else {}
    if short in ("googlenet", "inception_v3"):
        options["init_weights"] = True
    model = zoo.get_model(short, weights=None, **options)
    size = zoo.get_model_weights(short).DEFAULT.transforms()
    usual = (getattr(size, "crop_size", None) or getattr(size, "resize_size", None) or [224])[0]
    side = getattr(model, "image_size", usual)  # a ViT takes no other
    return model, (3, side, side)


def row(name: str, method: str) -> dict[str, Any]:
    """Return what the audit says about one model."""
    start = time.perf_counter()
    found: dict[str, Any] = {"name": name}
    try:
        model, shape = build(name)
        found["shape"] = list(shape)
        start = time.perf_counter()
        result = audit(model, shape, method=method)
        if result.upper.finite:
            found |= {"result": "finite", "log10": magnitude(result.upper.written)}
        else:
            reasons = Counter(f"{op}: {reason.split(' (module')[0]}" for _, op, reason in result.unbounded)
            found |= {"result": "infinite", "reasons": dict(reasons) or {"ranges overflow": 1}}
    except BoundError as error:
        found |= {"result": "failed", "error": str(error)}
    except Exception as error:  # what a table of models is for
        found |= {"result": "failed", "error": f"{type(error).__name__}: {error}"}
    return {**found, "seconds": round(time.perf_counter() - start, 1)}


def quicken() -> None:
    """Replace the bounds of spectral norms, in this process, by √(largest row sum · largest column sum)."""

    def of_segment(m: AffineMap, method: str = "auto") -> Bound:
        return Bound(add_up(m.magnitude, m.error), "upper", "row and column sums")

    def of_matrix(matrix: Tensor, method: str = "auto") -> Bound:
        stack = matrix.reshape(-1, *matrix.shape[-2:])
        return Bound(max(schur(one) for one in stack), "upper", "row and column sums")

    def of_convolution(weight: Tensor, *_: Any, **__: Any) -> Bound:
        return Bound(schur(weight), "upper", "row and column sums")

    replaced = {"segment_bound": of_segment, "spectral_norm_upper": of_matrix, "conv_norm_upper": of_convolution}
    for module in [module for name, module in sys.modules.items() if name.startswith("lipcert.bounds")]:
        for name, function in replaced.items():
            if hasattr(module, name):
                setattr(module, name, function)


def _append(path: Path, found: dict[str, Any]) -> None:
    with path.open("a") as file:
        file.write(json.dumps(found) + "\n")


def _child(name: str, method: str, path: Path) -> None:
    torch.set_num_threads(args.threads)
    if args.quick:
        quicken()
    _append(path, row(name, method))


def line(found: dict[str, Any]) -> str:
    """Return one line of the printed table."""
    if found["result"] == "finite":
        text = f"finite    1e{found['log10']:+.1f}"
    elif found["result"] == "infinite":
        text = "infinite  " + "; ".join(f"{count} x {reason}" for reason, count in found["reasons"].items())
    else:
        text = "failed    " + " ".join(found["error"].split())[:200]
    return f"{found['name']:42} {found['seconds']:7.1f} s  {text}"


def read(path: Path) -> dict[str, dict[str, Any]]:
    """Return the rows of a file of JSON lines by model; the last one of a model counts."""
    if not path.exists():
        return {}
    rows = [json.loads(text) for text in path.read_text().splitlines()]
    return {found["name"]: found for found in rows}


def summary(rows: list[dict[str, Any]], library: str) -> str:
    """Return the counts of one library."""
    mine = [found for found in rows if found["name"].startswith(library)]
    counts = Counter(found["result"] for found in mine)
    seconds = sorted(found["seconds"] for found in mine)
    return (
        f"{library}: {len(mine)} models, {counts['finite']} finite, {counts['infinite']} infinite, "
        f"{counts['failed']} failed; median {seconds[len(seconds) // 2]:.0f} s, longest {seconds[-1]:.0f} s"
    )


def main() -> None:
    context = multiprocessing.get_context("fork" if "fork" in multiprocessing.get_all_start_methods() else None)
    chosen = [name for name in models() if fnmatch.fnmatch(name, args.only)]
    for name in chosen:
        if name not in read(args.output):
            process = context.Process(target=_child, args=(name, args.method, args.output))
            process.start()
            process.join(args.limit)
            if process.is_alive():
                process.kill()
                process.join()
            if name not in read(args.output):
                killed = process.exitcode == -9
                error = f"no result within {args.limit} s" if killed else f"exit code {process.exitcode}"
                _append(args.output, {"name": name, "result": "failed", "error": error, "seconds": args.limit})
        print(line(read(args.output)[name]), flush=True)
    found = read(args.output)
    rows = [found[name] for name in chosen]
    reasons = Counter(reason for entry in rows for reason in entry.get("reasons", {}))
    for reason, count in reasons.most_common():
        print(f"{count:4} models: {reason}")
    for library in ("torchvision", "timm"):
        if any(entry["name"].startswith(library) for entry in rows):
            text = summary(rows, library)
            print(text)
            if args.record:
                record("Coverage of the audit", text)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="*", help="a pattern of names, such as 'timm:swin*'")
    parser.add_argument("--output", type=Path, default=Path("runs/coverage.jsonl"), help="JSON lines to extend")
    parser.add_argument("--limit", type=int, default=900, help="seconds a model")
    parser.add_argument("--quick", action="store_true", help="bound spectral norms by row and column sums")
    parser.add_argument("--method", default="auto", choices=("auto", "eigenvalue", "gram"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--record", action="store_true", help="add rows to RESULTS.md")
    args = parser.parse_args()
    args.output.parent.mkdir(parents=True, exist_ok=True)
    main()
