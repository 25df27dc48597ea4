"""What is known is kept, what is free has no effect, and A is orthonormal: for every operator."""

import pytest
import torch
import torch.nn.functional as F

from diffusion_gym.consistency.operators import Colourisation, Inpainting, SuperResolution, orthonormal_basis

EPSILON = torch.finfo(torch.float32).eps
HALF = torch.arange(16).expand(8, 16) >= 7
OPERATORS = {
    "half": Inpainting(HALF),
    "each its own": Inpainting(torch.rand(3, 1, 8, 16, generator=torch.Generator().manual_seed(5)) < 0.4),
    "one channel": Inpainting(torch.tensor([False, True, True])[:, None, None].expand(3, 8, 16)),
    "colour": Colourisation(),
    "x2": SuperResolution(2),
    "x4": SuperResolution(4),
}
LUMA = torch.tensor([0.299, 0.587, 0.114])[:, None, None]
KNOWN = {  # what each keeps, written down once more
    "half": lambda images: images[..., :7],
    "each its own": lambda images: images.masked_fill(OPERATORS["each its own"].mask, 0),
    "one channel": lambda images: images[:, 0],
    "colour": lambda images: (LUMA * images).sum(1),
    "x2": lambda images: F.avg_pool2d(images, 2),
    "x4": lambda images: F.avg_pool2d(images, 4),
}


@pytest.fixture(params=OPERATORS)
def name(request):
    return request.param


@pytest.fixture
def operator(name):
    return OPERATORS[name]


def images(seed, spread=0.0):
    """Return images in [0, 1], or with a spread beyond it."""
    drawn = torch.rand(3, 3, 8, 16, generator=torch.Generator().manual_seed(seed))
    return (1 + 2 * spread) * drawn - spread


@pytest.mark.parametrize("size", [2, 3, 16])
def test_a_basis_is_orthonormal_and_begins_with_the_vector(size):
    first = torch.rand(size, generator=torch.Generator().manual_seed(size), dtype=torch.float64)
    basis = orthonormal_basis(first)
    torch.testing.assert_close(basis @ basis.T, torch.eye(size, dtype=torch.float64))
    torch.testing.assert_close(basis[0], first / first.norm())
    along = torch.eye(size, dtype=torch.float64)
    torch.testing.assert_close(orthonormal_basis(3 * along[0]), along)


def test_a_and_its_inverse_are_one_and_keep_lengths(operator):
    x = images(0).double()
    torch.testing.assert_close(operator.inverse(operator.transform(x), x), x)
    torch.testing.assert_close(operator.transform(x).square().sum(), x.square().sum())


def test_a_projection_has_what_is_known_and_is_the_nearest_that_has(name, operator):
    x, y = images(1, 0.5).double(), images(2).double()
    projected = operator.project(x, y)
    torch.testing.assert_close(KNOWN[name](projected), KNOWN[name](y))
    torch.testing.assert_close(operator.project(projected, y), projected)
    other = operator.project(images(3, 0.5).double(), y)  # any other that has it
    along, to_it = (projected - x).flatten(1), (other - projected).flatten(1)
    torch.testing.assert_close((along * to_it).sum(1), torch.zeros(3, dtype=torch.float64), atol=1e-10, rtol=0)


@pytest.mark.parametrize("spread", [0.0, 3.0])
def test_what_is_restored_is_known_to_the_last_bits_and_in_range(name, operator, spread):
    x, y = images(1, spread), images(2)
    y[0] = 0.0
    y[1] = 1.0
    restored = operator.restore(x, y)
    assert ((restored >= 0) & (restored <= 1)).all()
    bound = 8 * (1 + 2 * spread) * EPSILON
    torch.testing.assert_close(KNOWN[name](restored), KNOWN[name](y), atol=bound, rtol=0)


def test_what_is_in_range_is_only_projected(operator):
    x, y = 0.45 + 0.1 * images(1), 0.45 + 0.1 * images(2)
    torch.testing.assert_close(operator.restore(x, y), operator.project(x, y))


def test_the_start_has_what_is_known_and_nothing_of_what_is_free(name, operator):
    y, other = images(2), images(3)
    start = operator.start(y)
    assert ((start >= 0) & (start <= 1)).all()
    torch.testing.assert_close(KNOWN[name](start), KNOWN[name](y))
    as_known = operator.restore(other, y)  # the same is known of it
    torch.testing.assert_close(operator.start(as_known), start, atol=1e-5, rtol=0)


def test_starts_are_the_mean_gray_and_flat_blocks():
    y = images(4)
    start = OPERATORS["half"].start(y)
    torch.testing.assert_close(start[..., 7:], y[..., :7].mean((2, 3), keepdim=True).expand(3, 3, 8, 9))
    assert (OPERATORS["colour"].start(y).std(1) < 1e-6).all()
    assert torch.equal(SuperResolution(2).start(y), F.interpolate(F.avg_pool2d(y, 2), scale_factor=2))
    nothing = Inpainting(torch.ones(8, 16, dtype=torch.bool))
    assert (nothing.start(y) == 0.5).all()


def test_a_mask_on_latents_is_free_where_any_pixel_is():
    mask = torch.zeros(8, 16, dtype=torch.bool)
    mask[3, 5] = True
    expected = torch.zeros(1, 1, 2, 4, dtype=torch.bool)
    expected[0, 0, 0, 1] = True
    assert torch.equal(Inpainting(mask).on_latents((4, 2, 4)).mask, expected)
    of_a_channel = torch.stack([mask, mask.flip(0), mask])
    expected[0, 0, 1, 1] = True
    assert torch.equal(Inpainting(of_a_channel).on_latents((4, 2, 4)).mask, expected)
    for operator in (Colourisation(), SuperResolution(2)):
        with pytest.raises(ValueError, match=r"acts on pixels alone, .*space=\"pixels\""):
            operator.on_latents((4, 2, 4))


@pytest.mark.parametrize("mask", [[[True]], torch.zeros(8, 16), torch.zeros(16, dtype=torch.bool)])
def test_what_is_no_mask_is_named(mask):
    with pytest.raises(TypeError, match="mask must be a bool tensor"):
        Inpainting(mask)


@pytest.mark.parametrize("factor", [1, 2.0, True, "2"])
def test_what_is_no_factor_is_named(factor):
    with pytest.raises(ValueError, match="factor must be an integer of at least 2"):
        SuperResolution(factor)


def test_images_that_do_not_fit_are_named():
    y = images(0)
    with pytest.raises(ValueError, match=r"factor=3 does not divide images of \[8, 16\] pixels"):
        SuperResolution(3).project(y, y)
    with pytest.raises(ValueError, match=r"mask of shape \[4, 4\] does not broadcast to images \[3, 3, 8, 16\]"):
        Inpainting(torch.zeros(4, 4, dtype=torch.bool)).project(y, y)
    with pytest.raises(ValueError, match="colours need images of 3 channels"):
        Colourisation().project(y[:, :2], y[:, :2])


def test_operators_say_what_they_are():
    assert repr(SuperResolution(4)) == "SuperResolution(factor=4)"
    assert repr(Colourisation()) == "Colourisation()"
    assert repr(OPERATORS["half"]).startswith("Inpainting(mask=tensor(")
