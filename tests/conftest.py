import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
import transformers
from diffusers.utils import logging as diffusers_logging

from diffusion_gym.models import load_model

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
diffusers_logging.disable_progress_bar()
transformers.utils.logging.disable_progress_bar()


@pytest.fixture(scope="session")
def emoji():
    """The embedded model, shared by all tests: nothing may change it."""
    return load_model("emoji")


@pytest.fixture(scope="session", autouse=True)
def _emoji_is_never_changed(emoji):
    yield
    checksum = sum(float(parameter.double().sum()) for parameter in load_model("emoji").denoiser.parameters())
    assert sum(float(parameter.double().sum()) for parameter in emoji.denoiser.parameters()) == checksum
    assert not any(parameter.requires_grad for parameter in emoji.denoiser.parameters())
