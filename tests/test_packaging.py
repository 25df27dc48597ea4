"""What a user gets when the package is installed."""

import re
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def packaged_files():
    for package, patterns in PROJECT["tool"]["setuptools"]["package-data"].items():
        for pattern in patterns:
            yield from (path for path in (ROOT / package).glob(pattern) if path.is_file())


def test_every_data_file_is_package_data():
    data = {
        path
        for package in ("diffusion_gym", "agents")
        for path in (ROOT / package).rglob("*")
        if path.is_file() and path.suffix not in (".py", ".pyc")
    }
    assert data == set(packaged_files())


@pytest.mark.parametrize(("name", "most"), [("emoji", 30e6), ("emoji_flow", 30e6), ("emoji_consistency", 25e6)])
def test_embedded_models_are_small(name, most):
    folder = ROOT / "diffusion_gym" / "models" / name
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) < most


def test_every_dependency_has_one_lower_bound_or_a_pin_which_the_tested_versions_meet():
    tested = dict(re.findall(r"^([^=;#\s]+)==([^\s;]+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    tested = {canonicalize_name(name): Version(version) for name, version in tested.items()}
    project = PROJECT["project"]
    for requirement in map(Requirement, sum(project["optional-dependencies"].values(), project["dependencies"])):
        bounds = [Version(bound.version) for bound in requirement.specifier if bound.operator in (">=", "==")]
        assert len(bounds) == 1, requirement
        if requirement.name != "tomli":  # Python 3.10 alone needs it
            assert bounds[0] <= tested[canonicalize_name(requirement.name)], requirement
