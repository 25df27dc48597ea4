import pytest
from packaging.requirements import Requirement

from tools.lowest import lowest, requirements


def test_the_lowest_version_of_each_dependency_is_one_that_is_allowed():
    project = {
        "dependencies": ["numpy>=1.24", "gymnasium>=1.1,<2"],
        "optional-dependencies": {"dev": ["tomli>=2; python_version < '3.11'", "numpy>=1.24"]},
    }
    assert lowest(requirements(project)) == {"numpy": "1.24", "gymnasium": "1.1", "tomli": "2"}


@pytest.mark.parametrize("wrong", [["numpy"], ["numpy<2"], ["numpy>=1.24", "numpy>=1.26"]])
def test_a_lower_bound_that_is_missing_or_differs_is_named(wrong):
    with pytest.raises(ValueError, match="numpy"):
        lowest(map(Requirement, wrong))
