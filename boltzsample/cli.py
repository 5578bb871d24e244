"""The command line: `boltzsample sample`, `methods`, `demo`. `--help` imports nothing that is slow to import.

Exit codes: 0 the numbers are ok or come with a caution, 3 they are untrusted, 1 an error (one sentence on stderr),
2 a mistake in the arguments. An exception raised by the user's own code is shown in full.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from boltzsample.results import Result

UNTRUSTED_EXIT = 3

EXAMPLE = """example, with a file density.py that defines log_prob(x) for x of shape (n, dim):

  boltzsample sample density.py:log_prob --dim 10 --n 4000 --seed 0 --out run1
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code.

    >>> main(["methods"])  # doctest: +ELLIPSIS
    method ...
    0
    """
    arguments = parser().parse_args(argv)
    try:
        return int(arguments.run(arguments))
    except UserError as error:
        print(f"boltzsample: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("boltzsample: stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:  # boltzsample methods | head
        sys.stderr.close()
        return 1


class UserError(Exception):
    """Something to be said in one sentence, without a traceback."""


def parser() -> argparse.ArgumentParser:
    """All commands and their arguments."""
    about = "Sample an unnormalized density; get expectations with error bars that hold, or a loud word."
    top = argparse.ArgumentParser("boltzsample", description=about)
    top.add_argument("--version", action="version", version=f"boltzsample {_version()}")
    commands = top.add_subparsers(metavar="COMMAND", required=True)
    raw = argparse.RawDescriptionHelpFormatter
    _sample_arguments(commands.add_parser("sample", help="sample a density defined in a Python file", epilog=EXAMPLE, formatter_class=raw))
    methods = commands.add_parser("methods", help="list the methods: what each needs and promises")
    methods.set_defaults(run=_methods)
    demo = commands.add_parser("demo", help="Bayesian logistic regression on real data, compared with long reference runs")
    demo.add_argument("--out", type=Path, default=Path(), metavar="DIR", help="where to write demo.png (default: here)")
    demo.set_defaults(run=_demo)
    return top


def _sample_arguments(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("density", metavar="FILE:FUNCTION", help="log-density, from points (n, dim) to (n,); or the name of a Target object in FILE")
    add("--dim", type=int, help="number of coordinates (not needed for a Target object)")
    add("--method", default="auto", help="a name from `boltzsample methods` (default: auto)")
    add("--n", type=int, default=4_000, help="draws wanted in all (default: 4000)")
    add("--seed", type=int, help="an integer makes the run repeatable (default: drawn, and recorded)")
    add("--budget", type=_budget, metavar="E|Ss", help="most evaluations (200000), or most seconds (30s)")
    add("--device", help="cpu, cuda, cuda:1, ... (default: cpu)")
    add("--dtype", choices=("float32", "float64"), help="default: float64 on CPU, float32 on CUDA")
    add("--out", type=Path, metavar="DIR", help="save the result there; bz.load reads it, and ArviZ reads its draws.nc")
    add("--json", action="store_true", help="print the summary as JSON")
    command.set_defaults(run=_sample)


def _budget(text: str) -> dict[str, Any]:
    """Keywords of bz.Budget: evaluations, or seconds where the number ends in s."""
    try:
        return {"seconds": float(text[:-1])} if text.endswith("s") else {"evaluations": int(text.replace("_", ""))}
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no budget; write evaluations, as in 200000, or seconds, as in 30s") from None


def _sample(arguments: argparse.Namespace) -> int:
    found = load_object(arguments.density)
    import torch

    from boltzsample.errors import BoltzsampleError
    from boltzsample.run import sample
    from boltzsample.samplers.sampler import Budget
    from boltzsample.storage import check_free

    options = {"n": arguments.n, "seed": arguments.seed, "device": arguments.device}
    options["dtype"] = None if arguments.dtype is None else getattr(torch, arguments.dtype)
    options["budget"] = None if arguments.budget is None else Budget(**arguments.budget)
    try:
        if arguments.out is not None:
            check_free(arguments.out)  # before time is spent
        _known_method(arguments.method)
        result = sample(_target(found, arguments), arguments.method, **options)
        _print(result, arguments.json)
        if arguments.out is not None:
            print(f"saved to {result.save(arguments.out)}", file=sys.stderr)
    except BoltzsampleError as error:
        raise UserError(f"{error.code}: {error}") from error
    except (ValueError, OSError) as error:
        if not _ours(error):
            raise
        raise UserError(str(error)) from error
    return UNTRUSTED_EXIT if result.status == "untrusted" else 0


def _ours(error: BaseException) -> bool:
    """Whether this library raised it on purpose, rather than the user's density or a package below."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and Path(trace.tb_frame.f_code.co_filename).is_relative_to(Path(__file__).parent)


def _print(result: Result, as_json: bool) -> None:
    if as_json:
        import json

        from boltzsample.report import summary_dict

        print(json.dumps(summary_dict(result), indent=1, allow_nan=False))
    else:
        print(result.summary())


def _target(found: Any, arguments: argparse.Namespace) -> Any:
    """A Target object as it is; a function as a Target of `--dim` coordinates."""
    from boltzsample.adapters import from_log_prob

    if hasattr(found, "log_prob") and hasattr(found, "dim"):
        if arguments.dim not in (None, found.dim):
            raise UserError(f"{arguments.density} has dim {found.dim} and --dim says {arguments.dim}; leave --dim out")
        return found
    if not callable(found):
        raise UserError(f"{arguments.density} is of type {type(found).__name__}; name a function or a Target object")
    if arguments.dim is None:
        raise UserError(f"how many coordinates has {arguments.density}? Add --dim D")
    if arguments.dim < 1:
        raise UserError(f"--dim is {arguments.dim}; wanted 1 or more")
    return from_log_prob(found, arguments.dim)


def _known_method(name: str) -> None:
    from boltzsample.registry import METHODS

    if name not in METHODS:
        raise UserError(f"there is no method {name!r}; choose from {', '.join(METHODS)}")


def load_object(where: str) -> Any:
    """What FILE:NAME names, by running FILE. Raises UserError in one sentence; exceptions of FILE itself come through."""
    from importlib.util import module_from_spec, spec_from_file_location

    file, colon, name = where.rpartition(":")
    if not colon or not file or not name.isidentifier():
        raise UserError(f"{where!r} is not FILE:FUNCTION; write for example density.py:log_prob")
    path = Path(file)
    if not path.is_file():
        raise UserError(f"there is no file {file}")
    spec = spec_from_file_location(path.stem if path.stem.isidentifier() else "density", path)
    if spec is None or spec.loader is None:
        raise UserError(f"{file} is not a Python file; its name should end in .py")
    module = module_from_spec(spec)
    sys.path.insert(0, str(path.parent.resolve()))  # as `python FILE` does, so that FILE may import its neighbours
    spec.loader.exec_module(module)
    if not hasattr(module, name):
        functions = [key for key, value in vars(module).items() if callable(value) and getattr(value, "__module__", "") == module.__name__]
        raise UserError(f"{file} defines no {name!r}" + (f"; it defines {', '.join(functions)}" if functions else ""))
    return getattr(module, name)


def _methods(arguments: argparse.Namespace) -> int:
    from boltzsample.registry import METHODS

    lines = [("method", "needs", "draws are", "log Z", "what it is")]
    for name, m in METHODS.items():
        lines.append((name, "gradient" if m.needs_gradient else "log_prob", m.promise, "yes" if m.log_z else "no", m.summary))
    widths = [max(len(line[i]) for line in lines) for i in range(4)]
    for line in lines:
        print("  ".join(word.ljust(width) for word, width in zip(line, widths, strict=False)) + "  " + line[4])
    return 0


def _demo(arguments: argparse.Namespace) -> int:
    from boltzsample.demo import demo
    from targets import problem

    try:
        cancer = problem("cancer")
    except ImportError as error:  # scikit-learn ships the data
        raise UserError(str(error)) from error
    return demo(cancer, arguments.out)


def _version() -> str:
    try:
        return version("boltzsample")
    except PackageNotFoundError:  # run from a checkout
        return "(not installed)"


if __name__ == "__main__":
    sys.exit(main())
