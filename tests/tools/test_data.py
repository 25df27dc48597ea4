"""From the registry to augmented, captioned pictures."""

from dataclasses import replace

import pytest
import torch
from PIL import Image

from tests.tools.conftest import NAMED
from tools.emoji.dataset import COLOURS, IconData, NameSampler, augment, composite, draw_captions
from tools.emoji.distort import Randomness, distort, outline
from tools.emoji.icons import ANIMALS
from tools.emoji.sources import ICONS, IconSource, fetch


@pytest.fixture(scope="module")
def data(work):
    return IconData(work / "icons")


def test_a_source_is_fetched_once_and_found_again(registry, tmp_path):
    url, names, _ = registry
    folder = fetch(names, tmp_path, url)
    assert (folder / "en" / "data.json").is_file()
    assert fetch(names, tmp_path, "file:///nowhere") == folder


def test_another_file_or_another_licence_is_refused(registry, tmp_path):
    url, names, icons = registry
    with pytest.raises(ValueError, match=r"the sha512 of the download is .*, but AAAA is pinned"):
        fetch(replace(names, integrity="sha512-AAAA"), tmp_path, url)
    with pytest.raises(ValueError, match=r"@sets/named 1.0.0 states the licence 'Apache-2.0', expected 'MIT'"):
        fetch(replace(icons[1], licence="MIT"), tmp_path, url)
    assert not (tmp_path / "npm" / "named").exists()


def test_no_source_to_train_on_has_a_share_alike_licence():
    assert {source.style for source in ICONS if source.held_out} == {"openmoji"}
    with pytest.raises(ValueError, match=r"licence 'CC-BY-SA-4.0' is not one to train on"):
        replace(ICONS[-1], held_out=False)
    assert all(isinstance(source, IconSource) and source.credit for source in ICONS)


def test_every_way_to_name_an_icon_finds_it(work, data):
    held_out = IconData(work / "icons", held_out=True)
    assert {icon.style for icon in data.icons} == {"coded", "named", "painted"}
    assert {icon.style for icon in held_out.icons} == {"other"}
    for style in ("coded", "named", "painted"):
        found = {icon.captions[0] for icon in data.icons if icon.style == style}
        assert found == set(NAMED), style
    assert len(held_out) == len(NAMED)
    assert {"cat", "cat face", "bee", "honeybee"} <= set(data.by_name)
    assert not {"flag: Wales", "a name of four words"} & set(data.by_name)


def test_icons_fill_their_square_with_premultiplied_colour(data):
    index = next(k for k, icon in enumerate(data.icons) if icon.style == "coded")
    rgba = data.rgba[index]
    assert rgba.shape == (60, 60, 4)
    assert rgba[30, 0, 3] > 60
    assert rgba[30, 59, 3] > 60
    assert (rgba[..., :3].amax(-1) <= rgba[..., 3]).all()
    assert (rgba[0, 0] == 0).all()


def test_the_contact_sheet_shows_every_animal(work):
    with Image.open(work / "icons" / "animals.png") as sheet:
        assert sheet.size == (64 * 24, 64 * len(ANIMALS))
        assert sheet.crop((0, 64, 64, 128)).getextrema() != ((255, 255),) * 3


def still(rgba, **changes):
    count = len(rgba)
    settings = {
        "flip": torch.zeros(count, dtype=torch.bool),
        "scale": torch.ones(count),
        "shift": torch.zeros(count, 2),
        "rotation": torch.zeros(count),
    }
    return composite(rgba, torch.zeros(count, 3), **settings | changes)


def corner():
    """A white upper left quarter."""
    rgba = torch.zeros(1, 60, 60, 4, dtype=torch.uint8)
    rgba[:, :30, :30] = 255
    return rgba


def test_composite_places_mirrors_scales_shifts_and_turns():
    image = still(corner())[0, 0]
    assert image[:31, :31].mean() > 0.95
    assert image[34:].abs().max() == 0
    torch.testing.assert_close(still(corner(), flip=torch.tensor([True]))[0, 0], image.flip(-1), atol=1e-5, rtol=0)
    half = still(corner(), scale=torch.tensor([0.5]))[0, 0]
    assert half[:15].abs().max() == 0
    assert half[18:30, 18:30].min() > 0.95
    shifted = still(corner(), shift=torch.tensor([[1.0, 0.0]]))[0, 0]
    torch.testing.assert_close(shifted[:, 32:], image[:, :32], atol=1e-4, rtol=0)
    turned = still(corner(), rotation=torch.tensor([torch.pi / 2]))[0, 0]
    assert torch.allclose(turned, image.rot90(1), atol=0.02) or torch.allclose(turned, image.rot90(-1), atol=0.02)


def test_the_background_shows_where_the_icon_is_not():
    rgba = torch.zeros(1, 60, 60, 4, dtype=torch.uint8)
    image = composite(
        rgba,
        torch.tensor([[0.2, 0.4, 0.6]]),
        flip=torch.tensor([False]),
        scale=torch.ones(1),
        shift=torch.zeros(1, 2),
        rotation=torch.zeros(1),
    )
    torch.testing.assert_close(image[0, :, 5, 5], torch.tensor([0.2, 0.4, 0.6]))


def test_batches_are_functions_of_their_generator_and_their_colours_are_true(data):
    names = ["cat", "key", "pizza"] * 20
    first = data.batch(names, torch.Generator().manual_seed(3))
    second = data.batch(names, torch.Generator().manual_seed(3))
    assert torch.equal(first.images, second.images)
    assert first.colours == second.colours
    assert not torch.equal(first.images, data.batch(names, torch.Generator().manual_seed(4)).images)
    white = [k for k, colour in enumerate(first.colours) if colour == "white"]
    assert 10 < len(white) < 35
    assert torch.allclose(first.images[white][:, :, 0, 0], torch.ones(3), atol=1e-4)


def test_half_of_all_names_are_animals_and_hard_ones_come_twice_as_often(data):
    sampler = NameSampler(data)
    share = dict(zip(sampler.names, (sampler.weights / sampler.weights.sum()).tolist(), strict=True))
    assert sum(share[animal] for animal in ANIMALS) == pytest.approx(0.5)
    assert share["shark"] == pytest.approx(2 * share["cat"])
    drawn = sampler.draw(4000, torch.Generator().manual_seed(0))
    assert sum(name in ANIMALS for name in drawn) / 4000 == pytest.approx(0.5, abs=0.03)
    assert (
        set(drawn) == set(share) == {name for label in NAMED for name in (label, label.removesuffix(" face"))} | {"bee"}
    )


def test_captions_take_every_form_and_a_tenth_are_empty():
    captions = draw_captions(["ant"] * 5000, ["orange"] * 5000, torch.Generator().manual_seed(0))
    forms = {
        "": 0.1,
        "an ant": 0.504,
        "ant": 0.099,
        "an emoji of an ant": 0.045,
        "an ant on an orange background": 0.252,
    }
    assert set(captions) == set(forms)
    for form, share in forms.items():
        assert captions.count(form) / 5000 == pytest.approx(share, abs=0.02), form
    assert "" not in draw_captions(["ant"] * 500, ["red"] * 500, torch.Generator().manual_seed(0), empty=0)


def test_strong_augmentation_stays_an_image_and_keeps_most_of_it(data):
    rgba = data.rgba[data.draw(["cat"] * 64, torch.Generator().manual_seed(0))]
    images = distort(rgba, torch.Generator().manual_seed(1))
    assert images.shape == (64, 3, 64, 64)
    assert images.min() >= 0
    assert images.max() <= 1
    assert torch.isfinite(images).all()
    assert torch.equal(images, distort(rgba, torch.Generator().manual_seed(1)))
    mild = augment(rgba, [COLOURS[0]] * 64, torch.Generator().manual_seed(1))
    assert images.std(0).mean() > 1.2 * mild.std(0).mean()


def test_outlines_are_dark_and_outside_the_drawing():
    drawn = torch.zeros(1, 4, 60, 60)
    drawn[:, :, 20:40, 20:40] = 1
    red = torch.tensor([1.0, 0, 0])[None, :, None, None]
    outlined = outline(drawn, 2, red, torch.zeros(1, 1, 1, 1))
    assert outlined[0, 3, 19, 30] == 1
    assert outlined[0, :3, 19, 30].max() == 0
    assert outlined[0, 3, 10, 10] == 0
    assert outlined[0, :3, 30, 30].min() == 1
    washed = outline(drawn, 2, red, torch.ones(1, 1, 1, 1))
    assert washed[0, :, 30, 30].tolist() == [1, 0, 0, 1]
    assert torch.equal(washed[:, 3], outlined[:, 3])


def test_choices_have_their_probability():
    chosen = Randomness(4000, torch.Generator().manual_seed(0)).chosen(0.3)
    assert chosen.float().mean().item() == pytest.approx(0.3, abs=0.03)
