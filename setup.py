"""Packaging: the folders bounds/ and attacks/ install as lipcert.bounds and lipcert.attacks; all else: setup.cfg."""

from setuptools import find_packages, setup

FOLDERS = {"lipcert": "lipcert", "lipcert.bounds": "bounds", "lipcert.attacks": "attacks"}

setup(
    package_dir=FOLDERS, packages=[p for name, folder in FOLDERS.items() for p in [name, *(f"{name}.{sub}" for sub in
    find_packages(folder))]],
)
