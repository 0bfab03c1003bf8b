"""Small certificates of untrained networks, for the tests of the checker and of changed certificates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save
from tampering import Files

from lipcert import create_model, data
from lipcert.bounds import audit
from lipcert.certificate import Certificate, begin, write
from lipcert.certify import image_sha256, labels_sha256, rows_of_batches
from lipcert.export import export
from lipcert.files import append_rows, write_json
from lipcert.models.lipsformer_certified import lipsformer_certified
from lipcert.models.shiftvit import lipshift, lipshift_published
from lipcert.proof import Proof
from lipcert.segment import SceneRow, certify_scenes, constants, evaluate_scenes

N = 6


def certify(model: torch.nn.Module, images: torch.Tensor, folder: Path) -> None:
    """Write a certificate of a network for images, all of them labelled 0."""
    found = audit(export(model), tuple(images.shape[1:]))
    proof = Proof.of(found)
    facts = dict(model="small", data="digits", split="test", n=len(images), precision="float64", lipcert="0")
    certificate = Certificate(
        **facts, weights_sha256=found.weights_sha256, input_shape=found.input_shape, domain=found.domain,
        audit=found.to_json(), arithmetic={}, **proof.to_json(),
    )  # fmt: skip
    begin(folder, certificate, batch_size=len(images), resume=False, tensors=proof.file)
    labels = torch.zeros(len(images), dtype=torch.int64)
    for rows in rows_of_batches(found, [(images, labels)], pairwise=proof.pairwise):
        write(folder, rows)


def small(folder: Path, **options: Any) -> Files:
    """Certify digits with a LipShiFT."""
    sizes = dict(num_classes=3, img_size=8, in_chans=1, embed_dim=12, depths=(2, 1), patch_size=2, neck=16)
    return _digits(folder, lipshift, {**sizes, **options})


def paper(folder: Path, **options: Any) -> Files:
    """Certify digits with LipShiFT as published."""
    sizes = dict(num_classes=3, img_size=8, in_chans=1, embed_dim=12, depths=(1, 1))
    return _digits(folder, lipshift_published, {**sizes, **options})


def lipsformer(folder: Path, **options: Any) -> Files:
    """Certify digits with a LipsFormer."""
    sizes = dict(num_classes=3, img_size=8, in_chans=1, embed_dim=12, depths=(2,), patch_size=2, neck=16, num_heads=2)
    return _digits(folder, lipsformer_certified, {**sizes, "window_size": 4, **options})


def _digits(folder: Path, make: Any, options: dict[str, Any]) -> Files:
    torch.manual_seed(0)
    model = make(**options)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)
        if name == "head.raw":  # rows with much in common, which the pairs of classes do not pay for
            parameter.data.add_(0.5)
    images = data.load("digits", split="test").first(N)
    batch, _ = next(iter(data.loader(images, N)))
    if options["img_size"] != batch.shape[-1]:
        batch = torch.nn.functional.interpolate(batch, size=options["img_size"], mode="nearest")
    batch = batch.expand(-1, options["in_chans"], -1, -1)
    certify(model.eval(), batch, folder)
    return Files.read(folder, batch.double().numpy())


def certify_masks(folder: Path, name: str = "lipsegformer_tiny", **options: Any) -> Files:
    """Certify a Lip-SegFormer on three smooth images, labelled mostly as it sees them."""
    torch.manual_seed(0)
    depths, height = ((1, 1, 1), 16) if name == "lipsegformer_tiny" else ((1, 1, 1, 1), 32)
    sizes = dict(num_classes=4, img_size=32, height=height, in_chans=3, embed_dim=12, depths=depths)
    sizes |= options
    model = create_model(name, **sizes)
    torch.nn.init.normal_(model.head.weight, std=0.4)  # orthogonal rows are all √2 apart
    shape = sizes["height"], sizes["img_size"]
    images = torch.nn.functional.interpolate(torch.rand(3, sizes["in_chans"], 4, 6), size=shape, mode="bilinear")
    found = audit(export(model.eval()), tuple(images.shape[1:]))
    proof = Proof.of(found)
    used = constants(proof.audit)
    with torch.no_grad():
        labels = model(images).argmax(1)
    generator = np.random.default_rng(0)
    labels[torch.from_numpy(generator.random(labels.shape) < 0.15)] = sizes["num_classes"] - 1
    labels[torch.from_numpy(generator.random(labels.shape) < 0.1)] = 255
    eps = [0.02, 0.1, 0.5]
    rows = certify_scenes(
        evaluate_scenes(found, [(images, labels)], eps), eps, used.joint, used.pixel, pairs=used.pairs
    )
    pixels = images.double().numpy()
    hashes = [(image_sha256(x), labels_sha256(y)) for x, y in zip(pixels, labels.numpy(), strict=True)]
    names = SceneRow.__dataclass_fields__
    append_rows(folder / "scenes.tsv", list(names), rows[list(names)].itertuples(index=False, name=None))
    (folder / "program.safetensors").write_bytes(proof.file)
    classes = [*"abcd"][: sizes["num_classes"]]
    facts = {
        "statement": "", "task": "segmentation", "model": name, "weights_sha256": found.weights_sha256,
        "data": "camvid", "split": "test", "n": len(images), "precision": "float64", "stride": 4, "eps": eps,
        "input_shape": list(found.input_shape), "domain": list(found.domain), "norm": "l2", "classes": classes,
        "constants": {"of": used.of, "joint": used.joint, "pixel": used.pixel, "pairs": None}, "audit": {},
        "arithmetic": {}, "lipcert": "0", "scenes": hashes,
    }  # fmt: skip
    write_json(folder / "certificate.json", {**facts, **proof.to_json()})
    (folder / "images.safetensors").write_bytes(save({"images": pixels, "labels": labels.numpy()}))
    return Files.read(folder, pixels, labels.numpy())
