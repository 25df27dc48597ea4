import ast
from pathlib import Path

import numpy as np
import pytest
import torch

import diffusion_gym
from diffusion_gym import transfer

PACKAGE = Path(diffusion_gym.__file__).parent
# Schedules and grids work on the host; their constructors bring there what they are given.
# The last one gathers weights for a file.
ON_THE_HOST = {"schedules.py", "grids.py", "transfer.py", "sharding.py"}


@pytest.mark.parametrize(
    ("tensor", "expected"),
    [
        (torch.tensor([1.5, -2.0]), np.array([1.5, -2.0], np.float32)),
        (torch.tensor([[1], [2]]), np.array([[1], [2]])),
        (torch.tensor([1.5], dtype=torch.bfloat16), np.array([1.5], np.float32)),
        (torch.tensor([1.5], dtype=torch.float16), np.array([1.5], np.float16)),
        (torch.tensor(True), np.array(True)),
        (torch.ones(2, requires_grad=True), np.ones(2, np.float32)),
        (torch.arange(6).reshape(2, 3).T, np.arange(6).reshape(2, 3).T),
    ],
)
def test_values_come_to_the_host_as_they_are(tensor, expected):
    array = transfer.to_host(tensor)
    np.testing.assert_array_equal(array, expected)
    assert array.dtype == expected.dtype


def test_a_number_is_an_item():
    assert transfer.to_host(torch.tensor(0.1)).item() == torch.tensor(0.1).item()


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_nothing_else_reads_a_tensor_from_the_device(path):
    """`.cpu()` stands in `to_host` alone, and nobody imports that function past its module, where tests replace it."""
    tree = ast.parse(path.read_text())
    copies = [
        node.lineno
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "cpu"
    ]
    assert copies == [] or path.name in ON_THE_HOST
    assert "to_host" not in {
        name.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for name in node.names
    }


@pytest.mark.parametrize(("one", "other"), [("cuda", "cuda:0"), ("cpu", "cpu"), ("cuda:1", "cuda:1")])
def test_a_device_is_itself_with_and_without_its_index(one, other):
    assert transfer.is_same_device(torch.device(one), torch.device(other))


def test_devices_of_another_number_or_kind_are_others():
    assert not transfer.is_same_device(torch.device("cuda:1"), torch.device("cuda"))
    assert not transfer.is_same_device(torch.device("cpu"), torch.device("cuda"))
