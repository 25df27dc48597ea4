"""Editing with every family of models: the known part stays, the free part has no effect, the model draws the rest."""

import pytest
import torch

from diffusion_gym.consistency.editing import denoise, edit, interpolate, slerp
from diffusion_gym.consistency.operators import Colourisation, Inpainting, SuperResolution
from diffusion_gym.models import load_model
from diffusion_gym.samplers import CPS, DDIM, Consistency
from diffusion_gym.sampling import sample_latents
from diffusion_gym.transitions import draw_noise
from tests.families import FAMILIES
from tests.tiny import make_tiny_latent_consistency

HALF = torch.arange(16).expand(16, 16) >= 7
OPERATORS = [Inpainting(HALF), Colourisation(), SuperResolution(4)]


@pytest.fixture(scope="module")
def lcm(tmp_path_factory):
    return load_model(make_tiny_latent_consistency(tmp_path_factory.mktemp("lcm") / "tiny"))


@pytest.fixture(scope="module", params=FAMILIES, ids=lambda family: family.name)
def model(request, tmp_path_factory):
    folder = request.param.write(tmp_path_factory.mktemp(request.param.name) / "model")
    return load_model(folder, image_size=request.param.told_size)


def images(seed=0, count=2, size=(16, 16)):
    return torch.rand(count, 3, *size, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("operator", OPERATORS, ids=lambda operator: type(operator).__name__)
def test_what_is_known_stays_in_every_family(model, operator):
    y = images()
    edited = edit(model, y, "a cat", operator, num_steps=2)
    assert edited.shape == y.shape
    assert ((edited >= 0) & (edited <= 1)).all()
    torch.testing.assert_close(operator.restore(edited, y), edited)
    torch.testing.assert_close(operator.project(edited, y), edited, atol=1e-5, rtol=0)
    assert (edited - operator.start(y)).abs().max() > 0.01


@pytest.mark.parametrize("sampler", [DDIM(0.0), DDIM(1.0), CPS(0.5), Consistency()], ids=repr)
@pytest.mark.parametrize("space", ["pixels", "latents"])
def test_what_is_free_has_no_effect_with_any_sampler(tiny, sampler, space):
    y = images()
    other = torch.where(HALF, images(1), y)
    one, same, another = (
        edit(tiny, picture, "a cat", Inpainting(HALF), num_steps=2, sampler=sampler, space=space, seed=seed)
        for picture, seed in ((y, 3), (other, 3), (y, 4))
    )
    assert torch.equal(one, same)
    assert torch.equal(one[..., :7], y[..., :7])
    assert (one - another).abs().max() > 1e-3


def test_an_image_is_edited_alike_whatever_stands_beside_it(lcm):
    y = images(count=3)
    together = edit(lcm, y, ["a cat", "a dog", "a fox"], SuperResolution(2), times=(900, 300), seed=5)
    alone = edit(lcm, y[1:2], "a dog", SuperResolution(2), times=(900, 300), seed=6)
    torch.testing.assert_close(together[1:2], alone, atol=1e-4, rtol=0)


def test_where_all_is_known_the_image_comes_back(lcm):
    y = images()
    assert torch.equal(edit(lcm, y, "a cat", Inpainting(torch.zeros(16, 16, dtype=torch.bool)), num_steps=1), y)


def test_the_missing_coordinate_of_a_mixture_is_drawn_where_the_mixture_is(mixture):
    """Where one coordinate is a component's mean, the other is drawn near the components that have that one."""
    centres = mixture.denoiser.centres.float()
    operator = Inpainting(torch.tensor([False, True, False])[:, None, None])
    y = mixture.decode(centres[:, :, None, None]).repeat(8, 1, 1, 1)
    points = mixture.encode(edit(mixture, y, mixture.default_prompts[0], operator, num_steps=60))[:, :, 0, 0]
    torch.testing.assert_close(points[:, 0], centres[:, 0].repeat(8), atol=1e-4, rtol=0)
    away = torch.cdist(points, centres).min(1).values / float(mixture.denoiser.variances.max()) ** 0.5
    assert away.median() < 1.5  # E|z| is 0.8


def test_strokes_stay_nearer_the_later_it_begins(emoji):
    """Blocks of one colour, made into a picture of the embedded model: SDEdit."""
    strokes = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0)).repeat_interleave(8, 2)
    strokes = strokes.repeat_interleave(8, 3)
    distances = [
        float((edit(emoji, strokes, "a fox", times=times) - strokes).square().mean())
        for times in ((201, 101), (501, 251), (951, 476))
    ]
    assert distances == sorted(distances)
    assert distances[2] > 1.5 * distances[0]


def test_denoising_in_a_step_is_the_consistency_function(lcm):
    latents, conditioning = torch.randn(2, *lcm.latent_shape), lcm.encode_prompts(["a cat", "a dog"])
    with torch.no_grad():
        f = lcm.denoise(latents, torch.full((2,), 300.0), conditioning, guidance_scale=8.5).x0
    torch.testing.assert_close(denoise(lcm, latents, ["a cat", "a dog"], times=(300,)), lcm.decode(f))


def test_denoising_comes_nearer_to_the_image(emoji):
    schedule, t = emoji.schedule, torch.tensor([301.0])
    prompts = ["a fox", "a pig"]
    noise = torch.randn(2, *emoji.latent_shape, generator=torch.Generator().manual_seed(0))
    clean = sample_latents(emoji, noise, emoji.encode_prompts(prompts), schedule.timesteps(10))
    more = torch.randn(noise.shape, generator=torch.Generator().manual_seed(1))
    noisy = schedule.alpha(t) * clean + schedule.sigma(t) * more
    errors = [
        float((picture - emoji.decode(clean)).square().mean())
        for picture in (emoji.decode(noisy / schedule.alpha(t)), denoise(emoji, noisy, prompts, times=(301, 101)))
    ]
    assert errors[1] < errors[0] / 2


def test_an_arc_keeps_the_length_and_begins_and_ends_where_it_should():
    first, second = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    second *= first.norm() / second.norm()
    weights = torch.linspace(0, 1, 5, dtype=torch.float64)
    points = slerp(first, second, weights)
    torch.testing.assert_close(points[0], first)
    torch.testing.assert_close(points[-1], second)
    torch.testing.assert_close(points.flatten(1).norm(dim=1), first.norm().expand(5))
    steps = points.diff(dim=0).flatten(1).norm(dim=1)
    torch.testing.assert_close(steps, steps[:1].expand(4))
    assert torch.equal(slerp(first, first, weights), first.expand(5, -1, -1, -1))


def test_an_interpolation_begins_and_ends_with_the_images_of_its_ends(lcm):
    ends = {"a cat": 3, "a dog": 8}
    between = interpolate(lcm, tuple(ends), 4, seeds=tuple(ends.values()), num_steps=3)
    again = torch.Generator().manual_seed(3)
    first = draw_noise(torch.empty(1, *lcm.latent_shape), again)
    last = draw_noise(first, torch.Generator().manual_seed(8))
    noise, prompts = torch.cat([first, last]), lcm.encode_prompts(list(ends))
    states = [torch.Generator().set_state(again.get_state()) for _ in noise]  # they go on where the first noise ended
    expected = lcm.decode(
        sample_latents(lcm, noise, prompts, lcm.schedule.timesteps(3), sampler=Consistency(), generators=states)
    )
    torch.testing.assert_close(between[[0, -1]], expected, atol=1e-4, rtol=0)
    assert (between[1] - between[0]).abs().max() > 1e-3


def test_between_equal_ends_nothing_changes(lcm):
    still = interpolate(lcm, "a cat", 3, seeds=(4, 4), times=(900, 200))
    torch.testing.assert_close(still[1:], still[:1].expand(2, -1, -1, -1), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"images": images(size=(8, 16))}, ValueError, r"images must be of shape \[B, \(3, 16, 16\)\]"),
        ({"images": images() * 255}, ValueError, r"images must be in \[0, 1\], got values in"),
        ({"images": images() * torch.nan}, ValueError, r"images must be in \[0, 1\]"),
        ({"images": (images() * 255).byte()}, TypeError, r"float tensor \[B, 3, H, W\]"),
        ({"images": images().numpy()}, TypeError, "images must be a float tensor .*got ndarray"),
        ({"prompts": ["a cat"]}, ValueError, "one for each of the 2 images; got 1"),
        ({"times": (1, 2)}, ValueError, "times must fall"),
        ({"times": (2, 1), "num_steps": 3}, ValueError, "num_steps=3 differs"),
        ({"num_steps": 0}, ValueError, "num_steps must be an integer of at least 1"),
        ({"space": "pixel"}, ValueError, r"space must be one of \('pixels', 'latents'\)"),
        ({"space": "latents", "operator": Colourisation()}, ValueError, "Colourisation acts on pixels alone"),
        ({"guidance_scale": -1.0}, ValueError, "guidance_scale must be"),
    ],
)
def test_what_cannot_be_edited_is_named(tiny, changed, error, message):
    arguments = {"images": images(), "prompts": "a cat", "operator": Inpainting(HALF), "num_steps": None, **changed}
    with pytest.raises(error, match=message):
        edit(tiny, **arguments)


def test_other_latents_and_ends_are_named(tiny):
    with pytest.raises(ValueError, match="latents must be of shape"):
        denoise(tiny, torch.zeros(1, 4, 4, 4), "a cat", times=(1,))
    with pytest.raises(ValueError, match="num_images must be an integer of at least 2"):
        interpolate(tiny, "a cat", 1)
    with pytest.raises(ValueError, match="prompts must be a text, or those of the first and the last"):
        interpolate(tiny, ("a cat", "a dog", "a fox"))
