"""Export, evaluation, and the chain of all stages."""

import json
import shutil

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file

from diffusion_gym.rewards.emoji_alignment import EmojiScorer
from tests.tiny import EMOJI
from tools.emoji import chain, evaluate
from tools.emoji.evaluate import bootstrap_distances, evaluation_set, frechet_distance
from tools.emoji.export import export_pipeline, export_scorer, megabytes
from tools.emoji.icons import ANIMALS
from tools.emoji.samples import draw_samples, lay_out
from tools.emoji.train_scorer import new_scorer


def open_pipeline(folder):
    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_the_frechet_distance_of_gaussians_is_the_closed_form():
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(4, 4, generator=generator, dtype=torch.float64)
    first = torch.randn(200_000, 4, generator=generator, dtype=torch.float64)
    assert frechet_distance(first, first) == pytest.approx(0, abs=1e-6)
    shifted = frechet_distance(first, first + torch.tensor([1.0, 2.0, 0.0, 0.0]))
    assert shifted == pytest.approx(5, rel=1e-6)
    # Of commuting covariances I and A·Aᵀ: tr(I + A·Aᵀ − 2·(A·Aᵀ)^½), with the singular values of A as its roots.
    expected = ((torch.linalg.svdvals(mixing) - 1) ** 2).sum().item()
    mixed = torch.randn(200_000, 4, generator=generator, dtype=torch.float64) @ mixing.T
    assert frechet_distance(first, mixed) == pytest.approx(expected, rel=0.02)


def test_bootstrap_gives_every_distance_and_paired_gains():
    generator = torch.Generator().manual_seed(0)
    real = torch.randn(600, 3, generator=generator)
    noise = torch.randn(600, 3, generator=generator)
    report = bootstrap_distances(real, {5: noise + 1.0, 10: noise + 0.5, 20: noise})
    assert set(report) == {"5 steps", "10 steps", "20 steps", "5 to 10 steps", "10 to 20 steps"}
    assert report["5 steps"]["distance"] == pytest.approx(3, abs=0.5)
    assert report["5 to 10 steps"]["gain"] > 5 * report["5 to 10 steps"]["error"] > 0


def test_the_evaluation_set_has_as_many_of_each_and_no_seed_twice():
    names, seeds = evaluation_set(3)
    assert len(names) == len(set(seeds)) == 135
    assert all(names.count(animal) == 3 for animal in ANIMALS)


def test_samples_do_not_depend_on_the_rest_of_their_batch(emoji):
    prompts, seeds = ["a cat", "a fish", "a dog"], [5, 6, 7]
    together = draw_samples(emoji, prompts, seeds, num_steps=3)
    alone = draw_samples(emoji, prompts[1:2], seeds[1:2], num_steps=3)
    assert (together[1] - alone[0]).abs().mean() < 0.01
    assert (together[0] - together[2]).abs().mean() > 0.05


def test_grids_show_every_image():
    images = torch.linspace(0, 1, 6)[:, None, None, None].expand(6, 3, 8, 8)
    sheet = np.asarray(lay_out(images, ["a", "b", "c"], per_label=2, columns=2))
    assert sheet.shape == (2 * (8 + 14), 2 * (2 * 8 + 6), 3)
    assert sheet[13 + 4, 8 + 4, 0] == round(255 / 5)
    assert sheet[22 + 13 + 4, 4, 0] == round(255 * 4 / 5)


def test_an_exported_pipeline_opens_anywhere_and_draws_the_same(tmp_path):
    trained, package = tmp_path / "trained", tmp_path / "package"
    pipeline = open_pipeline(EMOJI)
    pipeline.save_pretrained(trained)
    shutil.copytree(EMOJI, package)
    export_pipeline(trained, package)
    assert (package / "README.md").read_text() == (EMOJI / "README.md").read_text()
    assert {path.relative_to(package) for path in package.rglob("*")} == {
        path.relative_to(EMOJI) for path in EMOJI.rglob("*")
    }
    text = load_file(package / "text_encoder" / "model.safetensors")
    assert all(name.startswith("text_model.") and weight.dtype == torch.float32 for name, weight in text.items())
    unet = load_file(package / "unet" / "diffusion_pytorch_model.safetensors")
    assert {weight.dtype for weight in unet.values()} == {torch.float16}
    assert "_name_or_path" not in (package / "unet" / "config.json").read_text()
    assert all(path.stat().st_mode & 0o044 == 0o044 for path in package.rglob("*"))
    assert megabytes(package) < 30

    def draw(which):
        generator = torch.Generator().manual_seed(0)
        return which("a cat", num_inference_steps=2, generator=generator, output_type="np").images

    assert np.abs(draw(pipeline) - draw(open_pipeline(package))).max() < 5e-3


def test_an_exported_scorer_scores_the_same(tmp_path):
    torch.manual_seed(0)
    scorer = new_scorer(open_pipeline(EMOJI).tokenizer).eval()
    scorer.save(tmp_path / "trained")
    export_scorer(tmp_path / "trained", tmp_path / "package")
    assert megabytes(tmp_path / "package") < 8
    loaded = EmojiScorer.load(tmp_path / "package", EMOJI / "tokenizer")
    images = torch.rand(3, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(loaded.embed_images(images), scorer.embed_images(images), atol=2e-3, rtol=0)
        torch.testing.assert_close(loaded.embed_texts(["a cat"]), scorer.embed_texts(["a cat"]), atol=2e-3, rtol=0)
    assert loaded.scale == pytest.approx(1 / 0.07)
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


def test_the_whole_chain_runs_from_the_registry_to_a_report(registry, tmp_path, monkeypatch):
    url, names, icons = registry
    monkeypatch.setattr(
        chain,
        "QUICK",
        chain.Sizes(
            vae=32, unet=32, flow=32, consistency=32, pool=64, classifier=64, scorer=64, spoilt=40, batch_size=32
        ),
    )
    monkeypatch.setattr(evaluate, "SCORED_STEPS", (1, 2, 4))
    arguments = chain.Args(tmp_path, registry=url, quick=True)
    chain.main(arguments, icons=icons, names=names)
    report = json.loads((tmp_path / "evaluation" / "chain" / "report.json").read_text())
    assert 0 <= report["classified"]["4 steps"]["accuracy"] <= 1
    assert report["distance"]["4 steps"]["distance"] > 0
    assert report["jpeg kB"]["least"] < report["jpeg kB"]["mean"] < report["jpeg kB"]["most"]
    assert -1 <= report["scorer"]["rank correlation with the number of steps"] <= 1
    with Image.open(tmp_path / "evaluation" / "chain" / "animals.png") as grid:
        assert grid.size == (5 * (64 + 6), 9 * (64 + 14))
    open_pipeline(tmp_path / "package" / "models" / "emoji")
    EmojiScorer.load(tmp_path / "package" / "rewards" / "emoji_scorer", EMOJI / "tokenizer")
