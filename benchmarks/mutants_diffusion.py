"""Planted errors of the diffusion: (name, file, old, new, tests); mutants.py plants them."""

# ruff: noqa: E501  (one mutant a line)

REVERSE, SCORES, FLOW, WHOLE = "tests/test_reverse.py", "tests/test_scores.py", "tests/test_probability_flow.py", "tests/test_diffusion.py"
KERNELS, DEFENSE, OBJECTIVES = "samplers/reverse.py", "samplers/defended.py", "scores/objectives.py"

PLANTED: tuple[tuple[str, str, str, str, tuple[str, ...]], ...] = (
    ("ancestral: C^2 dropped", KERNELS, "C.square() * eye + B.square()", "1e-6 * eye + B.square()", (REVERSE,)),
    ("ancestral: B for B^2", KERNELS, "C.square() * eye + B.square()", "C.square() * eye + B", (REVERSE,)),
    ("correlated: the determinant dropped", KERNELS, " - L.diagonal(dim1=-2, dim2=-1).log().sum(-1)", "", (REVERSE,)),
    ("Euler: the linear drift dropped", KERNELS, "(1 - a.log()) * x", "x", (REVERSE,)),
    ("exponential: half the score", KERNELS, "2 * c.square() / (a", "c.square() / (a", (REVERSE,)),
    ("corrector: noise sqrt(h)", KERNELS, "(2 * h).sqrt())", "h.sqrt())", (REVERSE,)),
    ("score: alpha forgotten", KERNELS, "(alpha * denoiser(x / alpha, sigma / alpha).mean - x)", "(denoiser(x / alpha, sigma / alpha).mean - x)", (REVERSE,)),
    ("defense: its share left out of the weight", DEFENSE, "math.log1p(-share) - log_ratio", "-log_ratio", (REVERSE,)),
    ("defense: the wide law weighed by one", DEFENSE, "math.log(share) + wide", "wide", (REVERSE,)),
    ("target score: s for s^2", OBJECTIVES, "batch.x + batch.s.square()[:, None] * batch.grad", "batch.x + batch.s[:, None] * batch.grad", (SCORES,)),
    ("mix: k of the wrong sign", OBJECTIVES, "k = -(S * (T - S))", "k = (S * (T - S))", (SCORES,)),
    ("sliced: the half forgotten", OBJECTIVES, "(batch.v * score).sum(-1).square() / 2", "(batch.v * score).sum(-1).square()", (SCORES,)),
    ("spread: the determinant dropped", OBJECTIVES, "0.5 * (away / seen.factor).square().sum(-1) + seen.factor.log().sum(-1)", "0.5 * (away / seen.factor).square().sum(-1)", (SCORES,)),
    ("held out: places of particles that train", "scores/pool.py", "self[(~held).nonzero()[:, 0]]", "self[torch.arange(len(held))]", (SCORES,)),
    ("probability flow: the log-det subtracted", "samplers/probability_flow.py", "total = log_det - start.log_prob(y)", "total = -log_det - start.log_prob(y)", (FLOW,)),
    ("probability flow: a stage of Runge and Kutta halved", "samplers/probability_flow.py", "y4 = y + h * three", "y4 = y + h / 2 * three", (FLOW,)),
    ("diffusion: the map's log-det forgotten", "samplers/diffusion.py", "-(log_ratio + log_det.double())", "-log_ratio", (WHOLE,)),
    ("diffusion: bare draws unflagged", "samplers/diffusion.py", 'flags += [flag("PATH_WEIGHT_MISSING")] if bare else []', "flags += []", (WHOLE,)),
)
