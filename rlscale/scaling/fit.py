"""Scaling curves: ScaleRL's sigmoid of reward against compute, its uncertainty, and whether it extrapolates.

    R(C) = R0 + (A - R0) / (1 + (C_mid / C)^B)                              (arXiv:2510.13786, eq. 1)

A is the asymptote, C_mid the compute at which half the way to it is gone, B how steep the way is, R0 the
reward at the start, which is measured and not fitted. C is any cost: GPU-hours, tokens, FLOPs, steps.

The paper (appendix A.5) walks a grid over A and C_mid, fits B by least squares in every cell and keeps the
cell of the smallest squared error. The curve is linear in A, so here the grid runs over C_mid and B, the best
A of a cell has a closed form, and a pattern search ends what the grid began. It is the same minimum, found
for thousands of bootstrap samples by a few matrix products.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

Array = np.ndarray

_POINTS_LEAST = 5  # three parameters, and two points to contradict them
_GRID_MID, _GRID_B = 64, 48
_B_RANGE = (0.1, 32.0)
_MID_BEYOND = 8.0  # the grid of C_mid reaches this factor beyond the computes on both sides
_CHUNK = 512  # bootstrap samples searched at a time
_ROUNDS, _ROUNDS_OF_SAMPLES = 300, 20  # of the pattern search; samples need no more digits than they spread


class FitRefused(ValueError):
    """The data cannot carry a fit; the message says why."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """A number and its 95% bootstrap interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class SigmoidFit:
    """A fitted curve.

    Attributes:
        A, B, C_mid, R0: as in the formula above, C_mid in the unit of the computes.
        samples: [samples, 4], the four parameters of each bootstrap sample in this order.
        rmse: root of the mean squared residual of the fitted points.
        points: how many were fitted.
        compute_range: smallest and largest compute fitted; beyond the second the curve extrapolates.
    """

    A: Estimate
    B: Estimate
    C_mid: Estimate
    R0: Estimate
    samples: Array
    rmse: float
    points: int
    compute_range: tuple[float, float]

    def predict(self, compute: Array | float) -> Array:
        """The curve at these computes."""
        return sigmoid(compute, self.A.value, self.B.value, self.C_mid.value, self.R0.value)

    def band(self, compute: Array, level: float = 0.95) -> tuple[Array, Array]:
        """Pointwise interval of the curve at these computes [points], low and high."""
        a, b, mid, r0 = (column[:, None] for column in self.samples.T)
        curves = sigmoid(np.asarray(compute, dtype=float)[None, :], a, b, mid, r0)
        edge = 50 * (1 - level)
        low, high = np.percentile(curves, [edge, 100 - edge], axis=0)
        return low, high


@dataclass(frozen=True, slots=True)
class PowerLawFit:
    """R(C) = A - D / C^B, which pre-training follows and bounded rewards do not (appendix A.4)."""

    A: float
    B: float
    D: float
    rmse: float

    def predict(self, compute: Array | float) -> Array:
        """The curve at these computes, which must be above 0."""
        return np.asarray(self.A - self.D * np.asarray(compute, dtype=float) ** -self.B)


@dataclass(frozen=True, slots=True)
class Extrapolation:
    """How a fit of the cheaper part of a curve predicted the rest.

    Attributes:
        fit: of the points up to `split`.
        split: compute at which the fitted part ends.
        error: mean over the later points of |predicted - measured|.
        bias: mean over them of predicted - measured.
        inside: fraction of them inside the prediction's 95% band, widened by the residuals' spread.
        power_law: fitted to the same part, and power_law_error: its `error`.
        points: later points compared.
    """

    fit: SigmoidFit
    split: float
    error: float
    bias: float
    inside: float
    power_law: PowerLawFit
    power_law_error: float
    points: int


def sigmoid(
    compute: Array | float, a: Array | float, b: Array | float, mid: Array | float, r0: Array | float
) -> Array:
    """R(C) for broadcastable arguments; compute 0 gives R0."""
    with np.errstate(divide="ignore", over="ignore"):
        share = 1 / (1 + np.exp(-b * (np.log(compute) - np.log(mid))))
    return np.asarray(r0 + (a - r0) * share)


def fit_sigmoid(
    compute: Array,
    reward: Array,
    *,
    seeds: Array | None = None,
    r0: float | None = None,
    skip: float = 0.0,
    samples: int = 1000,
    random_seed: int = 0,
) -> SigmoidFit:
    """Fits the sigmoid by least squares and gives bootstrap intervals of its parameters.

    What is resampled: seeds, where there are several, by random shares that spread a mean as so few do
    (`_shares_of_runs`); prompts, where rewards are given for each, with replacement; where there is neither,
    residuals.

    Few seeds stay few. Where they alone are resampled, intervals are widened for their number (`_widened`):
    in 400 simulations of three seeds, whose A spreads by 0.04 and C_mid by 10%, 93% of the 95% intervals of A
    then hold the truth, and 73% without. Where prompts are resampled too, the luck of a completion counts in
    both, which makes up for it, so these are left: with three seeds on 128 prompts 95% hold it where A
    spreads by 0.06 and C_mid by 20%, 89% where they spread by 0.12 and 30%.

    Args:
        compute: [N], not negative.
        reward: [N], or [N, prompts] with the same prompts at every point. Points that are not finite are left
            out.
        seeds: [N], the run that each point belongs to; None for one run.
        r0: reward at the start; None takes the mean of every seed's first point.
        skip: points of less compute are not fitted (the paper: the first 1,500 of 50,000 GPU-hours), though
            they may give `r0`.
        samples: bootstrap samples.
        random_seed: of the bootstrap.

    Raises:
        FitRefused: fewer than five computes, no rise, or a rise of which the points show less than half or
            only the end.
        ValueError: shapes that do not go together, negative compute.
    """
    points = _Points.of(compute, reward, seeds)
    start = points.rewards[points.first()].mean(axis=0)
    fitted = points.where((points.compute > 0) & (points.compute >= skip))
    if len(np.unique(fitted.compute)) < _POINTS_LEAST:
        raise FitRefused(
            f"{len(np.unique(fitted.compute))} points after the start, at least {_POINTS_LEAST} are needed"
        )

    log_c = np.log(fitted.compute)
    y = fitted.rewards.mean(axis=1)
    base = float(start.mean()) if r0 is None else r0
    best = _search(log_c, y[None], np.array([base]), np.ones((1, len(y))), _ROUNDS)[0]
    a, b, mid = float(best[0]), float(best[1]), float(np.exp(best[2]))
    residuals = y - sigmoid(fitted.compute, a, b, mid, base)
    lowest, highest = float(fitted.compute.min()), float(fitted.compute.max())
    if a <= base:
        raise FitRefused(f"no rise: rewards start at {base:.3f} and do not end higher")

    rng = np.random.default_rng(random_seed)
    drawn_y, drawn_start, weights = _resample(points, fitted, residuals, samples, rng)
    starts = drawn_start if r0 is None else np.full(samples, base)
    found = _search(log_c, drawn_y, starts, weights, _ROUNDS_OF_SAMPLES)
    found[:, 2] = np.exp(found[:, 2])
    parameters = np.column_stack((found, starts))
    gains = sigmoid(highest, *parameters.T) - starts
    if np.percentile(gains, 2.5) <= 0:
        end = sigmoid(highest, a, b, mid, base)
        raise FitRefused(f"no rise beyond the noise: from {base:.3f} to {end:.3f} at the largest compute")
    _require_bracket(mid, found[:, 2], lowest, highest)
    runs, prompts = len(np.unique(points.seeds)), points.rewards.shape[1]
    if runs > 1 and prompts == 1:
        reach = lowest / _MID_BEYOND, highest * _MID_BEYOND
        limits = np.array([(0.0, 1.0), _B_RANGE, reach, (min(0.0, base), max(1.0, base))])
        parameters = _widened(parameters, np.array([a, b, mid, base]), runs, rng).clip(*limits.T)

    low, high = np.percentile(parameters, [2.5, 97.5], axis=0).tolist()
    rmse = float(np.sqrt(np.mean(residuals**2)))
    return SigmoidFit(
        A=Estimate(a, low[0], high[0]),
        B=Estimate(b, low[1], high[1]),
        C_mid=Estimate(mid, low[2], high[2]),
        R0=Estimate(base, low[3], high[3]),
        samples=parameters,
        rmse=rmse,
        points=len(y),
        compute_range=(lowest, highest),
    )


def fit_power_law(compute: Array, reward: Array, *, skip: float = 0.0) -> PowerLawFit:
    """Least squares for R(C) = A - D / C^B with A at most 1 and B above 0.

    Args:
        compute, reward, skip: as in `fit_sigmoid`; points at compute 0 are left out.

    Raises:
        FitRefused: fewer than five computes.
        ValueError: as `fit_sigmoid`.
    """
    points = _Points.of(compute, reward, None)
    points = points.where((points.compute > 0) & (points.compute >= skip))
    if len(np.unique(points.compute)) < _POINTS_LEAST:
        raise FitRefused(f"{len(np.unique(points.compute))} points, at least {_POINTS_LEAST} are needed")
    c, y = points.compute, points.rewards.mean(axis=1)
    scale = c.min()  # (C / scale)^-B stays within floats whatever the unit
    exponents = np.geomspace(0.01, _B_RANGE[1], 2000)
    x = (c / scale)[None, :] ** -exponents[:, None]
    dx, dy = x - x.mean(1, keepdims=True), y - y.mean()
    slope = (dx @ dy) / (dx**2).sum(1)
    level = y.mean() - slope * x.mean(1)
    # Where the best A exceeds 1, the best D for A = 1.
    above = level > 1
    level[above] = 1.0
    slope[above] = ((y - 1) * x[above]).sum(1) / (x[above] ** 2).sum(1)
    errors = ((y - level[:, None] - slope[:, None] * x) ** 2).sum(1)
    i = int(errors.argmin())
    exponent = float(exponents[i])
    rmse = float(np.sqrt(errors[i] / len(y)))
    return PowerLawFit(float(level[i]), exponent, float(-slope[i] * scale**exponent), rmse)


def extrapolate(
    compute: Array,
    reward: Array,
    *,
    seeds: Array | None = None,
    fraction: float = 0.5,
    r0: float | None = None,
    skip: float = 0.0,
    samples: int = 1000,
    random_seed: int = 0,
) -> Extrapolation:
    """Fits the points up to `fraction` of the largest compute and compares the rest with the prediction.

    Args:
        compute, reward, seeds, r0, skip, samples, random_seed: as in `fit_sigmoid`.

    Raises:
        FitRefused: as `fit_sigmoid`, for the first part.
        ValueError: as `fit_sigmoid`.
    """
    points = _Points.of(compute, reward, seeds)
    split = fraction * float(points.compute.max())
    early, late = points.where(points.compute <= split), points.where(points.compute > split)
    fit = fit_sigmoid(
        early.compute,
        early.rewards,
        seeds=early.seeds,
        r0=r0,
        skip=skip,
        samples=samples,
        random_seed=random_seed,
    )
    measured = late.rewards.mean(axis=1)
    off = fit.predict(late.compute) - measured
    low, high = fit.band(late.compute)
    spread = 1.96 * fit.rmse
    power = fit_power_law(early.compute, early.rewards, skip=skip)
    return Extrapolation(
        fit=fit,
        split=split,
        error=float(np.abs(off).mean()),
        bias=float(off.mean()),
        inside=float(np.mean((measured >= low - spread) & (measured <= high + spread))),
        power_law=power,
        power_law_error=float(np.abs(power.predict(late.compute) - measured).mean()),
        points=len(measured),
    )


@dataclass(frozen=True, slots=True)
class _Points:
    """compute [N], rewards [N, prompts] (one column if prompts are not told apart), seeds [N] as 0, 1, ..."""

    compute: Array
    rewards: Array
    seeds: Array

    @classmethod
    def of(cls, compute: Array, reward: Array, seeds: Array | None) -> _Points:
        c, r = np.asarray(compute, dtype=float), np.asarray(reward, dtype=float)
        labels = np.zeros(len(c), dtype=int) if seeds is None else np.asarray(seeds)
        if c.ndim != 1 or r.ndim not in (1, 2) or len(r) != len(c) or labels.shape != c.shape:
            raise ValueError(
                f"compute {c.shape}, reward {r.shape} and seeds {labels.shape} do not go together"
            )
        if not len(c):
            raise FitRefused("no points")
        r = r[:, None] if r.ndim == 1 else r
        finite = np.isfinite(c) & np.isfinite(r).all(axis=1)
        if (c[finite] < 0).any():
            raise ValueError("compute must not be negative")
        if not finite.any():
            raise FitRefused("no points")
        return cls(c[finite], r[finite], np.unique(labels[finite], return_inverse=True)[1])

    def where(self, chosen: Array) -> _Points:
        return _Points(self.compute[chosen], self.rewards[chosen], self.seeds[chosen])

    def first(self) -> Array:
        """Index of each seed's point of least compute."""
        order = np.lexsort((self.compute, self.seeds))
        return order[np.unique(self.seeds[order], return_index=True)[1]]


def _resample(
    points: _Points, fitted: _Points, residuals: Array, samples: int, rng: np.random.Generator
) -> tuple[Array, Array, Array]:
    """Bootstrap samples: rewards [samples, N], starts [samples] and weights of points [samples, N]."""
    runs, prompts = len(np.unique(points.seeds)), points.rewards.shape[1]
    first = points.first()
    if runs == 1 and prompts == 1:
        # Three parameters have bent towards the points: the residuals are that much too small.
        widened = (residuals - residuals.mean()) * np.sqrt(len(residuals) / (len(residuals) - 3))
        centre = fitted.rewards.mean(axis=1) - residuals
        y = centre + rng.choice(widened, size=(samples, len(residuals)))
        start = points.rewards[first].mean() + rng.choice(widened, size=samples)
        return y, start, np.ones_like(y)

    chosen = np.full((samples, prompts), 1.0 / prompts)
    if prompts > 1:
        chosen = rng.multinomial(prompts, np.full(prompts, 1 / prompts), size=samples) / prompts
    by_run = np.ones((samples, runs))
    if runs > 1:
        by_run = runs * _shares_of_runs(runs, samples, rng)
    starts = chosen @ points.rewards[first].T
    start = (starts * by_run[:, points.seeds[first]]).mean(axis=1)
    return chosen @ fitted.rewards.T, start, by_run[:, fitted.seeds]


def _shares_of_runs(runs: int, samples: int, rng: np.random.Generator) -> Array:
    """Random shares [samples, runs], none negative, each row's sum 1, with the variance that makes a weighted
    mean spread as the mean of so few runs does.

    Drawing whole runs with replacement spreads it too little, by (runs - 1) / runs. Dirichlet's shares
    (Rubin, 1981) have a variance of (runs - 1) / (runs alpha + 1) / runs^2, and 1 / runs^2 is wanted: so
    alpha is 1 - 2 / runs, and of two runs one is drawn.
    """
    if runs == 2:
        return rng.multinomial(1, [0.5, 0.5], size=samples).astype(float)
    return rng.dirichlet(np.full(runs, 1 - 2 / runs), size=samples)


def _widened(parameters: Array, centre: Array, runs: int, rng: np.random.Generator) -> Array:
    """Parameters [samples, 4] whose deviations from `centre` [4] are divided by a standard deviation as
    uncertain as that of so few runs, sqrt(chi^2_(runs-1) / (runs - 1)), as Student's t divides a normal
    deviation. B and C_mid deviate by their logarithms.
    """
    factor = np.sqrt((runs - 1) / rng.chisquare(runs - 1, size=(len(parameters), 1)))
    sums, products = [0, 3], [1, 2]
    widened = np.tile(centre, (len(parameters), 1))
    widened[:, sums] += factor * (parameters - centre)[:, sums]
    with np.errstate(over="ignore"):
        widened[:, products] *= (parameters / centre)[:, products] ** factor
    return widened


def _search(log_c: Array, y: Array, r0: Array, weights: Array, rounds: int) -> Array:
    """Least squares of many samples at once.

    Args:
        log_c: [N], logarithms of the computes, the same for all samples.
        y, weights: [samples, N].
        r0: [samples].
        rounds: of the pattern search.

    Returns:
        [samples, 3]: A, B, ln C_mid.
    """
    reach = np.log(_MID_BEYOND)
    mids = np.linspace(log_c.min() - reach, log_c.max() + reach, _GRID_MID)
    log_bs = np.log(np.geomspace(*_B_RANGE, _GRID_B))
    grid_mid, grid_b = (axis.ravel() for axis in np.meshgrid(mids, log_bs, indexing="ij"))
    shares = _share(log_c[:, None], grid_mid, grid_b)  # [N, cells]
    squares = shares**2
    found = np.empty((len(y), 3))
    for i in range(0, len(y), _CHUNK):
        part = slice(i, i + _CHUNK)
        rises, w, start = y[part] - r0[part, None], weights[part], r0[part, None]
        _, errors = _best_asymptote((w * rises) @ shares, w @ squares, start)
        cell = errors.argmin(axis=1)
        centre = np.column_stack((grid_mid[cell], grid_b[cell]))
        grid = np.array([mids[1] - mids[0], log_bs[1] - log_bs[0]])
        found[part] = _polish(log_c, rises, w, start, centre, grid, rounds)
    return found


def _polish(
    log_c: Array, rises: Array, weights: Array, r0: Array, centre: Array, step: Array, rounds: int
) -> Array:
    """Pattern search from each sample's best cell: a move to the best of nine neighbours doubles the steps,
    standing still halves them."""
    neighbours = np.array([(i, j) for i in (0, -1, 1) for j in (0, -1, 1)], dtype=float)
    steps = np.tile(step, (len(centre), 1))
    limits = np.log(_B_RANGE)
    rows = np.arange(len(centre))
    best_a = r0[:, 0]
    for _ in range(rounds):
        trial = centre[:, None, :] + steps[:, None, :] * neighbours  # [samples, 9, 2]
        trial[..., 1] = trial[..., 1].clip(*limits)
        shares = _share(log_c, trial[..., :1], trial[..., 1:])  # [samples, 9, N]
        moments = np.einsum("sn,skn->sk", weights * rises, shares)
        squares = np.einsum("sn,skn->sk", weights, shares**2)
        a, errors = _best_asymptote(moments, squares, r0)
        best = errors.argmin(axis=1)
        centre, best_a = trial[rows, best], a[rows, best]
        steps *= np.where(best == 0, 0.5, 2.0)[:, None]
    return np.column_stack((best_a, np.exp(centre[:, 1]), centre[:, 0]))


def _share(log_c: Array, log_mid: Array, log_b: Array) -> Array:
    """1 / (1 + (C_mid / C)^B)."""
    with np.errstate(over="ignore"):
        return np.asarray(1 / (1 + np.exp(np.exp(log_b) * (log_mid - log_c))))


def _best_asymptote(moments: Array, squares: Array, r0: Array) -> tuple[Array, Array]:
    """The A in [0, 1] that minimises sum w (rise - (A - R0) share)^2, and that sum less sum w rise^2.

    Args:
        moments: sum w rise share. squares: sum w share^2, of the same shape. r0: broadcastable.
    """
    gain = moments / np.maximum(squares, 1e-12)
    a = (r0 + gain).clip(0.0, 1.0)
    gain = a - r0
    return a, gain**2 * squares - 2 * gain * moments


def _require_bracket(mid: float, mids: Array, lowest: float, highest: float) -> None:
    """Refuses a midpoint outside the computes, of the fit or of more than half its bootstrap samples."""
    if mid >= highest or np.mean(mids >= highest) > 0.5:
        raise FitRefused(
            f"asymptote not bracketed: the largest compute, {highest:.4g}, is short of the midpoint, "
            f"{mid:.4g}, so the points show less than half of the rise"
        )
    if mid <= lowest or np.mean(mids <= lowest) > 0.5:
        raise FitRefused(
            f"midpoint not bracketed: half of the rise is over at {mid:.4g}, before the first point at "
            f"{lowest:.4g}"
        )
