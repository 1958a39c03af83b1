"""Correlated noise: matrix factorisation, for those who cannot sample at random, or who train long.

Training uses sums of the steps so far, A g, where A is the lower triangle of ones. Instead of independent noise, the
steps get

    y = C^-1 z,        z ~ N(0, (sigma C_clip)^2 I) for each step,

so that the noise of one step cancels a part of that of earlier ones. The release g + C^-1 z follows from C g + z, which
is the Gaussian mechanism. Its sensitivity is that of C, also if later gradients depend on earlier outputs (Denisov et
al., NeurIPS 2022). C is a lower triangular Toeplitz matrix with coefficients c_0 = 1, c_1, c_2, ... of at least 0:

    banded         c are the first b coefficients of (1 - x)^(-1/2), the square root of A (Kalinin and Lampert, 2024);
                   y_t = z_t - c_1 y_(t-1) - ... - c_(b-1) y_(t-b+1), for which b - 1 earlier y are kept
    regenerated    C^-1 has b bands d, the first coefficients of (1 - x)^(1/2) (Kalinin et al., 2025);
                   y_t = z_t + d_1 z_(t-1) + ... + d_(b-1) z_(t-b+1): earlier z are drawn again, and nothing is kept

An example that takes part in the steps t_0, t_0 + T, t_0 + 2T, ... changes C g by at most |sum_i c_(t_i)|, the norm of
a sum of columns, because inner products of columns are not negative. It is largest for t_0 = 0.
"""

import numpy as np

NOISES = ("independent", "banded", "regenerated")


def series(noise: str, *, bands: int, steps: int) -> np.ndarray:
    """(steps,): the Toeplitz coefficients c of C; for independent noise, C is the identity."""
    if noise == "banded":
        return _padded(_binomial(-0.5, bands), steps)
    return _inverse(inverse_series(noise, bands=bands, steps=min(bands, steps)), steps)


def inverse_series(noise: str, *, bands: int, steps: int) -> np.ndarray:
    """(steps,): the Toeplitz coefficients d of C^-1."""
    if noise == "regenerated":
        return _padded(_binomial(0.5, bands), steps)
    return _inverse(_binomial(-0.5, bands if noise == "banded" else 1)[:steps], steps)


def sensitivity(noise: str, *, bands: int, steps: int, period: int) -> float:
    """The largest change of C g by one example with gradients of norm 1 in every `period`-th of `steps` steps."""
    column, total = series(noise, bands=bands, steps=steps), np.zeros(steps)
    for start in range(0, steps, period):
        total[start:] += column[: steps - start]
    return float(np.linalg.norm(total))


def error_of_sums(noise: str, *, bands: int, steps: int) -> float:
    """The standard deviation of the noise in the sum of the first t steps (root mean square over t), per coordinate.

    In units of sigma C_clip. It is that of A C^-1, and the error of the weights of plain SGD.
    """
    row = np.cumsum(inverse_series(noise, bands=bands, steps=steps))
    return float(np.sqrt(np.mean(np.cumsum(row**2))))


def _binomial(power: float, count: int) -> np.ndarray:
    """(count,): the coefficients of (1 - x)^power."""
    found = np.ones(count)
    for number in range(1, count):
        found[number] = found[number - 1] * (number - 1 - power) / number
    return found


def _inverse(coefficients: np.ndarray, steps: int) -> np.ndarray:
    """(steps,): the power series 1 / sum_j coefficients[j] x^j, with coefficients[0] = 1."""
    found, later = np.zeros(steps), coefficients[1:]
    found[:1] = 1.0
    for step in range(1, steps):
        past = found[max(0, step - len(later)) : step][::-1]
        found[step] = -(later[: len(past)] @ past)
    return found


def _padded(values: np.ndarray, count: int) -> np.ndarray:
    return np.pad(values[:count], (0, max(0, count - len(values))))
