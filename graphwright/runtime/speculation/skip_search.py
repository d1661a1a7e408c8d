"""Search for the set of layers whose absence changes least, by noisy scores of one set at a time."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch

#: Of the sets near the best one, how many the model of the layers' effects chooses among.
_CHOICES = 16
#: Variance of a layer's effect on the score before anything is known, relative to the noise of a score.
_PRIOR = 1.0


class SkipSearch:
    """Proposes sets of one size, and learns from their scores.

    By turns, a set is a random change of the best one, or of several such changes the one whose score, drawn
    from the posterior of a linear model with an effect for each layer, is highest (Thompson sampling).

    Args:
        layers: to choose from.
        first: the set to begin with.
        rng: random choices.
        patience: sets in a row without improvement that end the search.
        enough: score that ends it at once.

    Attributes:
        current: the set to try next; when the search is over, the best one.
        best: the best one so far.
        score: of the best one.
        is_over: whether the search has ended.
    """

    def __init__(
        self,
        layers: Sequence[int],
        first: frozenset[int],
        rng: random.Random,
        *,
        patience: int,
        enough: float,
    ) -> None:
        self._layers, self._rng, self._patience, self._enough = list(layers), rng, patience, enough
        self.current = self.best = first
        self._restart()

    def _restart(self) -> None:
        self.score, self.is_over, self._since, self._seen = -1.0, False, 0, 0
        size = len(self._layers)
        # Posterior of the effects: precision matrix, and sum of features times scores.
        self._precision = torch.eye(size, dtype=torch.float64) / _PRIOR
        self._weighted = torch.zeros(size, dtype=torch.float64)
        self._mean_score = 0.0

    def judge(self, score: float) -> None:
        """The current set scored ``score`` in 0..1; move on to the next one."""
        self._learn(score)
        if score > self.score:
            self.best, self.score, self._since = self.current, score, 0
        else:
            self._since += 1
        only = len(self.best) == len(self._layers)
        self.is_over = only or score >= self._enough or self._since >= self._patience
        self.current = self.best if self.is_over else self._propose()

    def watch(self, score: float, drop: float) -> None:
        """The best set, in use, scored ``score``: search again if that is much less than in the search."""
        if score < self.score * (1 - drop):
            first = self.best
            self._restart()
            self.current = self.best = first

    def _propose(self) -> frozenset[int]:
        if self._seen % 2:
            return self._changed()
        choices = [self._changed() for _ in range(_CHOICES)]
        effects = self._drawn_effects()
        return max(choices, key=lambda choice: float(self._features(choice) @ effects))

    def _changed(self) -> frozenset[int]:
        """The best set with one or two of its layers exchanged for others."""
        inside = sorted(self.best)
        outside = [layer for layer in self._layers if layer not in self.best]
        swaps = min(self._rng.randint(1, 2), len(inside), len(outside))
        return (self.best - set(self._rng.sample(inside, swaps))) | set(self._rng.sample(outside, swaps))

    def _features(self, chosen: frozenset[int]) -> torch.Tensor:
        return torch.tensor([float(layer in chosen) for layer in self._layers], dtype=torch.float64)

    def _learn(self, score: float) -> None:
        features = self._features(self.current)
        self._seen += 1
        self._mean_score += (score - self._mean_score) / self._seen
        self._precision += torch.outer(features, features)
        self._weighted += features * (score - self._mean_score)

    def _drawn_effects(self) -> torch.Tensor:
        """Effects drawn from their posterior, a normal distribution."""
        covariance = torch.linalg.inv(self._precision)
        noise = torch.tensor([self._rng.gauss(0, 1) for _ in self._layers], dtype=torch.float64)
        # Scores vary by about a tenth between trials of one set.
        return covariance @ self._weighted + 0.1 * (torch.linalg.cholesky(covariance) @ noise)
