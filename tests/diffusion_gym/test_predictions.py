import pytest
import torch
from diffusers import DDIMScheduler

from diffusion_gym.predictions import to_x0_and_epsilon
from diffusion_gym.schedules import DiscreteVPSchedule, FlowSchedule

VP = DiscreteVPSchedule(DDIMScheduler(beta_schedule="scaled_linear").alphas_cumprod)


def network_output(x0, epsilon, alpha, sigma, prediction_type):
    """What a perfect network would say."""
    return {
        "epsilon": epsilon,
        "sample": x0,
        "v_prediction": alpha * epsilon - sigma * x0,
        "flow": epsilon - x0,
    }[prediction_type]


@pytest.mark.parametrize(
    ("prediction_type", "schedule", "times"),
    [
        ("epsilon", VP, [10.0, 500.0, 990.5]),
        ("sample", VP, [10.0, 500.0, 990.5]),
        ("v_prediction", VP, [10.0, 500.0, 990.5]),
        ("flow", FlowSchedule(), [0.01, 0.5, 1.0]),
    ],
)
def test_a_perfect_output_gives_back_the_image_and_the_noise(prediction_type, schedule, times):
    generator = torch.Generator().manual_seed(0)
    x0, epsilon = torch.randn(2, 3, 4, 8, 8, generator=generator, dtype=torch.float64)
    t = torch.tensor(times, dtype=torch.float64)
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    a, s = alpha[:, None, None, None], sigma[:, None, None, None]
    output = network_output(x0, epsilon, a, s, prediction_type)
    pred_x0, pred_epsilon = to_x0_and_epsilon(
        output, a * x0 + s * epsilon, alpha=alpha, sigma=sigma, prediction_type=prediction_type
    )
    torch.testing.assert_close(pred_x0, x0, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(pred_epsilon, epsilon, rtol=1e-12, atol=1e-12)


def test_unknown_prediction_type_is_refused():
    one = torch.ones(1, 1)
    with pytest.raises(ValueError, match=r"one of \('epsilon', 'v_prediction', 'sample', 'flow'\), got 'noise'"):
        to_x0_and_epsilon(one, one, alpha=one[0], sigma=one[0], prediction_type="noise")
