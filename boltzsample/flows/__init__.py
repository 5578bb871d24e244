"""Normalizing flows x = T(z): one pass gives a draw and its log-density.

`flow.py` is the Flow, `base.py` its bases, `layers.py` and `continuous.py` what T is made of, `families.py` the named ones,
`foreign_flows.py` those of zuko and Pyro; `objectives.py`, `fab.py`, `train.py` and `choose.py` fit them to a target.
"""
