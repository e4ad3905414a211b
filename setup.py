"""The packages: every folder of rlalign, and configs/ as rlalign.configs. Everything else is in pyproject.toml."""

from setuptools import find_packages, setup

setup(packages=[*find_packages(include=["rlalign", "rlalign.*"]), "rlalign.configs"])
