"""The student that is made of a diffusion model."""

import pytest
import torch
from diffusers import LatentConsistencyModelPipeline

from diffusion_gym.models import load_model
from diffusion_gym.models.latent_consistency import write_latent_consistency


@pytest.fixture(scope="module")
def student(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("student") / "model"
    return load_model(
        write_latent_consistency(folder, tiny, num_train_timesteps=800, original_steps=16, guidance_size=16)
    )


def test_it_starts_as_the_model(student, tiny):
    """f = c_skip·x + c_out·x̂_0 of the model's own prediction, whatever scale it is told."""
    x, t = torch.randn(3, 4, 8, 8), torch.tensor([799.0, 400.0, 1.0])
    prompts = ["a cat", "a dog", "an ant"]
    with torch.no_grad():
        model = tiny.denoise(x, t, tiny.encode_prompts(prompts), guidance_scale=1.0)
        for scale in (1.0, 8.0):
            f = student.denoise(x, t, student.encode_prompts(prompts), guidance_scale=scale).x0
            c_skip = (0.25 / ((10 * t) ** 2 + 0.25))[:, None, None, None]
            c_out = (10 * t / ((10 * t) ** 2 + 0.25).sqrt())[:, None, None, None]
            torch.testing.assert_close(f, c_skip * x + c_out * model.x0, rtol=1e-4, atol=1e-4)


def test_the_boundary_is_exact(student):
    x = torch.randn(2, 4, 8, 8)
    with torch.no_grad():
        f = student.denoise(x, torch.zeros(2), student.encode_prompts(["a cat"] * 2), guidance_scale=1.0).x0
    assert torch.equal(f, x)


def test_its_process_is_the_first_part_of_the_model_s(student, tiny):
    assert torch.equal(student.schedule.alphas_cumprod, tiny.schedule.alphas_cumprod[:800])
    assert student.schedule.timesteps(4).tolist() == [799, 599, 399, 199, -1]


@pytest.mark.parametrize("num_steps", [1, 2, 4, 8])
def test_plain_diffusers_starts_at_its_last_index(student, num_steps):
    pipeline = LatentConsistencyModelPipeline.from_pretrained(student.path)
    pipeline.scheduler.set_timesteps(num_steps)
    assert pipeline.scheduler.timesteps.tolist() == student.schedule.timesteps(num_steps)[:-1].tolist()


def test_what_cannot_be_a_student_is_refused(student, tiny, tmp_path):
    with pytest.raises(TypeError, match="StableDiffusionPipeline"):
        write_latent_consistency(tmp_path / "model", student)
    with pytest.raises(ValueError, match="between 50"):
        write_latent_consistency(tmp_path / "model", tiny, num_train_timesteps=2000)
