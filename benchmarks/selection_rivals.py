"""Other solvers on the selection problem, each an optional package (``pip install .[solvers]``).

A rival gets the cost, the count and seconds, on one thread, and returns a mask and the lower bound
that it claims (-infinity if it has none). Masks with another number of ones are repaired by the
cheapest single flips; the caller computes what they cost.
"""

from __future__ import annotations

import importlib.util
import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

Solution = tuple[np.ndarray, float]


@dataclass(frozen=True)
class Rival:
    """``package`` is what is imported; ``largest`` the channels up to which it is run."""

    name: str
    package: str
    largest: int
    solve: Callable[[np.ndarray, np.ndarray, int, float], Solution]

    def installed(self) -> bool:
        return importlib.util.find_spec(self.package) is not None


def _repaired(F: np.ndarray, u: np.ndarray, mask: np.ndarray, r: int) -> np.ndarray:
    mask = mask.astype(bool)
    while mask.sum() != r:
        slope = F @ mask - u
        flips = mask if mask.sum() > r else ~mask
        change = 0.5 * np.diagonal(F) + np.where(mask, -slope, slope)
        mask[np.argmin(np.where(flips, change, np.inf))] ^= True
    return mask


def _penalised(F: np.ndarray, u: np.ndarray, r: int, factor: float):
    """The cost plus a penalty on the count, large beside typical changes by single flips."""
    import dimod

    penalty = factor * float(np.median(np.abs(F.sum(axis=1) * r / len(u) - u)))
    products = F / 2 + penalty
    products[np.diag_indices(len(u))] += -u - 2 * penalty * r
    return dimod.BinaryQuadraticModel(products, "BINARY")


def _best_of_penalties(F, u, r, seconds, sample) -> Solution:
    best, least = None, math.inf
    for factor in (1.0, 10.0):
        samples = sample(_penalised(F, u, r, factor), seconds / 2)
        for row in samples.record.sample:
            mask = np.zeros(len(u), bool)
            mask[list(samples.variables)] = row.astype(bool)
            mask = _repaired(F, u, mask, r)
            cost = 0.5 * mask @ F @ mask - u @ mask
            if cost < least:
                best, least = mask, cost
    return best, -math.inf


def _tabu(F: np.ndarray, u: np.ndarray, r: int, seconds: float) -> Solution:
    from dwave.samplers import TabuSampler

    def sample(model, limit):
        return TabuSampler().sample(model, timeout=math.ceil(1e3 * limit), num_reads=1, seed=1)

    return _best_of_penalties(F, u, r, seconds, sample)


def _annealing(F: np.ndarray, u: np.ndarray, r: int, seconds: float) -> Solution:
    from dwave.samplers import SimulatedAnnealingSampler

    def sample(model, limit):
        end = time.monotonic() + limit
        return SimulatedAnnealingSampler().sample(
            model,
            num_reads=10_000,
            num_sweeps=1000,
            seed=1,
            interrupt_function=lambda: time.monotonic() > end,
        )

    return _best_of_penalties(F, u, r, seconds, sample)


def _gurobi(F: np.ndarray, u: np.ndarray, r: int, seconds: float) -> Solution:
    import gurobipy

    quiet = {"OutputFlag": 0, "Threads": 1, "TimeLimit": seconds, "MIPGap": 0}
    with gurobipy.Env(params=quiet) as env, gurobipy.Model(env=env) as model:
        x = model.addMVar(len(u), vtype="B")
        model.addConstr(x.sum() == r)
        model.setObjective(0.5 * (x @ F @ x) - u @ x)
        model.optimize()
        return x.X > 0.5, model.ObjBound


def _scip(F: np.ndarray, u: np.ndarray, r: int, seconds: float) -> Solution:
    from pyscipopt import Model, quicksum

    model = Model()
    model.hideOutput()
    model.setParam("limits/time", seconds)
    x = [model.addVar(vtype="B") for _ in u]
    cost = model.addVar(lb=None)
    model.addCons(quicksum(x) == r)
    products = (
        (0.5 if i == j else 1.0) * F[i, j] * x[i] * x[j]
        for i in range(len(u))
        for j in range(i + 1)
    )
    model.addCons(cost >= quicksum(products) - quicksum(u[i] * x[i] for i in range(len(u))))
    model.setObjective(cost)
    model.optimize()
    best = model.getBestSol()
    mask = np.array([model.getSolVal(best, v) > 0.5 for v in x])
    return _repaired(F, u, mask, r), model.getDualbound()


def _cp_sat(F: np.ndarray, u: np.ndarray, r: int, seconds: float) -> Solution:
    from ortools.sat.python import cp_model

    scale = 1e7 / (np.abs(F).sum() + np.abs(u).sum())
    model = cp_model.CpModel()
    x = [model.new_bool_var(f"x{i}") for i in range(len(u))]
    model.add(sum(x) == r)
    terms = [round(scale * (0.5 * F[i, i] - u[i])) * x[i] for i in range(len(u))]
    for i in range(len(u)):
        for j in range(i):
            both = model.new_bool_var("")
            model.add(both >= x[i] + x[j] - 1)
            model.add_implication(both, x[i])
            model.add_implication(both, x[j])
            terms.append(round(scale * F[i, j]) * both)
    model.minimize(sum(terms))
    solver = cp_model.CpSolver()
    solver.parameters.num_workers = 1
    solver.parameters.max_time_in_seconds = seconds
    solver.solve(model)
    mask = np.array([solver.boolean_value(v) for v in x])
    # Each of the rounded terms errs by a half.
    return mask, (solver.best_objective_bound - 0.5 * len(terms)) / scale


RIVALS = (
    Rival("tabu", "dwave", 2048, _tabu),
    Rival("annealing", "dwave", 512, _annealing),
    Rival("Gurobi", "gurobipy", 200, _gurobi),  # what its size-limited licence allows
    Rival("SCIP", "pyscipopt", 64, _scip),
    Rival("CP-SAT", "ortools", 64, _cp_sat),
)
