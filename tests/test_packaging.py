"""What gets installed, and the two import hooks that let bounds/ and attacks/ lie at the top of the checkout."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import lipcert

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """Build a wheel of a copy of the sources, offline."""
    pytest.importorskip("setuptools")
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    for name in ("lipcert", "bounds", "attacks"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "setup.cfg", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    build = "from setuptools import build_meta; print(build_meta.build_wheel('..'))"
    subprocess.run([sys.executable, "-c", build], cwd=source, check=True, capture_output=True)
    (file,) = folder.glob("*.whl")
    return zipfile.ZipFile(file)


def test_the_wheel_holds_every_source_under_one_name(wheel: zipfile.ZipFile) -> None:
    names = set(wheel.namelist())
    assert {name.partition("/")[0] for name in names} == {"lipcert", f"lipcert-{lipcert.__version__}.dist-info"}
    for folder, package in (("lipcert", "lipcert"), ("bounds", "lipcert/bounds"), ("attacks", "lipcert/attacks")):
        for path in (ROOT / folder).rglob("*.py"):
            assert f"{package}/{path.relative_to(ROOT / folder).as_posix()}" in names
    for pattern in ("py.typed", "presets/*.yaml", "report/*.html"):
        for path in (ROOT / "lipcert").glob(pattern):
            assert path.relative_to(ROOT).as_posix() in names
    assert {"lipcert/py.typed", "lipcert/presets/digits.yaml"} <= names


def test_the_wheel_has_the_command_and_the_license(wheel: zipfile.ZipFile) -> None:
    info = f"lipcert-{lipcert.__version__}.dist-info"
    assert "lipcert = lipcert.cli:main" in wheel.read(f"{info}/entry_points.txt").decode()
    metadata = wheel.read(f"{info}/METADATA").decode()
    assert f"Version: {lipcert.__version__}\n" in metadata and "Requires-Python: >=3.10" in metadata
    assert any(name.endswith("LICENSE") for name in wheel.namelist())


def python(program: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", program], cwd=cwd, capture_output=True, text=True)


def test_an_unpacked_wheel_works_elsewhere_and_in_a_checkout(wheel: zipfile.ZipFile, tmp_path: Path) -> None:
    wheel.extractall(tmp_path / "site")
    program = (
        f"import sys; sys.path.insert(0, {str(tmp_path / 'site')!r})\n"
        "import importlib.util, lipcert.cli; print(importlib.util.find_spec('lipcert.bounds').origin)"
    )
    done = python(program, tmp_path)
    assert done.stdout.strip() == str(tmp_path / "site" / "lipcert" / "bounds" / "__init__.py"), done.stderr


def test_bare_names_are_refused_in_the_checkout() -> None:
    for name in ("bounds", "attacks"):
        done = python(f"import {name}", ROOT)
        assert done.returncode == 1 and f"this package is lipcert.{name}" in done.stderr


def test_importing_lipcert_does_not_import_torch() -> None:
    program = "import sys, lipcert, lipcert.errors, lipcert.registry, lipcert.files; sys.exit('torch' in sys.modules)"
    done = python(program, ROOT)
    assert done.returncode == 0, done.stderr


def test_public_names_are_there_and_stay_what_they_are() -> None:
    import lipcert.certify
    import lipcert.export

    assert {"Bound", "audit", "certify", "create_model", "export", "load_model"} <= set(dir(lipcert))
    for name in lipcert._PUBLIC:
        assert callable(getattr(lipcert, name))
    assert lipcert.certify is sys.modules["lipcert.certify"].certify
    assert lipcert.create_model is sys.modules["lipcert.registry"].create_model
    with pytest.raises(AttributeError, match="has no attribute 'cretify'"):
        _ = lipcert.cretify
