"""A consistency function on the plane."""

import math

import pytest
import torch

from diffusion_gym.models import load_model
from diffusion_gym.models.consistency_mixture import write_consistency_mixture
from diffusion_gym.models.mixture import write_mixture


@pytest.fixture(scope="module")
def student(mixture, tmp_path_factory):
    return load_model(write_consistency_mixture(tmp_path_factory.mktemp("plane") / "student", mixture))


def test_the_boundary_is_exact(student):
    x, t = torch.randn(5, 2, 1, 1), torch.full((5,), student.boundary_time)
    with torch.no_grad():
        prediction = student.denoise(x, t, student.encode_prompts(["north"] * 5), guidance_scale=1.0)
    assert torch.equal(prediction.x0, x)


def test_it_knows_the_mixture(student, mixture):
    assert student.names == mixture.names
    drawn = student.draw(student.encode_prompts(["anything"] * 64), torch.Generator().manual_seed(0))
    again = mixture.draw(mixture.encode_prompts(["anything"] * 64), torch.Generator().manual_seed(0))
    torch.testing.assert_close(drawn, again)
    assert student._sigma_data == pytest.approx(math.sqrt(4 / 2 + 0.25**2), rel=1e-5)


def test_features_have_their_shapes_and_prompts_matter(student):
    x, t = torch.randn(1, 2, 1, 1).expand(2, -1, -1, -1), torch.full((2,), 3.0)
    with torch.no_grad():
        told = student.denoise(x, t, student.encode_prompts(["north", "south"]), guidance_scale=1.0, with_features=True)
    assert told.features.shape == (2, *student.feature_shape)
    assert told.time_embedding.shape == (2, student.time_embedding_size)
    assert not torch.equal(told.x0[0], told.x0[1])


def test_a_mixture_may_have_a_variance_exploding_process(tmp_path):
    scheduler = {"_class_name": "EDMEulerScheduler", "sigma_max": 40.0}
    model = load_model(write_mixture(tmp_path / "model", [[1.0]], stds=[0.5], names=["one"], scheduler=scheduler))
    assert (model.schedule.sigma_max, model.schedule.initial_std) == (40.0, 40.0)
    x, t = torch.tensor([3.0])[:, None, None, None], torch.tensor([2.0])
    x0 = model.denoise(x, t, model.encode_prompts(["one"]), guidance_scale=1.0).x0
    assert float(x0) == pytest.approx(1 + 0.25 / 4.25 * 2, rel=1e-5)
    student = load_model(write_consistency_mixture(tmp_path / "student", model))
    assert student.schedule.sigma_max == 40.0
