"""`emoji_consistency` is distilled by a command that goes on where it was, into a folder that ships."""

import shutil

import pytest
import torch
from diffusers import LatentConsistencyModelPipeline

from diffusion_gym.models import load_model
from tests.tiny import EMOJI
from tools.emoji import train_consistency
from tools.emoji.export import export_small_pipeline, megabytes
from tools.emoji.samples import draw_samples

PROMPTS = ["a cat", "a dog"]


@pytest.fixture(scope="module")
def folder(work, tmp_path_factory):
    own = tmp_path_factory.mktemp("consistency")
    shutil.copytree(work / "icons", own / "icons")
    args = train_consistency.Args(
        own, EMOJI, trajectories=4, real=4, start_images=8, images=8, batch_size=2, every=2, per_prompt=0
    )
    train_consistency.main(args)
    train_consistency.main(args)  # which finds all of it done
    return own / "consistency"


def test_it_ends_in_a_folder_that_ships_and_that_diffusers_opens(folder, tmp_path):
    trained = folder / "distillation" / "pipeline"
    export_small_pipeline(trained, tmp_path / "package")
    assert megabytes(tmp_path / "package") < 25
    pipeline = LatentConsistencyModelPipeline.from_pretrained(tmp_path / "package")
    pipeline.set_progress_bar_config(disable=True)
    assert {pipeline.unet.dtype, pipeline.text_encoder.dtype} == {torch.float32}
    generators = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    drawn = pipeline(PROMPTS, num_inference_steps=2, generator=generators, output_type="pt").images
    images = draw_samples(load_model(trained), PROMPTS, [0, 1], num_steps=2)
    assert (drawn - images).abs().mean() < 0.02  # of half precision


def test_it_starts_as_the_teacher(folder):
    student, teacher = load_model(folder / "student"), load_model(EMOJI)
    assert torch.equal(student.schedule.alphas_cumprod, teacher.schedule.alphas_cumprod[:800])
    assert student.schedule.timesteps(2).tolist() == [799, 399, -1]
