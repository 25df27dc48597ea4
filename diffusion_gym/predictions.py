"""The clean latents x̂_0 and the noise ε̂ that a network's output stands for, for every way of training it."""

from typing import Literal, get_args

from torch import Tensor

PredictionType = Literal["epsilon", "v_prediction", "sample", "flow"]


def broadcast_to(values: Tensor, like: Tensor) -> Tensor:
    """Return `values` [B] with trailing dimensions of size 1, so that it multiplies `like` [B, ...] per sample."""
    return values.reshape(values.shape + (1,) * (like.ndim - values.ndim))


def to_x0_and_epsilon(
    model_output: Tensor, latents: Tensor, *, alpha: Tensor, sigma: Tensor, prediction_type: PredictionType
) -> tuple[Tensor, Tensor]:
    """Return `(pred_x0, pred_epsilon)`, both [B, ...], such that x_t = α_t·x̂_0 + σ_t·ε̂.

        epsilon:       ε̂ = out           x̂_0 = (x_t − σ_t·ε̂) / α_t
        sample:        x̂_0 = out         ε̂ = (x_t − α_t·x̂_0) / σ_t
        v_prediction:  x̂_0 = α_t·x_t − σ_t·out     ε̂ = α_t·out + σ_t·x_t       (VP only)
        flow:          x̂_0 = x_t − σ_t·out         ε̂ = x_t + (1 − σ_t)·out     (flow only)

    Source: Salimans & Ho, 2022, appendix D (v), https://arxiv.org/abs/2202.00512; Esser et al., 2024 (flow),
    https://arxiv.org/abs/2403.03206.

    Args:
        model_output: [B, ...] the network's output, float32 or float64.
        latents: [B, ...] x_t, its input.
        alpha: [B] α_t.
        sigma: [B] σ_t > 0.
        prediction_type: The quantity that the network was trained to predict.

    Raises:
        ValueError: `prediction_type` is none of the four.
    """
    alpha, sigma = broadcast_to(alpha, latents), broadcast_to(sigma, latents)
    if prediction_type == "epsilon":
        return (latents - sigma * model_output) / alpha, model_output
    if prediction_type == "sample":
        return model_output, (latents - alpha * model_output) / sigma
    if prediction_type == "v_prediction":
        return alpha * latents - sigma * model_output, alpha * model_output + sigma * latents
    if prediction_type == "flow":
        return latents - sigma * model_output, latents + (1 - sigma) * model_output
    raise ValueError(f"prediction_type must be one of {get_args(PredictionType)}, got {prediction_type!r}")
