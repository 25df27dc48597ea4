import os
import subprocess
import sys

import torch

from diffusion_gym.precision import has_fast_bf16


def test_a_processor_without_bf16_instructions_is_found():
    """As oneDNN is told, in a process of its own: it looks at the processor once."""
    command = "from diffusion_gym.precision import has_fast_bf16; print(has_fast_bf16())"
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2"}
    found = subprocess.run([sys.executable, "-c", command], env=environment, capture_output=True, text=True, check=True)
    assert found.stdout == "False\n"


def test_a_gpu_is_asked_whether_it_emulates(monkeypatch):
    asked = []
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: asked.append(including_emulation))
    assert not has_fast_bf16("cuda:0")
    assert asked == [False]
