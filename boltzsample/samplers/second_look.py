"""What a second look says: an estimate of log Z beside that of another SMC run, and two looks as one."""

from __future__ import annotations

import math
from dataclasses import replace

from boltzsample.draws import Estimate
from boltzsample.flags import flag
from boltzsample.samplers.frozen_smc import Annealed
from boltzsample.samplers.sampler import Verdict, no_look

CONFLICT = 4.0  # joint standard errors


def against(estimate: Estimate, smc: Annealed | None, where: str = "in the latent space") -> Verdict:
    """An estimate of log Z judged by an SMC run. A lost share m of the mass is a deficit of -log(1 - m) nats: four joint errors see it.

    SINGLE_WITNESS where SMC could not look. Where it would not have seen a fifth of the mass missing it is no witness of its own (TRUST.md,
    the witness rule): then the optimum audit must be one.
    """
    distance = None if smc is None else smc.apart(float(estimate.value), float(estimate.stderr))
    if smc is None or distance is None:
        why = "needs a gradient" if smc is None else "was cut short, or has no error bar"
        return no_look(f"SMC {where} {why}")
    said = f"SMC {where}: log Z {smc.log_z:.3f} +- {2 * smc.stderr:.3f}"
    if distance > CONFLICT:
        detail = f"{said} against {float(estimate.value):.3f} +- {2 * float(estimate.stderr):.3f}"
        return Verdict((flag("WITNESS_CONFLICT", value=distance, threshold=CONFLICT, detail=detail),))
    sees = -math.expm1(-CONFLICT * math.hypot(smc.stderr, float(estimate.stderr)))
    said += f", would have seen a missing mass of {sees:.0%}"
    return Verdict((), said, sees=sees)


def both(first: Verdict, second: Verdict) -> Verdict:
    """One verdict of two looks; whether it could look, and what it sees missing, are the first one's."""
    said = "; ".join(v.sentence for v in (first, second) if v.sentence)
    return replace(first, flags=first.flags + second.flags, sentence=said or None)
