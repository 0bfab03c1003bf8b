"""Models of other libraries: the function is theirs with pixels in [0, 1] before it, and what is missing is said."""

from __future__ import annotations

import builtins
import json
import sys

import pytest
import torch
from cli.test_cli import run
from torch import nn

from lipcert.errors import InputError
from lipcert.foreign import timm_model, torchvision_model

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
SMALL = (3, 32, 32)


def test_segmentation_models_of_torchvision_give_their_logits(torchvision) -> None:
    torch.manual_seed(0)
    network, shape = torchvision_model("lraspp_mobilenet_v3_large:random")
    torch.manual_seed(0)
    plain = torchvision.models.get_model("lraspp_mobilenet_v3_large", weights=None, weights_backbone=None)
    x = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(network.eval()(x), plain.eval()(x)["out"])
    assert shape is None


class Mark:
    """Unpickling this writes a file."""

    def __init__(self, path) -> None:
        self.path = path

    def __reduce__(self):
        return (exec, (f"open({str(self.path)!r}, 'w').close()",))


def test_weights_of_torchvision_are_read_as_tensors(torchvision, tmp_path, monkeypatch) -> None:
    """Here a file lies in torch's cache that runs code when it is unpickled."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    weights = torchvision.models.ResNet18_Weights.DEFAULT
    torch.save({"conv1.weight": Mark(tmp_path / "executed")}, tmp_path / "checkpoints" / weights.url.rsplit("/")[-1])
    with pytest.raises(InputError, match="no plain tensors"):
        torchvision_model("resnet18")
    assert not (tmp_path / "executed").exists()


def test_weights_of_torchvision_in_the_cache_are_used(torchvision, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    plain = torchvision.models.squeezenet1_1(weights=None).eval()
    weights = torchvision.models.SqueezeNet1_1_Weights.DEFAULT
    torch.save(plain.state_dict(), tmp_path / "checkpoints" / weights.url.rsplit("/")[-1])
    network, shape = torchvision_model("squeezenet1_1")
    x = torch.rand(1, 3, 64, 64)
    seen = weights.transforms()
    mean, std = (torch.tensor(values)[:, None, None] for values in (seen.mean, seen.std))
    with torch.no_grad():
        torch.testing.assert_close(network.eval()(x), plain((x - mean) / std))
    assert shape == (3, 224, 224)


def test_other_tasks_of_torchvision_are_refused(torchvision) -> None:
    with pytest.raises(InputError, match="neither classifies nor segments"):
        torchvision_model("raft_small:random")


def test_timm_models_take_pixels_and_know_their_shape(capsys) -> None:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    network, shape = timm_model("resnet10t:random")
    torch.manual_seed(0)
    plain = timm.create_model("resnet10t", pretrained=False).eval()
    mean, std = (torch.tensor(plain.pretrained_cfg[key])[:, None, None] for key in ("mean", "std"))
    x = torch.rand(2, *SMALL)
    with torch.no_grad():
        torch.testing.assert_close(network.eval()(x), plain((x - mean) / std))
    assert shape == plain.pretrained_cfg["input_size"]


@pytest.mark.slow
def test_timm_models_are_bounded_from_both_sides(capsys) -> None:
    pytest.importorskip("timm")
    args = ("bound", "timm:test_vit:random", "--input-shape", "3,16,16", "--lower-steps", "2", "--json", "-")
    code, out, err = run(capsys, "bound", "timm:resnet10t:random", *args[2:])
    record = json.loads(out)
    assert code == 0 and 0 < record["lower"] <= record["upper"] < float("inf")
    assert "is untrained: random weights of seed 0" in err


@pytest.fixture
def local(tmp_path, monkeypatch):
    """A small image classifier of transformers, saved as its authors would, with its preprocessing."""
    transformers = pytest.importorskip("transformers")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    torch.manual_seed(0)
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], num_labels=3)
    network = transformers.ResNetForImageClassification(config).eval()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_var.uniform_(0.5, 2.0)
    network.save_pretrained(tmp_path / "model")
    facts = {"do_normalize": True, "image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4], "size": 16}
    (tmp_path / "model" / "preprocessor_config.json").write_text(json.dumps(facts))
    return tmp_path / "model", network


def test_a_folder_of_transformers_is_the_network_with_its_preprocessing(local) -> None:
    from lipcert.huggingface import huggingface_model

    folder, plain = local
    network, shape = huggingface_model(str(folder))
    assert shape == (3, 16, 16)
    x = torch.rand(2, 3, 16, 16)
    mean, std = (torch.tensor(values)[:, None, None] for values in ([0.5, 0.4, 0.3], [0.2, 0.3, 0.4]))
    with torch.no_grad():
        torch.testing.assert_close(network.eval()(x), plain((x - mean) / std).logits)


def test_a_folder_of_transformers_is_bounded(local, capsys) -> None:
    folder, _ = local
    capsys.readouterr()
    code, out, err = run(capsys, "bound", f"hf:{folder}", "--lower-steps", "3", "--json", "-")
    record = json.loads(out)
    assert code == 0, err
    assert record["input"]["shape"] == [3, 16, 16] and 0 < record["lower"] <= record["upper"]


def test_pickled_weights_of_transformers_are_not_read(local) -> None:
    from lipcert.huggingface import huggingface_model

    folder, plain = local
    (folder / "model.safetensors").unlink()
    torch.save(plain.state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(InputError, match="transformers cannot load"):
        huggingface_model(str(folder))
    network, _ = huggingface_model(f"{folder}:random")
    assert network(torch.rand(1, 3, 16, 16)).shape == (1, 3)


def test_code_beside_a_model_of_transformers_is_not_run(local, tmp_path) -> None:
    from lipcert.huggingface import huggingface_model

    folder, _ = local
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config", "AutoModel": "mine.Model"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "mine.py").write_text(f"open({str(tmp_path / 'executed')!r}, 'w').close()")
    with pytest.raises(InputError, match="transformers cannot load"):
        huggingface_model(str(folder))
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    ("library", "model", "extra"),
    [("timm", "timm:resnet18", "timm"), ("transformers", "hf:vit:random", "transformers"), ("onnx", "m.onnx", "onnx")],
)
def test_a_missing_extra_is_named(library, model, extra, capsys, monkeypatch) -> None:
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.partition(".")[0] == library:
            raise ImportError(f"No module named {library!r}")
        return real(name, *args, **kwargs)

    for name in [name for name in sys.modules if name.partition(".")[0] == library]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(builtins, "__import__", without)
    code, out, err = run(capsys, "bound", model)
    assert (code, out) == (2, "") and err == f"Error: {library} is not installed; run: pip install 'lipcert[{extra}]'\n"
