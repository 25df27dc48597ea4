"""A reward server that kills its own process in the middle of a request when a file is there."""

import os
import signal
import sys
from pathlib import Path

from diffusion_gym.rewards import make_reward
from diffusion_gym.rewards.compositions import RewardWrapper
from diffusion_gym.rewards.server import RewardServer, serve


class Mortal(RewardWrapper):
    """The reward; where `poison` is there, it is taken and the process dies at once."""

    def __init__(self, reward, poison):
        super().__init__(make_reward(reward))
        self.poison = poison

    def __call__(self, images, prompts, metadata=None):
        output = self.reward(images, prompts, metadata)
        if self.poison.exists():
            self.poison.unlink()
            os.kill(os.getpid(), signal.SIGKILL)
        return output


if __name__ == "__main__":
    name, port, poison_file = sys.argv[1:]
    serve(RewardServer(Mortal(name, Path(poison_file))), port=int(port))
