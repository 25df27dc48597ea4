"""Prints the lowest version that pyproject.toml allows of each dependency: pip's constraints in `make test-lowest`."""

import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from packaging.requirements import Requirement

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PYPROJECT = Path(__file__).parents[1] / "pyproject.toml"


def requirements(project: dict) -> Iterator[Requirement]:
    """Yields the requirements of the package and of all its extras."""
    for group in (project["dependencies"], *project["optional-dependencies"].values()):
        yield from map(Requirement, group)


def lowest(requirements: Iterable[Requirement]) -> dict[str, str]:
    """The lowest version that is allowed of each package.

    Raises:
        ValueError: A requirement has no lower bound, or two of one package differ in theirs.
    """
    versions: dict[str, str] = {}
    for requirement in requirements:
        bounds = [bound.version for bound in requirement.specifier if bound.operator == ">="]
        if len(bounds) != 1:
            raise ValueError(f"a requirement needs one lower bound, as in 'numpy>=1.24'; got {str(requirement)!r}")
        if versions.setdefault(requirement.name, bounds[0]) != bounds[0]:
            raise ValueError(f"{requirement.name} has two lower bounds: {versions[requirement.name]} and {bounds[0]}")
    return versions


if __name__ == "__main__":
    project = tomllib.loads(PYPROJECT.read_text())["project"]
    print(*(f"{name}=={version}" for name, version in lowest(requirements(project)).items()), sep="\n")
