"""Data: folders, datasets, a teacher's trajectories, and their cache."""

import pytest
import torch
from PIL import Image

from agents.consistency import Latents, Trajectories
from agents.experience.seeding import Stream, derived_generator
from diffusion_gym.sampling import sample_latents
from diffusion_gym.transitions import draw_noise


def picture(colour, size=(24, 16)):
    return Image.new("RGB", size, colour)


def test_a_folder_of_pictures_with_texts_beside_them_or_the_folder_s_name(tiny, tmp_path):
    (tmp_path / "foxes").mkdir()
    picture("orange").save(tmp_path / "foxes" / "a.png")
    picture("blue").save(tmp_path / "foxes" / "b.jpg")
    (tmp_path / "foxes" / "b.txt").write_text("a whale\n")
    data = Latents.of_folder(tiny, tmp_path)
    assert list(data.prompts) == ["foxes", "a whale"]
    expected = tiny.encode(torch.tensor([1.0, 165 / 255, 0.0])[None, :, None, None].expand(1, 3, 16, 16))
    torch.testing.assert_close(data.latents[:1].float(), expected, atol=1e-2, rtol=1e-2)
    assert Latents.of_folder(tiny, tmp_path, prompt=lambda file: file.stem).prompts == ["a", "b"]
    with pytest.raises(FileNotFoundError, match="holds no pictures"):
        Latents.of_folder(tiny, tmp_path / "nothing")


def test_a_dataset_s_columns(tiny, tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / "train" / name).mkdir(parents=True)
        picture("red").save(tmp_path / "train" / name / "0.png")
    data = Latents.of_dataset(tiny, str(tmp_path), prompt="label")
    assert list(data.prompts) == ["cat", "dog"]
    assert data.latents.shape == (2, *tiny.latent_shape)
    assert len(Latents.of_dataset(tiny, str(tmp_path), prompt="label", count=1)) == 1
    with pytest.raises(ValueError, match="no column 'caption'"):
        Latents.of_dataset(tiny, str(tmp_path), prompt="caption")


def test_data_are_added_and_repeated():
    first, second = Latents(torch.zeros(2, 1, 1, 1), ["a", "b"]), Latents(torch.ones(1, 1, 1, 1), ["c"])
    joined = first * 2 + second
    assert joined.prompts == ["a", "b", "a", "b", "c"]
    assert joined.latents.flatten().tolist() == [0, 0, 0, 0, 1]
    with pytest.raises(ValueError, match="a prompt is needed for each"):
        Latents(torch.zeros(2, 1, 1, 1), ["a"])


def test_trajectories_are_ddim_s_and_do_not_depend_on_the_batch(tiny, tmp_path):
    prompts = ["a cat", "a dog", "an ant"]
    drawn = Trajectories.draw(tiny, prompts, guidance_scale=3.0, seed=7, cache=tmp_path / "kept")
    assert drawn.latents.shape == (3, 21, *tiny.latent_shape)
    noise = draw_noise(
        torch.empty(3, *tiny.latent_shape), [derived_generator(7, Stream.DATA, index) for index in range(3)]
    )
    torch.testing.assert_close(drawn.latents[:, 0], noise.half())
    ends = sample_latents(tiny, noise, tiny.encode_prompts(prompts), drawn.times, guidance_scale=3.0)
    torch.testing.assert_close(drawn.ends.latents.float(), ends, atol=0.1, rtol=0.1)  # bfloat16 where it is fast
    alone = Trajectories.draw(tiny, prompts, guidance_scale=3.0, seed=7, batch_size=2)
    torch.testing.assert_close(alone.latents[:, 0], drawn.latents[:, 0])
    torch.testing.assert_close(alone.latents, drawn.latents, atol=0.05, rtol=0.05)


def test_trajectories_are_drawn_once(tiny, tmp_path):
    drawn = Trajectories.draw(tiny, ["a cat"], seed=1, cache=tmp_path / "kept")
    kept = Trajectories.draw(tiny, ["a cat"], seed=1, cache=tmp_path / "kept")
    assert torch.equal(kept.latents, drawn.latents)
    assert kept.prompts == ["a cat"]
    with pytest.raises(ValueError, match="other prompts or times"):
        Trajectories.draw(tiny, ["a dog"], seed=1, cache=tmp_path / "kept")
