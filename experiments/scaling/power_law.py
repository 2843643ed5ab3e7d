"""The law L(N, D) = E + A / N^a + B / D^b (Hoffmann et al. 2022), fitted by least squares.

For given exponents the law is linear in E, A and B, which leaves only the two exponents to search: on a grid
that is drawn in around its best point three times. No start has to be guessed.
"""

from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.float64]

EXPONENTS = (0.02, 1.5)
"""Where exponents are looked for. A fit at one of these ends has not found any."""
MESH = 25


@dataclass(frozen=True)
class Law:
    """Losses in nats per token of N parameters after D tokens."""

    E: float
    A: float
    a: float
    B: float
    b: float

    def loss(self, parameters: Numbers, tokens: Numbers) -> Numbers:
        """Of each pair."""
        return self.E + self.A / parameters**self.a + self.B / tokens**self.b


def fit(parameters: Numbers, tokens: Numbers, losses: Numbers) -> Law:
    """The law that is nearest to the losses, with E, A and B of at least 0."""
    low, high = EXPONENTS
    ends = [(low, high), (low, high)]
    for _ in range(4):
        a, b = (np.linspace(*each, MESH) for each in ends)
        law = _best_of_grid(a, b, parameters, tokens, losses)
        ends = [
            (max(low, best - mesh[1] + mesh[0]), min(high, best + mesh[1] - mesh[0]))
            for best, mesh in ((law.a, a), (law.b, b))
        ]
    return law


def _best_of_grid(a: Numbers, b: Numbers, parameters: Numbers, tokens: Numbers, losses: Numbers) -> Law:
    exponents = np.stack([each.ravel() for each in np.meshgrid(a, b)])  # (2, grid)
    # Divided by their largest, so that the columns are of one size.
    by_size = (parameters / parameters.min()) ** -exponents[0][:, None]  # (grid, points)
    by_tokens = (tokens / tokens.min()) ** -exponents[1][:, None]
    columns = np.stack([np.ones_like(by_size), by_size, by_tokens], axis=-1)  # (grid, points, 3)
    best, least = None, np.inf
    for used in ([0, 1, 2], [1, 2]):  # with E, and with E = 0 for where it would be negative
        chosen = columns[..., used]
        solved = np.linalg.pinv(chosen) @ losses  # (grid, used)
        errors = ((np.einsum("gpu,gu->gp", chosen, solved) - losses) ** 2).sum(axis=1)
        errors[(solved < 0).any(axis=1)] = np.inf
        place = int(errors.argmin())
        if errors[place] < least:
            coefficients = np.zeros(3)
            coefficients[used] = solved[place]
            best, least = (place, coefficients), errors[place]
    if best is None:
        raise ValueError("the losses fall neither with the parameters nor with the tokens")
    place, (irreducible, size, data) = best
    at = {"a": float(exponents[0][place]), "b": float(exponents[1][place])}
    return Law(
        E=float(irreducible),
        A=float(size * parameters.min() ** at["a"]),
        B=float(data * tokens.min() ** at["b"]),
        **at,
    )


def bootstrap(
    parameters: Numbers, tokens: Numbers, losses: Numbers, *, times: int, seed: int = 0
) -> dict[str, tuple[float, float]]:
    """90 % intervals of E and both exponents, from fits to runs resampled with replacement."""
    generator = np.random.default_rng(seed)
    laws = []
    while len(laws) < times:
        drawn = generator.integers(len(losses), size=len(losses))
        if min(len(set(parameters[drawn])), len(set(tokens[drawn]))) < 2:
            continue  # says nothing about an exponent
        try:
            laws.append(asdict(fit(parameters[drawn], tokens[drawn], losses[drawn])))
        except ValueError:
            continue
    return {
        name: tuple(float(end) for end in np.quantile([law[name] for law in laws], (0.05, 0.95)))
        for name in ("E", "a", "b")
    }


def straight_slope(x: Numbers, losses: Numbers) -> float:
    """The exponent of a law without E: minus the slope of a straight line through both logarithms."""
    return float(-np.polyfit(np.log(x), np.log(losses), 1)[0])
