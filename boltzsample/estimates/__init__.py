"""Estimates: numbers with error bars and flags, as pure functions of draws and tensors."""

from boltzsample.estimates.diagnostics import numbers
from boltzsample.estimates.expectation import covariance, expectation, probability, sd
from boltzsample.estimates.quantiles import quantile
from boltzsample.estimates.replicates import combine

__all__ = ["combine", "covariance", "expectation", "numbers", "probability", "quantile", "sd"]
