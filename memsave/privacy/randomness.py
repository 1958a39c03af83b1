"""Random generators with a secret state.

`torch.Generator.manual_seed` keeps only 32 bits of its seed on the CPU, so an attacker could try all 2^32 streams of
noise. This module therefore draws the whole state of the Mersenne twister from the operating system. The state can be
computed from enough raw output, which noisy sums do not contain. The generator is still not cryptographic, and its
state must stay as secret as the data.
"""

import os

import torch
from torch import Generator

WORDS, FIRST_WORD = 624, 24  # the number of 8-byte words of the twister's state, and their offset in PyTorch's state


def secret_generator(device: torch.device | str = "cpu") -> Generator:
    """A generator seeded from the operating system's entropy: 19,968 bits on the CPU, 64 on CUDA."""
    device = torch.device(device)
    generator = Generator(device)
    if device.type != "cpu":
        return generator.manual_seed(int.from_bytes(os.urandom(8), "little", signed=True))
    generator.manual_seed(5489)  # sets the twister to the start of its state
    state = generator.get_state()
    words = state[FIRST_WORD : FIRST_WORD + 8 * WORDS].view(torch.int64)
    if words[0] != 5489 or words.max() >= 2**32:
        raise RuntimeError(
            f"PyTorch {torch.__version__} stores its generator's state in an unknown format; use a supported version"
        )
    words.copy_(torch.frombuffer(bytearray(os.urandom(4 * WORDS)), dtype=torch.uint32).to(torch.int64))
    generator.set_state(state)
    return generator


def seeded_generator(seed: int, device: torch.device | str = "cpu") -> Generator:
    """A generator with a known seed, for tests: such a run is not private."""
    return Generator(device).manual_seed(seed)
