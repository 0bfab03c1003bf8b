"""Small files in the formats of the real data sets: what is read, and what is refused."""

from __future__ import annotations

import hashlib
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from lipcert.data import load
from lipcert.errors import InputError


@pytest.fixture
def mnist_root(tmp_path: Path, torchvision) -> Path:
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for part, n in (("train", 20), ("t10k", 6)):
        pixels = np.arange(n * 28 * 28, dtype=np.int64).astype(np.uint8)
        (raw / f"{part}-images-idx3-ubyte").write_bytes(struct.pack(">IIII", 0x803, n, 28, 28) + pixels.tobytes())
        labels = (np.arange(n) % 10).astype(np.uint8)
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 0x801, n) + labels.tobytes())
    return tmp_path


@pytest.fixture
def cifar_root(tmp_path: Path, torchvision, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two training batches and a test batch; the published MD5 sums are replaced by those of these files."""
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()

    def batch(name: str, n: int, start: int) -> list[str]:
        data = (np.arange(n * 3072) + start).astype(np.uint8).reshape(n, 3072)
        content = pickle.dumps({"data": data, "labels": [(start + i) % 10 for i in range(n)]})
        (folder / name).write_bytes(content)
        return [name, hashlib.md5(content).hexdigest()]

    meta = pickle.dumps({"label_names": [f"class{i}" for i in range(10)]})
    (folder / "batches.meta").write_bytes(meta)
    kind = torchvision.datasets.CIFAR10
    monkeypatch.setattr(kind, "train_list", [batch("data_batch_1", 12, 0), batch("data_batch_2", 8, 12)])
    monkeypatch.setattr(kind, "test_list", [batch("test_batch", 5, 3)])
    md5 = hashlib.md5(meta).hexdigest()
    monkeypatch.setattr(kind, "meta", {"filename": "batches.meta", "key": "label_names", "md5": md5})
    return tmp_path


def test_mnist_is_read_as_bytes_with_a_channel(mnist_root: Path) -> None:
    test = load("mnist", mnist_root, split="test")
    assert test.images.shape == (6, 1, 28, 28) and test.images.dtype == torch.uint8
    assert test.images[1, 0, 0, :3].tolist() == [(784 + i) % 256 for i in range(3)]
    assert test.labels.tolist() == [0, 1, 2, 3, 4, 5]
    assert (len(load("mnist", mnist_root)), len(load("mnist", mnist_root, split="val"))) == (18, 2)


def test_cifar_is_read_channels_first(cifar_root: Path) -> None:
    train = load("cifar10", cifar_root, val_fraction=0)
    assert train.images.shape == (20, 3, 32, 32) and train.images.is_contiguous()
    # a row of the file holds the red plane, then green, then blue, each line by line
    assert train.images[0, 1, 2, 3].item() == (1024 + 2 * 32 + 3) % 256
    assert train.labels.tolist() == [i % 10 for i in range(20)]
    assert list(train.classes)[:2] == ["class0", "class1"]


def test_changed_cifar_files_are_never_unpickled(cifar_root: Path) -> None:
    class Harm:
        def __reduce__(self):
            return (Path.touch, (cifar_root / "harmed",))

    (cifar_root / "cifar-10-batches-py" / "data_batch_2").write_bytes(pickle.dumps(Harm()))
    with pytest.raises(InputError, match="CIFAR10 could not be read below .*corrupted"):
        load("cifar10", cifar_root)
    assert not (cifar_root / "harmed").exists()


def test_a_cut_mnist_file_is_refused(mnist_root: Path) -> None:
    file = mnist_root / "MNIST" / "raw" / "t10k-images-idx3-ubyte"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(InputError, match="MNIST could not be read below"):
        load("mnist", mnist_root, split="test")
