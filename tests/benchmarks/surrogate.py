"""A model of the ground truth that answers for every legal shape, as NAS-Bench-301 does for its cells (arXiv 2008.09777).

The table of stories260K knows some 75 frames of a coarse grid, each with the widest MLP that fits, and shapes drawn from the fine space beside it. Log KL
without training, at the rungs and finally is a vector for each shape; its principal components are Gaussian processes over the shape (as Higdon et al.,
JASA 2008, model a computer code with many outputs), so that what a shape does between rungs stays together. A search is not replayed on the mean, which is
smoother than the truth, but on draws of the posterior: landscapes that go through what was measured and are between as rough as the data are.

What it cannot show: anything that only shapes unlike all that were trained would do, and any other teacher.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cho_factor, cho_solve
from scipy.stats import kendalltau
from sklearn.exceptions import ConvergenceWarning
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import RBF, ConstantKernel, DotProduct, Kernel, WhiteKernel

from nas.shape import Shape
from nas.space import SearchSpace
from tests.benchmarks.ground_truth import GRIDS, read_blocks, read_rows
from tests.benchmarks.replay import NUM_DOCUMENTS, Chance
from tests.benchmarks.truth import read_truths

TEACHER = "stories260K"
TOKENS = (0, 6_250, 25_000, 100_000, 1_000_000)
"""The rungs of a search with the default factor, and the final result."""
NEIGHBOURS = 8
"""A shape's documents differ from its mean as those of one of so many measured shapes that are nearest."""
JITTER = 1e-8

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Measured:
    """What is known of shapes, in log KL."""

    shapes: tuple[Shape, ...]
    is_on_grid: NDArray[np.bool_]
    log_kl: Floats
    """[S, TOKENS]: the rungs on the blocks that a search sees, the last on the others."""
    patterns: Floats
    """[S, TOKENS, blocks] KL of a block over the mean of the shape's, on the blocks that a search sees."""
    seed_sd: Floats
    """[TOKENS] relative standard deviation of KL between training seeds."""
    final_error: float
    """Standard error of the best final KL, relative: documents and seeds."""

    def only(self, which: NDArray[np.bool_]) -> Measured:
        """Some of the shapes."""
        shapes = tuple(shape for shape, kept in zip(self.shapes, which, strict=True) if kept)
        return Measured(
            shapes=shapes,
            is_on_grid=self.is_on_grid[which],
            log_kl=self.log_kl[which],
            patterns=self.patterns[which],
            seed_sd=self.seed_sd,
            final_error=self.final_error,
        )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Component:
    """One principal component of the log KL at all points, as a Gaussian process over standardised features."""

    direction: Floats
    """[TOKENS]"""
    mean: float
    scale: float
    smooth: Kernel
    """Without its noise, of scores that are standardised."""
    noise: float
    """Variance of what is not smooth, of standardised scores."""
    scores: Floats
    """[S] standardised."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Surrogate:
    """Gaussian processes fitted to what was measured."""

    measured: Measured
    centre: Floats
    """[TOKENS] mean log KL."""
    components: tuple[Component, ...]

    def predict(self, shapes: Sequence[Shape]) -> tuple[Floats, Floats]:
        """(mean, standard deviation) of log KL [S, TOKENS] of one training run of each shape."""
        known, asked = features(self.measured.shapes), features(shapes)
        mean, variance = np.tile(self.centre, (len(shapes), 1)), np.zeros((len(shapes), len(TOKENS)))
        for component in self.components:
            posterior, spread = _posterior(component, known=known, asked=asked)
            mean += np.outer(component.mean + component.scale * posterior, component.direction)
            variance += np.outer((np.diag(spread) + component.noise) * component.scale**2, component.direction**2)
        return mean, np.sqrt(variance)

    def draws(self, shapes: Sequence[Shape], *, number: int, seed: int) -> Floats:
        """[number, S, TOKENS] log KL of landscapes as the data allow them, without what a seed of the training adds."""
        known, asked = features(self.measured.shapes), features(shapes)
        generator = np.random.default_rng(seed)
        drawn = np.tile(self.centre, (number, len(shapes), 1))
        for component in self.components:
            posterior, spread = _posterior(component, known=known, asked=asked)
            spread[np.diag_indices_from(spread)] += JITTER
            root = np.linalg.cholesky(spread)
            # Of what is not smooth, seeds explain a part, which every replay draws anew; the rest is the shape's own.
            of_seeds = float((component.direction**2) @ self.measured.seed_sd**2) / component.scale**2
            rough = np.sqrt(max(component.noise - of_seeds, 0.0)) * generator.standard_normal((len(shapes), number))
            scores = posterior[:, None] + root @ generator.standard_normal((len(shapes), number)) + rough
            drawn += (component.mean + component.scale * scores.T)[:, :, None] * component.direction
        return drawn


def features(shapes: Sequence[Shape]) -> Floats:
    """[S, 5] layers, and binary logarithms of the widths."""
    rows = [(shape.hidden_size, shape.intermediate_size, shape.num_attention_heads, shape.num_key_value_heads) for shape in shapes]
    return np.column_stack([[shape.num_hidden_layers for shape in shapes], np.log2(rows)])


def read_measured() -> Measured:
    """All of the teacher's shapes that have every point, on and off the grids."""
    rows, blocks = read_rows(), read_blocks()
    truths = [truth for truth in read_truths() if truth.grid.teacher == TEACHER]
    finals = {shape.key: float(final) for truth in truths for shape, final in zip(truth.shapes, truth.final, strict=True)}
    shapes, log_kl, patterns, on_grid = [], [], [], []
    known: set[str] = set()
    for row in rows:
        if row.cell.teacher != TEACHER or row.cell.seed or row.cell.shape in known or not set(TOKENS) <= set(row.tokens):
            continue
        known.add(row.cell.shape)
        points = [row.tokens.index(tokens) for tokens in TOKENS]
        kl = blocks[row.cell.key][points].astype(np.float64)
        seen = kl[:, : kl.shape[1] // 2]
        final = finals.get(row.cell.shape, float(kl[-1, kl.shape[1] // 2 :].mean()))
        shapes.append(Shape.from_key(row.cell.shape))
        on_grid.append(row.cell.shape in finals)
        log_kl.append(np.log([*seen[:-1].mean(axis=1), final]))
        patterns.append(seen / seen.mean(axis=1, keepdims=True))
    first = truths[0]
    spread = np.array([first.seed_sd(tokens) if tokens else 0.0 for tokens in TOKENS])
    best = first.final.argmin()
    return Measured(
        shapes=tuple(shapes),
        is_on_grid=np.array(on_grid),
        log_kl=np.array(log_kl),
        patterns=np.array(patterns),
        seed_sd=spread,
        final_error=float(first.final_error()[best] / first.final[best]),
    )


def fit(measured: Measured) -> Surrogate:
    """By maximum likelihood."""
    centre = measured.log_kl.mean(axis=0)
    _, _, directions = np.linalg.svd(measured.log_kl - centre, full_matrices=False)
    inputs = features(measured.shapes)
    components = []
    for direction in directions:
        raw = (measured.log_kl - centre) @ direction
        mean, scale = float(raw.mean()), float(raw.std())
        scores = (raw - mean) / scale
        kernel = ConstantKernel(0.1) * DotProduct(1.0) + ConstantKernel(1.0) * RBF(np.full(inputs.shape[1], 2.0), (0.2, 50.0)) + WhiteKernel(0.01, (1e-6, 2.0))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # a dimension that says nothing ends at its bound
            fitted = GaussianProcessRegressor(kernel).fit(_standardised(inputs, like=inputs), scores).kernel_
        components.append(Component(direction=direction, mean=mean, scale=scale, smooth=fitted.k1, noise=float(fitted.k2.noise_level), scores=scores))
    return Surrogate(measured=measured, centre=centre, components=tuple(components))


def _standardised(inputs: Floats, *, like: Floats) -> Floats:
    return (inputs - like.mean(axis=0)) / like.std(axis=0)


def _posterior(component: Component, *, known: Floats, asked: Floats) -> tuple[Floats, Floats]:
    """(mean [S], covariance [S, S]) of the smooth part of the standardised scores."""
    at, here = _standardised(known, like=known), _standardised(asked, like=known)
    factor = cho_factor(component.smooth(at) + (component.noise + JITTER) * np.eye(len(at)))
    across = component.smooth(here, at)
    return across @ cho_solve(factor, component.scores), component.smooth(here) - across @ cho_solve(factor, across.T)


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """The surrogate against results that it was not fitted to."""

    rmse: tuple[float, ...]
    """Of log KL, at TOKENS."""
    tau: tuple[float, ...]
    """Kendall's tau-b, at TOKENS."""
    calibration: float
    """Root mean square of the final error over the standard deviation that was claimed: 1 where it knows what it does not know."""
    num_shapes: int


def leave_one_out(measured: Measured, *, surrogate: Surrogate) -> tuple[Floats, Floats]:
    """(mean, standard deviation) of log KL [S, TOKENS], each shape predicted from the others; the kernels are those fitted to all."""
    known = _standardised(features(measured.shapes), like=features(measured.shapes))
    mean, variance = np.tile(surrogate.centre, (len(known), 1)), np.zeros_like(measured.log_kl)
    for component in surrogate.components:
        inverse = np.linalg.inv(component.smooth(known) + (component.noise + JITTER) * np.eye(len(known)))
        left = component.scores - (inverse @ component.scores) / np.diag(inverse)
        mean += np.outer(component.mean + component.scale * left, component.direction)
        variance += np.outer(component.scale**2 / np.diag(inverse), component.direction**2)
    return mean, np.sqrt(variance)


def judge(mean: Floats, spread: Floats, *, log_kl: Floats) -> Check:
    """Predictions of one run each against what it came to."""
    errors = mean - log_kl
    return Check(
        rmse=tuple(np.sqrt((errors**2).mean(axis=0)).tolist()),
        tau=tuple(float(kendalltau(mean[:, point], log_kl[:, point]).statistic) for point in range(len(TOKENS))),
        calibration=float(np.sqrt(((errors / spread)[:, -1] ** 2).mean())),
        num_shapes=len(log_kl),
    )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Landscape:
    """A draw of the surrogate over a whole space: what `replay.Replay` reads instead of training."""

    shapes: tuple[Shape, ...]
    parameters: NDArray[np.int64]
    tokens: tuple[int, ...]
    log_kl: Floats
    """[S, TOKENS]"""
    final_error: float

    def regret(self, shape: int) -> float:
        """Final KL above the best shape's, in standard errors of the best shape's."""
        final = np.exp(self.log_kl[:, -1])
        return float((final[shape] - final.min()) / (self.final_error * final.min()))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Field:
    """A fine space, and landscapes over it."""

    space: SearchSpace
    shapes: tuple[Shape, ...]
    """The legal ones and the anchors."""
    parameters: NDArray[np.int64]
    landscapes: tuple[Landscape, ...]
    surrogate: Surrogate
    patterns: NDArray[np.int64]
    """[landscapes, S] index of the measured shape whose documents it takes after."""

    def chance(self, number: int, *, seed: int) -> Chance:
        """What chance decides in one replay on a landscape: blocks, training seeds, workers."""
        generator, measured = np.random.default_rng([seed, 7]), self.surrogate.measured
        num_blocks = measured.patterns.shape[2]
        drawn = generator.integers(num_blocks, size=num_blocks - num_blocks % NUM_DOCUMENTS)
        patterns = measured.patterns[:, :, drawn].reshape(len(measured.shapes), len(TOKENS), NUM_DOCUMENTS, -1).mean(axis=-1)
        levels = self.landscapes[number].log_kl + measured.seed_sd * generator.standard_normal((len(self.shapes), len(TOKENS)))
        return Chance(seed=seed, documents=np.exp(levels)[:, :, None] * patterns[self.patterns[number]], parallel=int(generator.integers(1, 9)))


class KnownSpace(SearchSpace):
    """A space without anchors that have fewer layers than any measured shape."""

    def __init__(self, whole: SearchSpace, *, min_layers: int) -> None:
        self.__dict__.update(whole.__dict__)
        self._known = {name: shape for name, shape in whole.anchors().items() if shape.num_hidden_layers >= min_layers}

    def anchors(self) -> dict[str, Shape]:
        """Those that the surrogate can answer for."""
        return self._known


def fine_space(max_fraction: float) -> SearchSpace:
    """Every legal shape of the teacher under one of the grids' budgets."""
    return next(grid for grid in GRIDS if (grid.teacher, grid.max_fraction) == (TEACHER, max_fraction)).fine_space()


def make_field(whole: SearchSpace, *, num_landscapes: int, surrogate: Surrogate, seed: int = 0) -> Field:
    """Landscapes over a space."""
    measured = surrogate.measured
    space = KnownSpace(whole, min_layers=min(shape.num_hidden_layers for shape in measured.shapes))
    legal = list(space.shapes())
    shapes = (*legal, *(shape for shape in space.anchors().values() if shape not in set(legal)))
    parameters = np.array([space.parameters(shape) for shape in shapes])
    draws = surrogate.draws(shapes, number=num_landscapes, seed=seed)
    own = features(measured.shapes)
    known, asked = _standardised(own, like=own), _standardised(features(shapes), like=own)
    nearest = ((asked[:, None, :] - known[None, :, :]) ** 2).sum(axis=-1).argsort(axis=1)[:, :NEIGHBOURS]
    chosen = np.random.default_rng([seed, 1]).integers(NEIGHBOURS, size=(num_landscapes, len(shapes)))
    return Field(
        space=space,
        shapes=shapes,
        parameters=parameters,
        landscapes=tuple(Landscape(shapes=shapes, parameters=parameters, tokens=TOKENS, log_kl=log_kl, final_error=measured.final_error) for log_kl in draws),
        surrogate=surrogate,
        patterns=np.take_along_axis(np.broadcast_to(nearest, (num_landscapes, *nearest.shape)), chosen[:, :, None], axis=2)[:, :, 0],
    )
