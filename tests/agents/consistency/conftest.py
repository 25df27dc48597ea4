"""A teacher and students on the plane, and tiny latent ones."""

from types import SimpleNamespace

import pytest
import torch

from agents import AdamW
from agents.consistency import ConsistencyDistillation, FixedGuidance, Latents
from diffusion_gym.consistency_function import exact_consistency
from diffusion_gym.models import load_model
from diffusion_gym.models.consistency_mixture import write_consistency_mixture
from diffusion_gym.models.latent_consistency import write_latent_consistency
from diffusion_gym.models.mixture import write_mixture
from tests.tiny import make_tiny_stable_diffusion

KARRAS = {"_class_name": "EDMEulerScheduler"}


class Plane:
    """A mixture as a teacher, a student, data, and the exact consistency function at points of its trajectories."""

    def __init__(self, folder, means, stds, *, width, depth):
        names = [f"n{index}" for index in range(len(means))]
        self.teacher = load_model(write_mixture(folder / "teacher", means, stds=stds, names=names, scheduler=KARRAS))
        self.student = load_model(write_consistency_mixture(folder / "student", self.teacher, width=width, depth=depth))
        generator = torch.Generator().manual_seed(0)
        self.data = Latents(self._draw(4096, generator), ["anything"] * 4096)
        self.t = self.student.schedule.timesteps(39)[:-1].float().repeat_interleave(32)
        noise = torch.randn(len(self.t), 2, 1, 1, generator=generator)
        self.x = self._draw(len(self.t), generator) + self.t[:, None, None, None] * noise
        self.exact = exact_consistency(self.denoise, self.x.flatten(1), self.t)
        self.conditioning = self.student.encode_prompts(["anything"] * len(self.t))

    def _draw(self, count, generator):
        return self.teacher.draw(self.teacher.encode_prompts(["anything"] * count), generator)

    def denoise(self, x, sigma):
        present = torch.ones(len(x), len(self.teacher.names))
        return self.teacher.denoiser.posterior_mean(x, torch.ones_like(sigma), sigma, present)

    def learner(self, kind, **settings):
        if kind is ConsistencyDistillation:
            settings = {"teacher": self.teacher, **settings}
        optimizer = AdamW(weight_decay=0.0, betas=(0.9, 0.99), warmup_updates=100, max_grad_norm=None, ema_decay=0.999)
        fixed = {"precision": None, "seed": 0, "guidance": FixedGuidance(1.0), "optimizer": optimizer}
        return kind(self.student, data=self.data, **{"batch_size": 256, **fixed, **settings})

    @torch.no_grad()
    def error(self, run):
        """The root of the mean squared distance to the exact function, over the trajectory."""
        with run.averaged_weights():
            f = run.function(self.x, self.t, self.conditioning, scale=1.0).flatten(1)
        return float((f - self.exact).square().sum(1).mean().sqrt())


@pytest.fixture(scope="session")
def gaussian(tmp_path_factory):
    return Plane(tmp_path_factory.mktemp("gaussian"), [[1.0, -1.0]], [0.5], width=64, depth=2)


@pytest.fixture(scope="session")
def circle(tmp_path_factory):
    config = load_model("mixture").denoiser.config
    return Plane(tmp_path_factory.mktemp("mixture"), config["means"], config["stds"], width=128, depth=3)


@pytest.fixture(scope="session")
def latent(tmp_path_factory):
    """A tiny Stable Diffusion, a latent student of it, and data."""
    root = tmp_path_factory.mktemp("latent")
    teacher = load_model(make_tiny_stable_diffusion(root / "teacher", steps_offset=1))
    student = load_model(
        write_latent_consistency(
            root / "student", teacher, num_train_timesteps=800, original_steps=16, guidance_size=16
        )
    )
    generator = torch.Generator().manual_seed(0)
    data = Latents(torch.randn(8, *student.latent_shape, generator=generator), ["a cat", "a dog"] * 4)
    return SimpleNamespace(teacher=teacher, student=student, data=data)
