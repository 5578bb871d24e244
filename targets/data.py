"""Real data, read from packages that ship them and checked by hash: nothing is downloaded, nothing is shipped again."""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from torch import Tensor

BREAST_CANCER_SHA256 = "54cbf95e148c6eed11e8b2ac1637b5f44a8053293412279de71c47b345e9eb50"


def breast_cancer() -> tuple[Tensor, Tensor, tuple[str, ...]]:
    """Features (569, 30), labels (569,) with 1 = benign, and the 30 feature names, from scikit-learn."""
    try:
        from sklearn.datasets import load_breast_cancer
    except ImportError as error:
        raise ImportError(
            "the problem 'cancer' reads its data from scikit-learn; install it with: pip install 'boltzsample[data]'"
        ) from error
    data = load_breast_cancer()
    features = np.ascontiguousarray(data.data, dtype="<f8")
    labels = np.ascontiguousarray(data.target, dtype="<f8")
    check_sha256(np.column_stack([features, labels]), BREAST_CANCER_SHA256, "breast cancer data of scikit-learn")
    return torch.tensor(features), torch.tensor(labels), tuple(str(name) for name in data.feature_names)


def check_sha256(array: np.ndarray, wanted: str, what: str) -> None:
    """Raise ValueError unless the bytes of the float64 array have the hash `wanted`: other data have another truth."""
    found = hashlib.sha256(np.ascontiguousarray(array, dtype="<f8").tobytes()).hexdigest()
    if found != wanted:
        raise ValueError(f"the {what} have sha256 {found}, wanted {wanted}: they changed, so the stored truth does not hold for them")
