"""Markov transition kernels: one file per family, each with its algorithm on top."""

from boltzsample.kernels.hamiltonian import HMC
from boltzsample.kernels.independent import Independent, LocalThenIndependent
from boltzsample.kernels.kernel import ChainState, Kernel, Noise, PointState, StepInfo, metropolis
from boltzsample.kernels.langevin import MALA, ULA
from boltzsample.kernels.random_walk import RandomWalk
from boltzsample.kernels.scaling import Scaling

__all__ = [
    "HMC", "MALA", "ULA", "ChainState", "Independent", "Kernel", "LocalThenIndependent", "Noise", "PointState", "RandomWalk", "Scaling",
    "StepInfo", "metropolis",
]
