"""`python -m benchmarks COMMAND`: run and table (problem x method x score), posteriors (beside NUTS), neutra (beside NeuTra), court
(do the error bars hold?), evidence (log Z over seeds), collapse (flows that look fine and are wrong), moments (intervals where f has
few of them), localization (slips and rdmc beside their rivals), mutants (would the tests notice?), kernels and flows (how fast?)."""

from __future__ import annotations

import argparse
import sys

from benchmarks import (
    collapse,
    court,
    diffusion,
    evidence,
    flows,
    kernels,
    localization,
    moments,
    mutants,
    neutra,
    posteriors,
    suite,
    weights,
)


def main(argv: list[str] | None = None) -> int:
    """The exit code: 0 where everything holds."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    honesty = (court, evidence, collapse, moments, weights)
    for module in (suite, posteriors, neutra, *honesty, localization, diffusion, mutants, kernels, flows):
        module.add_command(commands)
    args = parser.parse_args(argv)
    run = args.run
    return int(run(args))


if __name__ == "__main__":
    sys.exit(main())
