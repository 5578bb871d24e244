"""One torch thread per test process (two processes share two cores), and plots that need no screen."""

import os

import torch

os.environ.setdefault("MPLBACKEND", "Agg")
torch.set_num_threads(1)
