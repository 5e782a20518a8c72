"""The channel selection solver against brute force, its own definition and known optima."""

from __future__ import annotations

import itertools
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from ccp_ext import _solver
from ccp_ext.errors import InputError
from ccp_ext.selection import Choice, random_subset, select

HEURISTICS = ("greedy", "swap")


def low_rank(rng, c):
    q = rng.normal(size=(max(1, c // 3), c))
    return q.T @ q, rng.normal(size=c)


def diagonal(rng, c):
    return np.diag(rng.normal(size=c)), rng.normal(size=c)


def zero(rng, c):
    return np.zeros((c, c)), np.zeros(c)


def duplicates(rng, c):
    source = rng.integers(0, max(1, c // 2), size=c)
    q = rng.integers(-2, 3, size=(4, c)).astype(float)[:, source]
    return q.T @ q, rng.integers(-2, 3, size=c).astype(float)[source]


def indefinite(rng, c):
    a = rng.normal(size=(c, c))
    return a + a.T, rng.normal(size=c)


def mixed_scales(rng, c):
    scale = 10.0 ** rng.uniform(-3, 3, size=c)
    a = rng.normal(size=(c, c))
    return (a + a.T) * np.outer(scale, scale), scale * rng.normal(size=c)


KINDS = (low_rank, diagonal, zero, duplicates, indefinite, mixed_scales)


def instances(kind, count=40, largest=10):
    rng = np.random.default_rng(KINDS.index(kind))
    for k in range(count):
        yield kind(rng, 1 + k % largest)
    yield kind(rng, 12)


def definition(S, u, mask):
    m = np.asarray(mask, dtype=float)
    return 0.5 * m @ S @ m - u @ m


class BruteForce:
    """Every mask in the order in which, at equal counts, the first sorted index tuple is first."""

    def __init__(self, S, u):
        self.masks = np.array(list(itertools.product((1.0, 0.0), repeat=len(u))))
        self.ones = self.masks.sum(axis=1)
        self.costs = 0.5 * ((self.masks @ S) * self.masks).sum(axis=1) - self.masks @ u
        self.rounding = 1e-13 * (np.abs(S).sum() + np.abs(u).sum())

    def least(self, r):
        return self.costs[self.ones == r].min()

    def first(self, r):
        costs = self.costs[self.ones == r]
        return self.masks[self.ones == r][np.argmax(costs == costs.min())].astype(bool)


@pytest.mark.parametrize("kind", KINDS)
def test_auto_is_optimal_on_every_small_instance(kind):
    for S, u in instances(kind):
        brute = BruteForce(S, u)
        for r in range(len(u) + 1):
            choice = select(S, u=u, r=r)
            assert (choice.status, choice.method) == ("optimal", "exact")
            assert choice.removed.sum() == r
            assert choice.objective == pytest.approx(brute.least(r), abs=brute.rounding)
            assert choice.lower_bound == choice.objective


@pytest.mark.parametrize("kind", [duplicates, zero])
def test_exact_returns_the_lexicographically_first_of_equal_optima(kind):
    for S, u in instances(kind):  # integers: the brute force has no rounding
        brute = BruteForce(S, u)
        for r in range(len(u) + 1):
            assert select(S, u=u, r=r).removed.tolist() == brute.first(r).tolist()


def test_exact_counts_costs_as_equal_that_differ_by_rounding_only():
    u = np.array([0.3, 0.0, 0.1, 0.2])  # 0.1 + 0.2 exceeds 0.3 in binary
    S = np.zeros((4, 4))
    S[:2, 2:] = S[2:, :2] = 1.0
    assert definition(S, u, [0, 0, 1, 1]) < definition(S, u, [1, 1, 0, 0])
    assert select(S, u=u, r=2).removed.tolist() == [True, True, False, False]


@pytest.mark.parametrize("kind", KINDS)
def test_enumeration_is_optimal_without_the_diagonal_shortcut(kind):
    for S, u in instances(kind):
        brute = BruteForce(S, u)
        for r in range(len(u) + 1):
            mask = _solver.enumerate(S, u, r)
            assert mask.sum() == r
            assert definition(S, u, mask) == pytest.approx(brute.least(r), abs=brute.rounding)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", HEURISTICS)
def test_heuristics_return_r_channels_and_a_bound_below_the_optimum(kind, method):
    for S, u in instances(kind):
        brute = BruteForce(S, u)
        for r in range(len(u) + 1):
            choice = select(S, u=u, r=r, method=method)
            assert (choice.status, choice.method) == ("heuristic", method)
            assert choice.removed.dtype == torch.bool and choice.removed.sum() == r
            assert choice.lower_bound <= brute.least(r)
            assert choice.objective >= brute.least(r) - brute.rounding
            expected = definition(S, u, choice.removed)
            assert choice.objective == pytest.approx(expected, abs=brute.rounding)


def dead_channels(rng, c):
    S, u = low_rank(rng, c)
    alive = rng.random(c) < 0.7
    return S * np.outer(alive, alive), u * alive


def definite(rng, c):
    q = rng.normal(size=(2 * c, c))
    return q.T @ q / c, rng.normal(size=c)


def gram(rng, c):  # u in the range of S, as in selection: bounded below without a box
    q = rng.normal(size=(2 * c, max(1, c // 2))) @ rng.normal(size=(max(1, c // 2), c))
    return q.T @ q / len(q), q.mean(axis=0)


CERTIFIED = (*KINDS, dead_channels, definite, gram)


def certified_instances(kind):
    rng = np.random.default_rng(CERTIFIED.index(kind))
    for k in range(18):
        yield kind(rng, 1 + k % 9)
    if kind is not zero:  # all masks tie, and all would be visited
        yield kind(rng, 14)


def certify(S, u, r, **limits):
    return select(S, u=u, r=r, method="branch_and_bound", **{"time_limit": math.inf, **limits})


@pytest.mark.parametrize("kind", CERTIFIED)
def test_branch_and_bound_proves_the_optimum_and_its_bound_is_never_above(kind):
    for S, u in certified_instances(kind):
        brute = BruteForce(S, u)
        for r in range(len(u) + 1):
            choice = certify(S, u, r)
            assert (choice.status, choice.method) == ("optimal", "branch_and_bound")
            assert choice.removed.sum() == r
            assert choice.objective == pytest.approx(brute.least(r), abs=10 * brute.rounding)
            assert choice.lower_bound <= brute.least(r)
            assert 0 <= choice.gap <= 100 * brute.rounding + 1e-100


STOPPED = (dict(time_limit=0), dict(time_limit=1e-5), dict(node_limit=0), dict(node_limit=2))


@pytest.mark.parametrize("limits", STOPPED, ids=str)
@pytest.mark.parametrize("kind", CERTIFIED)
def test_a_stopped_search_has_a_valid_mask_and_a_bound_below_the_optimum(kind, limits):
    for S, u in certified_instances(kind):
        brute = BruteForce(S, u)
        for r in range(len(u) + 1):
            choice = certify(S, u, r, **limits)
            assert choice.removed.sum() == r
            assert choice.lower_bound <= brute.least(r) <= choice.objective + brute.rounding
            optimal = choice.objective <= brute.least(r) + 10 * brute.rounding
            assert optimal or choice.status == "heuristic"


@pytest.mark.parametrize("allowed", [1e-3, 0.3, 3.0, math.inf])
def test_a_search_with_a_gap_ends_within_it_and_says_so(allowed):
    seen = set()
    for S, u in certified_instances(gram):
        brute = BruteForce(S, u)
        for r in range(len(u) + 1):
            choice = certify(S, u, r, gap=allowed)
            seen.add(choice.status)
            assert choice.lower_bound <= brute.least(r)
            assert choice.gap <= allowed * (1 + 1e-9)
            assert choice.objective <= brute.least(r) + allowed
    assert seen == {"optimal", "gap"}


@pytest.mark.parametrize("kind", [low_rank, definite, gram, dead_channels])
def test_the_bound_of_the_root_is_the_value_of_the_convex_relaxation(kind):
    piqp = pytest.importorskip("piqp", reason="piqp solves the same convex program independently")
    rng = np.random.default_rng(CERTIFIED.index(kind))
    compared = 0
    for c in (5, 12, 20, 33, 50):
        S, u = kind(rng, c)
        for r in (1, c // 3, c // 2, c - 2):
            bound = _solver.branch_and_bound(S, u, r, 0.0, math.inf, 0, 0.0, 0)[1]
            oracle = piqp.DenseSolver()
            oracle.settings.eps_abs = oracle.settings.eps_rel = 1e-10
            oracle.setup(
                S, -u, np.ones((1, c)), np.array([float(r)]), x_l=np.zeros(c), x_u=np.ones(c)
            )
            if oracle.solve() != piqp.PIQP_SOLVED:
                continue
            compared += 1
            value = oracle.result.info.primal_obj
            assert bound == pytest.approx(value, abs=1e-6 * max(1, abs(value)))
            assert bound <= value + 1e-8 * max(1, abs(value))
    assert compared >= 15


@pytest.mark.parametrize("exponent", [-900, -300, 300, 900])
def test_a_power_of_two_without_a_linear_term_changes_nothing_but_the_units(exponent):
    S, _ = low_rank(np.random.default_rng(5), 24)
    plain, scaled = certify(S, None, 9), certify(np.ldexp(S, exponent), None, 9)
    assert scaled.status == plain.status == "optimal"
    assert torch.equal(scaled.removed, plain.removed)
    assert scaled.objective == math.ldexp(plain.objective, exponent)
    assert scaled.lower_bound == math.ldexp(plain.lower_bound, exponent)


@pytest.mark.parametrize("scale", [1e-307, 1e-200, 1e200, 1e295])
def test_branch_and_bound_is_safe_at_every_scale(scale):
    S, u = gram(np.random.default_rng(1), 12)
    brute = BruteForce(S, u)
    choice = certify(scale * S, scale * u, 6)
    assert choice.status == "optimal"
    assert choice.objective == pytest.approx(scale * brute.least(6), rel=1e-10)
    assert choice.lower_bound <= choice.objective


def test_a_single_precision_gram_matrix_is_certified_although_it_is_indefinite():
    rng = np.random.default_rng(8)
    q = rng.normal(size=(20, 6)) @ rng.normal(size=(6, 18))
    F, u = (q.T @ q / 20).astype(np.float32), q.mean(axis=0)
    assert np.linalg.eigvalsh(F.astype(np.float64))[0] < -1e-8
    single, double = certify(F, u, 7), certify(q.T @ q / 20, u, 7)
    assert single.status == double.status == "optimal"
    assert single.objective == pytest.approx(double.objective, abs=1e-5)


def test_an_optimum_found_before_the_limits_is_the_same_for_every_seed_and_limit():
    S, u = gram(np.random.default_rng(4), 60)
    first = select(S, u=u, r=25)
    assert (first.status, first.method) == ("optimal", "branch_and_bound")
    for options in (dict(seed=1), dict(time_limit=100), dict(node_limit=10**9), dict(seed=2**63)):
        again = select(S, u=u, r=25, **options)
        assert torch.equal(again.removed, first.removed)
        assert again.objective == first.objective and again.status == "optimal"


def test_a_search_that_a_node_limit_stops_gives_equal_bits_for_a_seed():
    S, u = low_rank(np.random.default_rng(4), 120)
    first, again = (certify(S, u, 50, node_limit=200, seed=3) for _ in range(2))
    assert first.status == "heuristic"
    assert torch.equal(again.removed, first.removed)
    assert (again.objective, again.lower_bound) == (first.objective, first.lower_bound)


def test_more_nodes_never_weaken_the_answer():
    S, u = gram(np.random.default_rng(6), 120)
    swap = select(S, u=u, r=60, method="swap")
    choices = [certify(S, u, 60, node_limit=limit) for limit in (0, 10, 100, 1000)]
    assert swap.lower_bound < choices[0].lower_bound
    assert choices[0].objective <= swap.objective
    for fewer, more in itertools.pairwise(choices):
        assert more.lower_bound >= fewer.lower_bound and more.objective <= fewer.objective
    assert choices[-1].gap < 0.7 * choices[0].gap


def test_the_time_limit_is_kept():
    S, u = low_rank(np.random.default_rng(4), 200)
    begin = time.perf_counter()
    choice = select(S, u=u, r=80, time_limit=0.1)
    assert time.perf_counter() - begin < 60  # without the limit it would take hours
    assert choice.status == "heuristic"


@pytest.mark.parametrize("scale", [1e-310, 1e-200, 1.0, 1e200])
def test_lower_bound_is_tight_for_a_diagonal_and_safe_at_every_scale(scale):
    rng = np.random.default_rng(0)
    S, u = np.diag(scale * rng.normal(size=40)), scale * rng.normal(size=40)
    for r in (0, 1, 17, 39, 40):
        optimum = select(S, u=u, r=r).objective
        bound = _solver.lower_bound(S, u, r)
        assert bound <= optimum
        assert bound == pytest.approx(optimum, abs=1e-10 * scale)


@pytest.mark.parametrize("r", [0, 1, 24, 25])
def test_lower_bound_is_tight_where_one_channel_or_none_is_alone(r):
    S, u = indefinite(np.random.default_rng(r), 25)
    optimum = select(S, u=u, r=r).objective
    assert _solver.lower_bound(S, u, r) <= optimum
    assert _solver.lower_bound(S, u, r) == pytest.approx(optimum, abs=1e-8)


@pytest.mark.parametrize("r", [1, 7, 30, 59])
@pytest.mark.parametrize("kind", [low_rank, indefinite, duplicates, mixed_scales])
def test_no_single_swap_improves_the_result_of_swap(kind, r):
    rng = np.random.default_rng(r)
    S, u = kind(rng, 60)
    removed = select(S, u=u, r=r, method="swap").removed.numpy()
    before = definition(S, u, removed)
    for i in np.flatnonzero(~removed):
        for j in np.flatnonzero(removed):
            swapped = removed.copy()
            swapped[i], swapped[j] = True, False
            terms = np.abs(S[[i, j]]).sum() + np.abs(u[[i, j]]).sum()
            change = definition(S, u, swapped) - before
            assert change >= -1e-11 * terms - 1e-13 * abs(before)


def greedy_by_definition(S, u, r, mask):
    """Flips the channel with the best resulting cost until r are removed."""
    mask = mask.copy()
    while mask.sum() != r:
        flips = np.flatnonzero(mask == (mask.sum() > r))
        costs = [definition(S, u, mask ^ (np.arange(len(u)) == i)) for i in flips]
        mask[flips[np.argmin(costs)]] ^= True
    return mask


@pytest.mark.parametrize("r", [3, 15, 26])
def test_greedy_grows_and_shrinks_by_the_best_channel_and_takes_the_better(r):
    rng = np.random.default_rng(r)
    for kind in (low_rank, indefinite):
        S, u = kind(rng, 30)
        starts = np.zeros(30, dtype=bool), np.ones(30, dtype=bool)
        expected = [greedy_by_definition(S, u, r, start) for start in starts]
        masks = _solver.greedy(S, u, r)
        assert [mask.tolist() for mask in masks] == [mask.tolist() for mask in expected]
        best = min(definition(S, u, mask) for mask in expected)
        assert select(S, u=u, r=r, method="greedy").objective == pytest.approx(best)


def test_swap_descent_reaches_an_optimum_that_is_one_swap_away():
    S, u = np.eye(4), np.array([4.0, 3.0, 2.0, 1.0])
    start = np.array([True, False, False, True])
    assert _solver.swap_descent(S, u, start).tolist() == [True, True, False, False]


def test_swap_is_at_least_as_good_as_greedy():
    rng = np.random.default_rng(3)
    better = 0
    for _ in range(20):
        S, u = low_rank(rng, 50)
        greedy, swap = (select(S, u=u, r=25, method=method).objective for method in HEURISTICS)
        assert swap <= greedy
        better += swap < greedy
    assert better > 0


@pytest.mark.parametrize("method", ["auto", "exact", *HEURISTICS])
@pytest.mark.parametrize("r", [0, 1, 400, 999, 1000])
def test_diagonal_cost_gives_the_cheapest_channels(method, r):
    rng = np.random.default_rng(5)
    d, u = rng.normal(size=1000), rng.normal(size=1000)
    expected = np.zeros(1000, dtype=bool)
    expected[np.argsort(0.5 * d - u)[:r]] = True
    choice = select(np.diag(d), u=u, r=r, method=method)
    assert np.array_equal(choice.removed.numpy(), expected)


def test_scores_alone_are_sorted_and_ties_go_to_the_lowest_index():
    scores = torch.tensor([3.0, 1.0, 2.0, 1.0, 1.0])
    choice = select(u=-scores, r=2)
    assert choice.removed.tolist() == [False, True, False, True, False]
    assert (choice.objective, choice.status) == (2.0, "optimal")


@pytest.mark.parametrize("r", [0, 1, 63, 64])
@pytest.mark.parametrize("method", ["auto", "branch_and_bound", *HEURISTICS])
def test_extreme_counts_are_solved_to_the_optimum(method, r):
    S, u = indefinite(np.random.default_rng(r), 64)
    alone = 0.5 * np.diagonal(S) - u
    everything = definition(S, u, np.ones(64))
    gains = everything - (alone + S.sum(axis=1) - np.diagonal(S))  # cost without one channel
    expected = {0: 0.0, 1: alone.min(), 63: gains.min(), 64: everything}[r]
    choice = select(S, u=u, r=r, method=method)
    assert choice.objective == pytest.approx(expected, abs=1e-10)


def test_samples_give_the_same_as_their_gram_matrix():
    Q = torch.randn(200, 30, generator=torch.Generator().manual_seed(0))
    u = Q.mean(dim=0)
    by_samples = select(Q=Q, u=u, r=9)
    by_matrix = select(Q.double().T @ Q.double() / 200, u=u, r=9)
    assert torch.equal(by_samples.removed, by_matrix.removed)
    assert by_samples.objective == pytest.approx(by_matrix.objective, rel=1e-12)
    assert select(Q=Q, r=9).objective == pytest.approx(select(Q=Q, u=0 * u, r=9).objective)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int64])
def test_every_real_dtype_is_computed_in_float64(dtype):
    Q = torch.randint(-3, 4, (8, 10), generator=torch.Generator().manual_seed(1))
    F = (Q.T @ Q).to(dtype)
    exact = select(F.double(), r=4)
    tracked = F.clone().requires_grad_(F.is_floating_point())
    for given in (F, tracked, F.tolist()):
        choice = select(given, r=4)
        assert torch.equal(choice.removed, exact.removed)
        assert choice.objective == exact.objective


def test_rounding_asymmetry_of_the_input_dtype_is_accepted():
    F, _ = low_rank(np.random.default_rng(2), 10)
    F = F.astype(np.float32)
    noisy = F.copy()
    noisy[0, 1] *= 1 + 1e-6
    assert torch.equal(select(noisy, r=5).removed, select(F, r=5).removed)


def test_inputs_are_left_unchanged():
    F, u = indefinite(np.random.default_rng(0), 30)
    before = F.copy(), u.copy()
    select(F, u=u, r=15)
    assert np.array_equal(F, before[0]) and np.array_equal(u, before[1])


@pytest.mark.parametrize("method", ["exact", *HEURISTICS])
def test_a_permutation_of_the_channels_permutes_the_choice(method):
    rng = np.random.default_rng(9)
    S, u = low_rank(rng, 18)
    order = rng.permutation(18)
    choice = select(S, u=u, r=7, method=method)
    permuted = select(S[np.ix_(order, order)], u=u[order], r=7, method=method)
    assert np.array_equal(permuted.removed.numpy(), choice.removed.numpy()[order])
    assert permuted.objective == pytest.approx(choice.objective, rel=1e-12)


@pytest.mark.parametrize("method", HEURISTICS)
def test_heuristics_give_equal_bits_for_every_seed(method):
    S, u = low_rank(np.random.default_rng(4), 120)
    first = select(S, u=u, r=50, method=method)
    for seed in (0, 0, 1):
        again = select(S, u=u, r=50, method=method, seed=seed)
        assert torch.equal(again.removed, first.removed)
        assert (again.objective, again.lower_bound) == (first.objective, first.lower_bound)


# For r = C / 2: the mean cost of random subsets, the best known cost and a proven lower bound
# (equal to the best cost where that is proven optimal).
KNOWN = {
    "nz2_l0_c16": (0.7627, 0.143893, 0.143893),
    "nz2_l1_c32": (0.349, 0.11852, 0.11852),
    "noise_l0_c64": (0.8792, 0.0261029, 0.0261029),
    "synlr_c64": (0.7602, 0.0437777, 0.0437777),
    "noise_l1_c128": (0.3388, 0.0697373, 0.0697373),
    "syndense_c128": (0.2332, -0.0972601, -0.0972601),
    "noise_l2_c256": (0.2644, 0.0828483, 0.0828483),
    "wide_l1_c512": (0.02794, -0.00399954, -0.00399954),
    "tw_l2_c512": (0.4229, 0.118343, 0.118218),
}


def gap_percent(choice, name):
    mean, best, bound = KNOWN[name]
    return 100 * (choice.objective - best) / (mean - bound)


def measured_layer(name, method, **limits):
    folder = os.environ.get("CCP_DATA")
    if folder is None:
        pytest.skip("CCP_DATA does not name a data folder")
    file = Path(folder) / "bqp" / f"{name}.npz"
    if not file.is_file():
        pytest.skip("the data folder has no bqp instances")
    with np.load(file) as data:
        Q, r = data["Q"].astype(np.float64), int(data["r"])
    return select(Q=Q, u=Q.mean(axis=0), r=r, method=method, **limits)


@pytest.mark.parametrize("name", KNOWN)
def test_swap_is_close_to_the_best_known_on_measured_layers(name):
    choice = measured_layer(name, "swap")
    assert -0.001 <= gap_percent(choice, name) <= 6.7
    assert choice.lower_bound <= KNOWN[name][2]


def test_swap_has_a_small_median_gap_on_measured_layers():
    gaps = [gap_percent(measured_layer(name, "swap"), name) for name in KNOWN]
    assert np.median(gaps) <= 0.14


PROVEN = [name for name, (_, best, bound) in KNOWN.items() if best == bound]


@pytest.mark.parametrize("name", PROVEN)
def test_auto_proves_the_known_optimum_of_measured_layers(name):
    choice = measured_layer(name, "auto", time_limit=20)
    assert choice.status == "optimal"
    assert gap_percent(choice, name) == pytest.approx(0, abs=1e-3)


def test_the_gap_of_the_hardest_measured_layer_is_small_after_some_nodes():
    name = "tw_l2_c512"
    mean, best, _ = KNOWN[name]
    choice = measured_layer(name, "auto", time_limit=math.inf, node_limit=1000)
    assert gap_percent(choice, name) <= 0.01
    assert best - 0.002 * (mean - best) <= choice.lower_bound <= best


INTERRUPTED = """
import math, os, signal, threading
import numpy as np
from ccp_ext import _solver

a = np.random.default_rng(0).normal(size=(200, 60))
b = np.random.default_rng(1).normal(size=(150, 150))
# A test run in the background of a shell has the signal ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)
threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
try:
    {call}
except KeyboardInterrupt:
    print("interrupted")
"""
# 10^17 subsets, or a tree of as many nodes: the calls end only if the timer's thread may run and
# the signal is seen.
ENDLESS = {
    "enumerate": "_solver.enumerate(a.T @ a, np.zeros(60), 30)",
    "branch_and_bound": "_solver.branch_and_bound(b.T @ b, np.zeros(150), 75, 1e-9, math.inf, "
    "2**62, 0.0, 0)",
}


@pytest.mark.parametrize("call", ENDLESS.values(), ids=ENDLESS)
def test_ctrl_c_stops_a_search_that_holds_no_interpreter_lock(call):
    code = INTERRUPTED.format(call=call)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "interrupted", done.stderr


GOOD = np.eye(3)
BAD = {
    "F and Q": (dict(F=GOOD, Q=GOOD, r=1), "both F and Q"),
    "nothing": (dict(r=1), "none of F, Q and u"),
    "NaN": (dict(F=np.diag([1.0, np.nan, 1.0]), r=1), r"F\[1, 1\] is nan"),
    "infinity": (dict(F=GOOD, u=[0.0, np.inf, 0.0], r=1), r"u\[1\] is inf"),
    "infinite sample": (dict(Q=np.full((2, 3), np.inf), r=1), r"Q\[0, 0\] is inf"),
    "overflow": (dict(F=1e308 * np.ones((3, 3)), r=1), "less than 1e.300"),
    "overflowing samples": (dict(Q=1e200 * np.ones((2, 3)), r=1), "less than 1e.300"),
    "vector F": (dict(F=np.ones(3), r=1), r"F must have shape \[C, C\]; got \[3\]"),
    "rectangle": (dict(F=np.ones((2, 3)), r=1), r"F must have shape \[C, C\]; got \[2, 3\]"),
    "flat Q": (dict(Q=np.ones(3), r=1), r"Q must have shape \[N, C\]; got \[3\]"),
    "no samples": (dict(Q=np.ones((0, 3)), r=1), "at least one sample"),
    "u of another size": (dict(F=GOOD, u=np.ones(4), r=1), r"u must have shape \[C\] with C = 3"),
    "matrix u": (dict(F=GOOD, u=GOOD, r=1), r"u must have shape \[C\]; got \[3, 3\]"),
    "asymmetric": (dict(F=GOOD + np.eye(3, k=1) / 4, r=1), r"max \|F - F'\| is 0.25"),
    "complex": (dict(F=torch.eye(3, dtype=torch.complex64), r=1), "real numbers"),
    "text": (dict(F=np.array([["a"]]), r=0), "real numbers"),
    "negative r": (dict(F=GOOD, r=-1), "0 <= r <= C = 3; got -1"),
    "large r": (dict(F=GOOD, r=4), "0 <= r <= C = 3; got 4"),
    "fractional r": (dict(F=GOOD, r=1.5), "got 1.5"),
    "method": (dict(F=GOOD, r=1, method="best"), "method must be one of .*; got 'best'"),
    "seed": (dict(F=GOOD, r=1, seed=-1), "seed must be an integer"),
    "time limit": (dict(F=GOOD, r=1, time_limit=-1.0), "time_limit must be a number >= 0; got -1"),
    "no time limit": (dict(F=GOOD, r=1, time_limit=None), "time_limit must be .*; got None"),
    "NaN gap": (dict(F=GOOD, r=1, gap=math.nan), "gap must be a number >= 0; got nan"),
    "gap": (dict(F=GOOD, r=1, gap="small"), "gap must be a number >= 0; got 'small'"),
    "node limit": (dict(F=GOOD, r=1, node_limit=-1), "node_limit must be an integer >= 0"),
    "fractional nodes": (dict(F=GOOD, r=1, node_limit=0.5), "node_limit must be .*; got 0.5"),
    "large exact": (dict(F=np.ones((60, 60)), r=30, method="exact"), "at most 200000 subsets"),
}


@pytest.mark.parametrize("arguments, message", BAD.values(), ids=BAD)
def test_bad_input_is_named(arguments, message):
    with pytest.raises(InputError, match=f"select: .*{message}"):
        select(**arguments)


@pytest.mark.parametrize("method", ["auto", "branch_and_bound", *HEURISTICS])
def test_no_channels_is_an_empty_choice(method):
    choice = select(np.zeros((0, 0)), r=0, method=method)
    assert isinstance(choice, Choice)
    assert choice.removed.shape == (0,) and choice.objective == 0


def test_random_subset_is_drawn_by_a_shuffle_with_the_published_generator():
    # The first outputs of SplitMix64 for this seed.
    draws = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    order = list(range(7))
    for k, draw in enumerate(draws):
        other = k + draw % (7 - k)
        order[k], order[other] = order[other], order[k]
    mask = random_subset(7, 3, seed=1234567)
    assert mask.nonzero().flatten().tolist() == sorted(order[:3])


def test_random_subset_has_r_ones_and_favours_no_channel():
    masks = torch.stack([random_subset(20, 5, seed) for seed in range(4000)])
    assert masks.dtype == torch.bool and bool((masks.sum(dim=1) == 5).all())
    # 4000 draws at 1/4: a standard deviation of 27; five of them are allowed.
    assert (masks.sum(dim=0) - 1000).abs().max() < 137


@pytest.mark.parametrize(
    "arguments", [(-1, 0, 0), (5, 6, 0), (5, 2, -1), (5, 2, 2**64), (2.5, 1, 0)]
)
def test_random_subset_names_bad_input(arguments):
    with pytest.raises(InputError, match="random_subset: "):
        random_subset(*arguments)
