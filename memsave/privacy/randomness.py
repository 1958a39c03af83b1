"""Generators that nobody can guess.

`torch.Generator.manual_seed` keeps 32 bits of its seed on the CPU: four thousand million possible streams of noise, few
enough to try them all. So the whole state of the Mersenne twister is drawn from the operating system here. That state
can be computed from enough of its raw output, which noisy sums do not show; it is no cryptographic generator all the
same, and a state must stay as secret as the data.
"""

import os

import torch
from torch import Generator

WORDS, FIRST_WORD = 624, 24  # of the twister's state, in 8 bytes each, and where they begin in PyTorch's


def secret_generator(device: torch.device | str = "cpu") -> Generator:
    """A generator seeded from the operating system's entropy: 19,968 bits on the CPU, 64 on CUDA."""
    device = torch.device(device)
    generator = Generator(device)
    if device.type != "cpu":
        return generator.manual_seed(int.from_bytes(os.urandom(8), "little", signed=True))
    generator.manual_seed(5489)  # puts the twister at the start of its state
    state = generator.get_state()
    words = state[FIRST_WORD : FIRST_WORD + 8 * WORDS].view(torch.int64)
    if words[0] != 5489 or words.max() >= 2**32:
        raise RuntimeError(f"PyTorch {torch.__version__} keeps its generator's state in another way; seed it yourself")
    words.copy_(torch.frombuffer(bytearray(os.urandom(4 * WORDS)), dtype=torch.uint32).to(torch.int64))
    generator.set_state(state)
    return generator


def seeded_generator(seed: int, device: torch.device | str = "cpu") -> Generator:
    """For tests: a run with a known seed is not private."""
    return Generator(device).manual_seed(seed)
