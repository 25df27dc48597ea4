import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
import transformers
from diffusers.utils import logging as diffusers_logging

from diffusion_gym.models import load_model
from diffusion_gym.models.mixture import write_mixture
from tests.tiny import make_tiny_stable_diffusion

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
diffusers_logging.disable_progress_bar()
transformers.utils.logging.disable_progress_bar()


@pytest.fixture(scope="session")
def emoji():
    """The embedded model, shared by all tests: nothing may change it."""
    return load_model("emoji")


@pytest.fixture(scope="session")
def mixture():
    """The packaged mixture, shared by all tests: nothing may change it."""
    return load_model("mixture")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A small random Stable Diffusion, likewise."""
    return load_model(make_tiny_stable_diffusion(tmp_path_factory.mktemp("tiny") / "model"))


@pytest.fixture(scope="session")
def line(tmp_path_factory):
    """A mixture of two components on a line, likewise."""
    folder = tmp_path_factory.mktemp("line")
    return load_model(write_mixture(folder, [[-1.0], [1.0]], stds=[0.3, 0.3], names=["left", "right"]))


@pytest.fixture(scope="session", autouse=True)
def _emoji_is_never_changed(emoji):
    yield
    checksum = sum(float(parameter.double().sum()) for parameter in load_model("emoji").denoiser.parameters())
    assert sum(float(parameter.double().sum()) for parameter in emoji.denoiser.parameters()) == checksum
    assert not any(parameter.requires_grad for parameter in emoji.denoiser.parameters())
