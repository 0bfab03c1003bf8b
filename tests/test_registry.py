from __future__ import annotations

import pytest

from lipcert.errors import InputError
from lipcert.registry import Registry, create_model, datasets, losses, models


def test_register_get_and_list() -> None:
    registry = Registry("shape")

    @registry.register()
    def square() -> str:
        return "square"

    @registry.register("round-one")
    def circle() -> str:
        return "circle"

    assert registry.list() == ["round-one", "square"]
    assert registry.list("s*") == ["square"]
    assert registry.get("round-one")() == "circle"
    assert "square" in registry and "circle" not in registry


def test_a_taken_name_is_refused_and_keeps_its_owner() -> None:
    registry = Registry("shape")
    registry.register("a")(dict)
    with pytest.raises(ValueError, match="shape 'a' is already registered by builtins.dict; builtins.list"):
        registry.register("a")(list)
    assert registry.get("a") is dict


def test_unknown_names_get_the_near_match_or_the_list() -> None:
    registry = Registry("shape")
    registry.register("square")(dict)
    registry.register("circle")(dict)
    with pytest.raises(InputError, match="unknown shape 'sqare'; did you mean 'square'?"):
        registry.get("sqare")
    with pytest.raises(InputError, match="unknown shape 'xyz'; known are: circle, square"):
        registry.get("xyz")


def test_the_package_that_registers_is_imported_on_first_use(tmp_path, monkeypatch) -> None:
    (tmp_path / "fills_lazily.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    registry = Registry("shape", "fills_lazily")
    registry.register("square")(dict)
    with pytest.raises(RuntimeError, match="imported"):
        registry.list()


def test_the_three_registries_are_filled() -> None:
    assert "lipshift_tiny" in models
    assert {"digits", "mnist", "cifar10", "tiny-imagenet", "imagenet"} <= set(datasets.list())
    assert "emma" in losses


@pytest.mark.parametrize("wrong", [{"num_classes": 0}, {"img_size": 8.0}, {"in_chans": True}])
def test_create_model_refuses_impossible_sizes(wrong) -> None:
    with pytest.raises(InputError, match=next(iter(wrong))):
        create_model("lipshift_tiny", **wrong)


def test_create_model_refuses_unknown_models_and_arguments() -> None:
    with pytest.raises(InputError, match="did you mean 'lipshift_tiny'"):
        create_model("lipshift_tny")
    with pytest.raises(InputError, match="lipshift_tiny.*widht"):
        create_model("lipshift_tiny", img_size=8, in_chans=1, widht=3)
