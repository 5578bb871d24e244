"""Normalizing flows x = T(z): one pass gives a draw and its log-density.

`flow.py` is the Flow, `base.py` its bases, `layers.py` and `continuous.py` what T is made of, `families.py` the named ones,
`foreign_flows.py` those of zuko and Pyro; `objectives.py`, `fab.py`, `train.py` and `choose.py` fit them to a target.
"""

from torch.distributions import Distribution

_validates = Distribution._validate_args
import zuko as zuko  # noqa: E402  (its import switches the argument checks of torch.distributions off for the whole process)

Distribution.set_default_validate_args(_validates)
