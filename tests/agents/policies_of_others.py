"""Policies as users write them."""

from torch import nn

from agents import DenoisingPolicy


class WithCritic(DenoisingPolicy):
    """A policy with one more network, and one more argument."""

    def __init__(self, model, *, width=4, **options):
        super().__init__(model, **options)
        self.width = width
        self.critic = nn.Linear(2, width)

    def saved_arguments(self):
        return {"width": self.width}
