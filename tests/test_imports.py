"""Every module can be imported: those too that no other test enters, such as the demo."""

from __future__ import annotations

import importlib
import pkgutil

import pytest

import benchmarks
import ccp_ext

MODULES = sorted(
    found.name
    for package in (ccp_ext, benchmarks)
    for found in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
    if not found.name.endswith("__main__") and not found.name.startswith("ccp_ext._")
)


@pytest.mark.parametrize("name", MODULES)
def test_the_module_can_be_imported(name):
    importlib.import_module(name)
