"""Secret random numbers: NumPy's Philox, a counter-based generator, with a key of 128 bits from the operating system.

A counter-based generator computes block i of its stream from (key, i) alone, so its state is a key and a position, and
any part of the stream can be drawn again (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011).
`torch.Generator.manual_seed` keeps only 32 bits of its seed on the CPU, so an attacker could try all 2^32 streams of
noise. On another device, each piece of noise is drawn by that device's generator with a new seed of 64 bits from the
stream. Philox is no cipher: its state must stay as secret as the data.
"""

import secrets

import numpy as np
from torch import Generator, Tensor

from memsave.ghost.gradients import has_values

KEY_BITS = 128
WORDS = 4 + 2 + 4 + 3
"""Of a state: the counter, the key, the block that was drawn last, the position in it, and half of a number."""


class SecretStream:
    """A stream of random numbers.

    Args:
        key: a number below 2^128, for tests; None draws it from the operating system's entropy.
    """

    def __init__(self, key: int | None = None):
        self._philox = np.random.Philox(key=secrets.randbits(KEY_BITS) if key is None else key)
        self._numbers = np.random.Generator(self._philox)

    def uniforms(self, count: int) -> np.ndarray:
        """(count,) numbers in [0, 1), in float64: on the grid of float32, a sample rate would be another one."""
        return self._numbers.random(count)

    def integers(self, count: int, *, below: int) -> np.ndarray:
        """(count,) numbers from 0 to `below` - 1."""
        return self._numbers.integers(below, size=count)

    def choose(self, items: np.ndarray, count: int) -> np.ndarray:
        """`count` of the items, without repetition, in their order."""
        return np.sort(self._numbers.choice(items, count, replace=False))

    def fill_normal(self, out: Tensor) -> Tensor:
        """Fill `out` (n,), contiguous float64 on any device, with standard normal numbers."""
        if not has_values(out):
            return out
        if out.device.type != "cpu":
            (seed,) = self._numbers.integers(2**63, size=1)
            return out.normal_(generator=Generator(out.device).manual_seed(int(seed)))
        self._numbers.standard_normal(out=out.numpy())
        return out

    def get_state(self) -> np.ndarray:
        """(WORDS,) uint64: the state, as secret as the numbers."""
        state = self._philox.state
        words = [*state["state"]["counter"], *state["state"]["key"], *state["buffer"]]
        words += [state["buffer_pos"], state["has_uint32"], state["uinteger"]]
        return np.array(words, dtype=np.uint64)

    def set_state(self, words: np.ndarray) -> None:
        """Continue at a state of `get_state`."""
        self._philox.state = {
            "bit_generator": "Philox",
            "state": {"counter": words[:4], "key": words[4:6]},
            "buffer": words[6:10],
            "buffer_pos": int(words[10]),
            "has_uint32": int(words[11]),
            "uinteger": int(words[12]),
        }

    @classmethod
    def at(cls, state: np.ndarray) -> "SecretStream":
        """Another stream at a state of `get_state`."""
        stream = cls(0)
        stream.set_state(state)
        return stream
