"""The rooms of the house: `ast` reads the imports, and a module may import only what stands below it.

Also what may not appear anywhere (pickle, eval, ...) and what `import boltzsample` may not drag in.
"""

from __future__ import annotations

import ast
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# HOUSE.md's list, bottom to top, one room a line. Modules of one room may import each other, but not in a circle.
# Some are not built yet; a module that is missing here fails the test.
ROOMS = """
errors
target
streams
schedules
flags
functionals
gradcheck
preflight
draws
estimates.expectation estimates.evidence estimates.diagnostics estimates.metrics estimates.chains estimates.columns estimates.intervals estimates.tails estimates.far estimates.quantiles estimates.replicates estimates.stationarity estimates.assembly estimates.weighted estimates.ensembles estimates.bridge estimates.bennett
bijections
constraints
maps
views
adapters laws foreign numpy_density jax_density pyro_sites pyro_model
densities mixture
networks
flows.base flows.layers flows.elementary flows.continuous flows.flow flows.families flows.foreign_flows flows.state
direct backend
progress
kernels.kernel kernels.transitions kernels.chains kernels.random_walk kernels.scaling kernels.langevin kernels.hamiltonian kernels.microcanonical kernels.independent kernels.exchange kernels.adapt
ascent
laplace
samplers.sampler samplers.burst samplers.starts samplers.wide_source samplers.warm_up samplers.mcmc samplers.latent samplers.flow_is samplers.weighing samplers.with_flow samplers.gaps samplers.second_look samplers.importance samplers.explore samplers.modes samplers.local samplers.refine samplers.tempered_part samplers.mixture_is samplers.bridged samplers.annealing samplers.cloud samplers.ladder samplers.frozen_smc samplers.smc samplers.ais samplers.replicas samplers.ladder_fit samplers.ladder_trace samplers.tempering samplers.noised samplers.posterior samplers.localized samplers.localized_fit samplers.pool samplers.window samplers.unweighted samplers.localization samplers.walks samplers.slips samplers.rdmc samplers.diffusion samplers.reverse samplers.annealed_langevin samplers.defended samplers.probability_flow samplers.diffusion_pool samplers.diffusion_guide samplers.diffusion_latent samplers.path_bounds scores.objectives scores.pool scores.training scores.model scores samplers.controlled samplers.path_weights flows.objectives flows.fab flows.optimizer flows.look flows.training flows.train flows.choose flows
witnesses
falls locate improper
auto
registry
settings
arviz_bridge
netcdf
results
storage
run imitation
screen
figures
path_plots
plots
report
demo
cli
"""  # noqa: E501
RANK = {name: i for i, line in enumerate(ROOMS.split("\n")) for name in line.split()}
RANK |= {name.split(".")[0]: rank for name, rank in RANK.items()}  # a package's __init__ stands in its room

# (importer, imported) pairs that go up, inside a function only: result.plot(), .save(), .summary() are doors, no part of a computation
UPWARD = {("results", "plots"), ("results", "report"), ("results", "storage")}

MODULES = {
    ".".join(p.relative_to(ROOT / "boltzsample").with_suffix("").parts).removesuffix(".__init__"): p
    for p in sorted((ROOT / "boltzsample").rglob("*.py"))
    if p != ROOT / "boltzsample" / "__init__.py"  # lazy, re-exports from every room
}
SOURCES = sorted(p for room in ("boltzsample", "targets", "benchmarks") for p in (ROOT / room).rglob("*.py"))


def imports(tree: ast.AST, inside: bool = False) -> Iterator[tuple[str, bool]]:
    """(dotted name, is it inside a function) of every import that runs; `if TYPE_CHECKING:` does not run."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, inside) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import; write the full name"
            yield from ((f"{node.module}.{alias.name}", inside) for alias in node.names)
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            yield from (found for branch in node.orelse for found in imports(ast.Module([branch], []), inside))
        else:
            yield from imports(node, inside or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda))


def room_of(name: str) -> str:
    """'boltzsample.kernels.langevin.MALA' -> 'kernels.langevin'; 'boltzsample.sample' -> '' (the package itself)."""
    parts = name.split(".")[1:]
    while parts and ".".join(parts) not in MODULES:
        parts.pop()
    return ".".join(parts)


def inner_imports(module: str) -> set[tuple[str, bool]]:
    found = imports(ast.parse(MODULES[module].read_text()))
    return {(room_of(name), inside) for name, inside in found if name.split(".")[0] == "boltzsample"}


def goes_up(module: str, imported: str, inside: bool) -> bool:
    if imported == "":  # the package itself: only the shell may look at it from outside
        return module != "cli"
    return RANK.get(imported, -1) > RANK[module] and not (inside and (module, imported) in UPWARD)


@pytest.mark.parametrize("module", [m for m in MODULES if m != "__main__"])
def test_imports_go_down_only(module: str) -> None:
    assert module in RANK, f"boltzsample/{module.replace('.', '/')}.py has no room: add it to ROOMS"
    up = {name or "boltzsample" for name, inside in inner_imports(module) if goes_up(module, name, inside)}
    assert not up, f"{module} imports {sorted(up)}, which stand above it"


def test_no_circles() -> None:
    graph = {m: {name for name, inside in inner_imports(m) if name and not inside} - {m} for m in MODULES}
    while free := {m for m, below in graph.items() if not below & graph.keys()}:
        graph = {m: below for m, below in graph.items() if m not in free}
    assert not graph, f"these import each other in a circle: {sorted(graph)}"


def test_nothing_depends_on_targets_but_the_shell() -> None:
    for module, path in MODULES.items():
        for name, inside in imports(ast.parse(path.read_text())):
            assert name.split(".")[0] not in ("benchmarks", "tests"), module
            assert name.split(".")[0] != "targets" or (module == "cli" and inside), module


def test_the_reader_of_imports() -> None:
    code = "import a\nif TYPE_CHECKING:\n    import b\nelse:\n    import c\ndef f():\n    from d import e\nclass C:\n    import g"
    assert set(imports(ast.parse(code))) == {("a", False), ("c", False), ("d.e", True), ("g", False)}


@pytest.mark.parametrize("up", [("target", "draws"), ("kernels.kernel", "samplers.mcmc"), ("samplers.mcmc", "run"), ("draws", "")])
def test_planted_imports_are_found(up: tuple[str, str]) -> None:
    assert goes_up(*up, False) and goes_up(*up, True)
    assert not up[1] or not goes_up(*up[::-1], False)


# ---- what may not appear anywhere ----

FORBIDDEN = {"pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve", "torch.load", "torch.save", "yaml.load", "yaml.unsafe_load"}
BUILTINS = {"eval", "exec", "compile", "__import__"}
PLANTED = """import pickle
from torch import load
torch.load('f')
eval(s)
exec(s)
yaml.load(f)
np.load(f, allow_pickle=True)
from joblib.memory import Memory"""


def offences(code: str) -> list[str]:
    tree = ast.parse(code)
    names = {name for name, _ in imports(tree)}
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    called = {ast.unparse(node.func) for node in calls}
    allow_pickle = {k.arg for node in calls for k in node.keywords if k.arg == "allow_pickle" and ast.unparse(k.value) != "False"}
    return sorted(allow_pickle | called & (FORBIDDEN | BUILTINS) | {n for n in names if {n, n.split(".")[0]} & FORBIDDEN})


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_nothing_is_unpickled_or_evaluated(path: Path) -> None:
    assert not offences(path.read_text())


@pytest.mark.parametrize("code", PLANTED.splitlines())
def test_planted_offences_are_found(code: str) -> None:
    assert offences(code)


def test_harmless_namesakes_pass() -> None:
    assert not offences("model.eval()\ntorch.compile(f)\nspec.loader.exec_module(m)\nnp.load(f, allow_pickle=False)\nyaml.safe_load(f)")


# ---- what an import may not drag in ----

HEAVY = {"torch", "scipy", "arviz", "matplotlib", "pyro", "numpyro", "jax", "sklearn", "xarray", "pandas", "targets"}


def loaded_after(code: str) -> set[str]:
    script = f"{code}\nimport sys\nprint('LOADED', *sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.rpartition("LOADED")[2].split())


def test_importing_boltzsample_is_light() -> None:
    assert not loaded_after("import boltzsample") & HEAVY


HELP = """
import sys
from boltzsample.cli import main
sys.argv = ["boltzsample", "--help"]
try:
    main()
except SystemExit as stop:
    assert not stop.code
"""


def test_help_is_light_and_quick() -> None:
    assert not loaded_after(HELP) & HEAVY
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        loaded_after(HELP)
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.5


def test_sampling_needs_no_plots_or_arviz() -> None:
    assert not loaded_after("import boltzsample as bz\nbz.sample, bz.from_log_prob, bz.Result") & (HEAVY - {"torch", "scipy"})
