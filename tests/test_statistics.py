"""The collected (u, S) against brute-force Jacobians, and the collector's manners."""

from __future__ import annotations

import itertools
import subprocess
import sys
import textwrap

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import ccp_ext
from ccp_ext import collect, models
from ccp_ext.errors import InputError
from ccp_ext.graph import Tap

CLASSES = 4


class SmallNet(nn.Module):
    """conv (with bias) - norm - activation - conv - norm - add - activation - pool - linear."""

    def __init__(self, inplace: bool = False, activation: type[nn.Module] = nn.ReLU) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(2, 5, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(5)
        self.act1 = activation(inplace=inplace)
        self.conv2 = nn.Conv2d(5, 5, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(5)
        self.act2 = activation(inplace=inplace)
        self.head = nn.Linear(5, CLASSES)
        self.inplace = inplace
        self.gates: dict[str, Tensor] = {}

    def gate(self, name: str, x: Tensor) -> Tensor:
        return x * self.gates[name].view(1, -1, 1, 1) if name in self.gates else x

    def forward(self, x: Tensor) -> Tensor:
        x = self.gate("act1", self.act1(self.bn1(self.conv1(x))))
        y = self.gate("bn2", self.bn2(self.conv2(x)))
        if self.inplace:
            y += x
        else:
            y = y + x
        return self.head(self.act2(y).mean((2, 3)))


def small_net(seed: int = 0, dtype: torch.dtype = torch.float64, **kwargs) -> SmallNet:
    torch.manual_seed(seed)
    net = SmallNet(**kwargs)
    for bn in (net.bn1, net.bn2):
        nn.init.uniform_(bn.running_mean, -0.3, 0.3)
        nn.init.uniform_(bn.running_var, 0.5, 2.0)
        nn.init.normal_(bn.weight, 1.0, 0.3)
        nn.init.normal_(bn.bias, 0.0, 0.3)
    return net.to(dtype).eval()


def batch(n: int = 9, seed: int = 1, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 2, 6, 5, generator=generator, dtype=torch.float64)
    return x.to(dtype), torch.randint(CLASSES, (n,), generator=generator)


def soft_labels(n: int, seed: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(n, CLASSES, generator=generator, dtype=torch.float64).softmax(1)


def weight_jacobian(net: SmallNet, x: Tensor, outputs=lambda z: z.softmax(1)) -> Tensor:
    """[N, K, C]: <w_i, d f_k / d w_i> for the filters of conv1, one sample at a time."""
    weight = net.conv1.weight.detach()

    def f(w: Tensor, sample: Tensor) -> Tensor:
        z = torch.func.functional_call(net, {"conv1.weight": w}, (sample[None],))
        return outputs(z)[0]

    rows = [torch.autograd.functional.jacobian(lambda w, s=s: f(w, s), weight) for s in x]
    return (torch.stack(rows) * weight).flatten(3).sum(3)


def gate_jacobian(net: SmallNet, x: Tensor, names: list[str], outputs) -> Tensor:
    """[N, K, C]: d f_k / d gate_i with the same gate vector at every name."""

    def f(gate: Tensor, sample: Tensor) -> Tensor:
        net.gates = {name: gate for name in names}
        value = outputs(net(sample[None]))[0]
        net.gates = {}
        return value

    ones = torch.ones(5, dtype=x.dtype)
    return torch.stack(
        [torch.autograd.functional.jacobian(lambda g, s=s: f(g, s), ones) for s in x]
    )


def sigma_weighted(jacobian: Tensor, y: Tensor, f: Tensor) -> Tensor:
    """(1/N) sum_n J_n' diag(y / (f * f)) J_n, literally."""
    return torch.einsum("nki,nk,nkj->ij", jacobian, y / (f * f), jacobian) / len(jacobian)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return ((actual.double() - expected).norm() / expected.norm()).item()


def statistics_of(net, taps, data, **kwargs):
    with collect(net, taps, **kwargs) as stats:
        for x, y in data:
            stats.backward(net(x), y)
    return stats


# --- exactness ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("curvature", ["empirical", "exact"])
def test_one_hot_S_is_the_papers_sigma_weighted_jacobian(curvature, dtype, bound):
    net, (x, y) = small_net(), batch()
    f = net(x).softmax(1).detach()
    expected = sigma_weighted(weight_jacobian(net, x), F.one_hot(y, CLASSES).double(), f)
    stats = statistics_of(
        net.to(dtype), {"g": "conv1"}, [(x.to(dtype), y)], site="weight", curvature=curvature
    )
    assert stats["g"].S.dtype == dtype
    assert relative_error(stats["g"].S, expected) < bound


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_soft_label_S_is_the_papers_sigma_weighted_jacobian(dtype, bound):
    net, (x, _) = small_net(), batch()
    y = soft_labels(len(x))
    f = net(x).softmax(1).detach()
    expected = sigma_weighted(weight_jacobian(net, x), y, f)
    stats = statistics_of(
        net.to(dtype),
        {"g": "conv1"},
        [(x.to(dtype), y.to(dtype))],
        site="weight",
        curvature="exact",
    )
    assert relative_error(stats["g"].S, expected) < bound


def test_least_squares_S_is_the_gauss_newton_matrix():
    net, (x, _) = small_net(), batch()
    y = torch.randn(len(x), CLASSES, dtype=torch.float64)
    jacobian = weight_jacobian(net, x, outputs=lambda z: z)
    expected = torch.einsum("nki,nkj->ij", jacobian, jacobian) / len(x)
    stats = statistics_of(
        net, {"g": "conv1"}, [(x, y)], site="weight", curvature="exact", loss="least_squares"
    )
    assert relative_error(stats["g"].S, expected) < 1e-10
    u = torch.einsum("nki,nk->i", jacobian, net(x).detach() - y) / len(x)
    assert relative_error(stats["g"].u, u) < 1e-10


@pytest.mark.parametrize("curvature", ["empirical", "exact", "sampled", "logits"])
def test_u_is_the_mean_product_of_weight_and_gradient(curvature):
    net, (x, y) = small_net(), batch()
    stats = statistics_of(net, {"g": "conv1"}, [(x, y)], site="weight", curvature=curvature)
    F.cross_entropy(net(x), y).backward()
    expected = (net.conv1.weight * net.conv1.weight.grad).flatten(1).sum(1).detach()
    assert relative_error(stats["g"].u, expected) < 1e-10


def test_gate_derivatives_of_coupled_channels_add_up_before_the_product():
    net, (x, y) = small_net(), batch()
    jacobian = gate_jacobian(net, x, ["act1", "bn2"], lambda z: z.log_softmax(1))
    a = -jacobian[torch.arange(len(x)), y]
    stats = statistics_of(net, {"g": ["act1", "bn2"]}, [(x, y)], curvature="empirical")
    assert relative_error(stats["g"].S, a.T @ a / len(x)) < 1e-10
    assert relative_error(stats["g"].u, a.mean(0)) < 1e-10
    assert relative_error(stats["g"].absolute, a.abs().mean(0)) < 1e-10


@pytest.mark.parametrize("curvature", ["logits", "sampled"])
def test_drawn_rows_estimate_the_curvature_without_bias(curvature):
    net, (x, y) = small_net(), batch(4)
    if curvature == "logits":
        jacobian = gate_jacobian(net, x, ["act1"], lambda z: z)
        weights = torch.ones(len(x), CLASSES, dtype=torch.float64)
    else:
        jacobian = gate_jacobian(net, x, ["act1"], lambda z: z.log_softmax(1))
        weights = net(x).softmax(1).detach()
    expected = torch.einsum("nki,nk,nkj->ij", jacobian, weights, jacobian) / len(x)
    errors = {
        rows: relative_error(
            statistics_of(
                net, {"g": "act1"}, [(x, y)], curvature=curvature, rows=rows, first_order=False
            )["g"].S,
            expected,
        )
        for rows in (1, 1500)
    }
    assert errors[1500] < 0.06 < errors[1]


def test_s_hat_of_the_kept_mask_is_the_cost_of_the_removed_one():
    net, (x, y) = small_net(), batch()
    stats = statistics_of(net, {"g": "conv1"}, [(x, y)], site="weight", curvature="empirical")
    s_hat, cost = stats["g"].s_hat(), stats["g"].cost(first_order=True)
    constant = cost.objective(torch.ones(5))
    for kept in itertools.product([0.0, 1.0], repeat=5):
        beta = torch.tensor(kept, dtype=torch.float64)
        assert (beta @ s_hat @ beta).item() + constant == pytest.approx(
            cost.objective(1 - beta), rel=1e-12, abs=1e-12
        )


def test_tap_index_selects_and_orders_the_groups_channels():
    net, data = small_net(), [batch()]
    whole = statistics_of(net, {"g": "act1"}, data, curvature="empirical")["g"]
    taps = {"a": Tap("act1", index=(3, 1)), "b": Tap("act1", index=(0, 2, 4))}
    parts = statistics_of(net, taps, data, curvature="empirical")
    assert torch.equal(parts["a"].S, whole.S[[3, 1]][:, [3, 1]])
    assert torch.equal(parts["b"].u, whole.u[[0, 2, 4]])


def test_input_port_sees_what_the_module_reads():
    net, data = small_net(), [batch()]
    output = statistics_of(net, {"g": "act1"}, data, curvature="empirical")["g"]
    # act1's output also feeds the addition: the gradient of the tensor is the whole one.
    read = statistics_of(net, {"g": Tap("conv2", port="input")}, data, curvature="empirical")["g"]
    assert torch.equal(output.S, read.S)


def test_linear_on_a_sequence_sums_over_its_positions():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 6, bias=False), nn.GELU(), nn.Linear(6, 2)).double()
    x, y = torch.randn(5, 7, 3, dtype=torch.float64), torch.randn(5, 7, 2, dtype=torch.float64)
    with collect(
        net,
        {"g": Tap("0", channel_dim=-1)},
        site="weight",
        curvature="empirical",
        loss="least_squares",
    ) as stats:
        stats.backward(net(x), y)
    a = []
    for xn, yn in zip(x, y, strict=True):
        net.zero_grad()
        (0.5 * (net(xn) - yn).square().sum()).backward()
        a.append((net[0].weight * net[0].weight.grad).sum(1).detach())
    a = torch.stack(a)
    assert relative_error(stats["g"].S, a.T @ a / 5) < 1e-10


# --- real models' habits -----------------------------------------------------------------------


class SharedNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.head = nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(F.relu(self.conv(x)))
        return self.head(x.mean((2, 3)))


def test_a_shared_module_called_twice_adds_its_calls():
    torch.manual_seed(3)
    net = SharedNet().double()
    x, y = torch.randn(6, 4, 5, 5, dtype=torch.float64), torch.arange(6) % CLASSES
    stats = statistics_of(net, {"g": "conv"}, [(x, y)], site="weight", curvature="empirical")
    a = []
    for xn, yn in zip(x, y, strict=True):
        net.zero_grad()
        F.cross_entropy(net(xn[None]), yn[None]).backward()
        a.append((net.conv.weight * net.conv.weight.grad).flatten(1).sum(1).detach())
    a = torch.stack(a)
    assert relative_error(stats["g"].S, a.T @ a / 6) < 1e-10


@pytest.mark.parametrize("activation", [nn.ReLU, nn.SiLU])
@pytest.mark.parametrize("frozen", [False, True])
def test_in_place_operators_change_nothing(activation, frozen):
    taps = {"conv": "conv1", "bn": ["bn1", "bn2"], "act": "act1"}
    data = [batch(5, seed=1), batch(3, seed=2)]
    stats = []
    for inplace in (False, True):
        net = small_net(inplace=inplace, activation=activation)
        net.requires_grad_(not frozen)
        stats.append(statistics_of(net, taps, data, curvature="empirical"))
    for name in taps:
        assert relative_error(stats[1][name].S, stats[0][name].S) < 1e-12


def test_the_parts_of_a_model_cannot_be_called_by_themselves():
    net, (x, _) = small_net(), batch()
    with (
        collect(net, {"g": "bn1"}, curvature="empirical"),
        pytest.raises(
            RuntimeError, match="module 'bn1' was called by itself; call the whole model"
        ),
    ):
        net.bn1(net.conv1(x))


def test_an_observed_tensor_changed_after_the_forward_pass_is_an_error():
    class Keeps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Conv2d(2, 5, 3), nn.Linear(5, CLASSES)

        def forward(self, x: Tensor) -> Tensor:
            self.kept = self.body(x)
            return self.head((self.kept * 1).mean((2, 3)))

    net, (x, y) = Keeps().double(), batch()
    with collect(net, {"g": "body"}, curvature="empirical") as stats:
        outputs = net(x)
        net.kept.detach().zero_()
        with pytest.raises(RuntimeError, match="'body' was changed in place after"):
            stats.backward(outputs, y)


class FunctionalStem(nn.Module):
    """The observed tensor is read by a shortcut before the module that carries the tap."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(2, 5, 3, padding=1)
        self.conv2 = nn.Conv2d(5, 5, 3, padding=1)
        self.head = nn.Linear(5, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.conv1(x))
        shortcut = h * 0.5
        return self.head(F.relu(self.conv2(input=h) + shortcut).mean((2, 3)))


@pytest.mark.parametrize("frozen", [False, True])
def test_reads_before_the_observation_count_too(frozen):
    torch.manual_seed(5)
    net, (x, y) = FunctionalStem().double(), batch()
    net.requires_grad_(not frozen)
    h = F.relu(net.conv1(x)).detach().requires_grad_()
    z = net.head(F.relu(net.conv2(h) + h * 0.5).mean((2, 3)))
    (gradient,) = torch.autograd.grad(F.cross_entropy(z, y, reduction="sum"), h)
    a = (h * gradient).sum((2, 3)).detach()
    taps = {"g": Tap("conv2", port="input")}
    stats = statistics_of(net, taps, [(x, y)], curvature="empirical")
    assert relative_error(stats["g"].S, a.T @ a / len(x)) < 1e-12
    assert relative_error(stats["g"].u, a.mean(0)) < 1e-12


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing_changes_nothing(use_reentrant):
    class Checkpointed(FunctionalStem):
        def forward(self, x: Tensor) -> Tensor:
            h = F.relu(self.conv1(x))
            h = checkpoint(lambda t: F.relu(self.conv2(t)), h, use_reentrant=use_reentrant)
            return self.head(h.mean((2, 3)))

    torch.manual_seed(5)
    net, (x, y) = Checkpointed().double(), batch()
    stats = statistics_of(net, {"g": "conv2"}, [(x, y), (x, y)], curvature="empirical")["g"]
    z = net.conv2(F.relu(net.conv1(x))).detach().requires_grad_()
    loss = F.cross_entropy(net.head(F.relu(z).mean((2, 3))), y, reduction="sum")
    a = (z * torch.autograd.grad(loss, z)[0]).sum((2, 3)).detach()
    assert stats.count == 2 * len(x)
    assert relative_error(stats.S, a.T @ a / len(x)) < 1e-12


@pytest.mark.parametrize("compiled_before", [False, True])
def test_a_compiled_model_gives_the_same(compiled_before):
    model, x, y = models.create("resnet8").eval(), torch.randn(4, 3, 32, 32), torch.arange(4)
    compiled = torch.compile(model, backend="eager")
    if compiled_before:
        compiled(x)
    graph = ccp_ext.trace(compiled, x[:1]).inner
    found = []
    for called in (model, compiled):
        with ccp_ext.collect(called, graph) as stats:
            stats.backward(called(x), y)
        found.append(stats)
    for name in found[0]:
        torch.testing.assert_close(found[1][name].S, found[0][name].S)
    slim = ccp_ext.prune(compiled, ccp_ext.make_plan(graph, found[1], macs=0.5))
    assert slim is model and torch.equal(compiled(x), model(x))


def test_a_model_compiled_by_the_default_backend_gives_the_same(device: str):
    model = nn.Sequential(nn.Conv2d(2, 5, 3), nn.ReLU(), nn.Flatten(), nn.Linear(60, CLASSES))
    model = model.to(device).eval()
    x, y = (tensor.to(device) for tensor in batch(dtype=torch.float32))
    compiled = torch.compile(model)
    try:
        outputs = compiled(x)
    except Exception as error:
        pytest.skip(f"torch.compile does not work on this machine: {error!r}"[:200])
    torch.testing.assert_close(outputs, model(x))
    stats = [
        statistics_of(called, {"g": "0", "gate": "1"}, [(x, y)]) for called in (model, compiled)
    ]
    for name in stats[0]:
        torch.testing.assert_close(stats[1][name].S, stats[0][name].S)
    torch.testing.assert_close(compiled(x), outputs)  # and is as it was


def test_autocast_keeps_float32_statistics():
    net, (x, y) = small_net(dtype=torch.float32), batch(dtype=torch.float32)
    full = statistics_of(net, {"g": "act1"}, [(x, y)], curvature="empirical")["g"]
    with collect(net, {"g": "act1", "c": "conv1"}, curvature="empirical") as stats:
        with torch.autocast("cpu", torch.bfloat16):
            outputs = net(x)
        stats.backward(outputs, y)
    assert stats["g"].S.dtype == stats["c"].S.dtype == torch.float32
    assert relative_error(stats["g"].S, full.S.double()) < 0.05


def collected_like_training(device: str) -> tuple[Tensor, Tensor, list[Tensor]]:
    """S and u by bfloat16 autocast of a channels-last model, and the gradients beside them."""
    net, (x, y) = small_net(dtype=torch.float32), batch(32, dtype=torch.float32)
    net = net.to(device, memory_format=torch.channels_last)
    x, y = x.to(device, memory_format=torch.channels_last), y.to(device)
    layouts = set()
    net.conv2.register_forward_hook(
        lambda *of: layouts.add(
            (of[2].dtype, of[2].is_contiguous(memory_format=torch.channels_last))
        )
    )
    options = {"curvature": "empirical", "parameter_gradients": True}
    with collect(net, {"g": "act1", "c": "conv2"}, **options) as stats:
        with torch.autocast(device, torch.bfloat16):
            outputs = net(x)
        F.cross_entropy(outputs.float(), y, reduction="sum").backward()
    assert layouts == {(torch.bfloat16, True)}
    return stats, {name: parameter.grad for name, parameter in net.named_parameters()}


def test_autocast_and_channels_last_go_together(device: str):
    expected = statistics_of(
        small_net(), {"g": "act1", "c": "conv2"}, [batch(32)], curvature="empirical"
    )
    plain, (x, y) = small_net(), batch(32)
    F.cross_entropy(plain(x), y, reduction="sum").backward()
    stats, gradients = collected_like_training(device)
    for name in ("g", "c"):
        for actual, wanted in (
            (stats[name].S, expected[name].S),
            (stats[name].u, expected[name].u),
        ):
            assert actual.dtype == torch.float32
            assert relative_error(actual.cpu(), wanted) < 0.05
    for name, parameter in plain.named_parameters():
        assert relative_error(gradients[name].cpu(), parameter.grad) < 0.05


def test_channels_last_gives_the_same():
    net, (x, y) = small_net(), batch()
    expected = statistics_of(net, {"g": "act1"}, [(x, y)], curvature="empirical")["g"].S
    net = net.to(memory_format=torch.channels_last)
    x = x.contiguous(memory_format=torch.channels_last)
    actual = statistics_of(net, {"g": "act1"}, [(x, y)], curvature="empirical")["g"].S
    assert relative_error(actual, expected) < 1e-12


# --- counting and combining --------------------------------------------------------------------


def test_ragged_batches_give_the_mean_over_all_samples():
    net, (x, y) = small_net(), batch(11)
    whole = statistics_of(net, {"g": "act1"}, [(x, y)], curvature="empirical")["g"]
    parts = [(x[s], y[s]) for s in (slice(0, 4), slice(4, 8), slice(8, 11))]
    ragged = statistics_of(net, {"g": "act1"}, parts, curvature="empirical")["g"]
    assert whole.count == ragged.count == 11
    assert relative_error(ragged.S, whole.S) < 1e-12
    assert relative_error(ragged.u, whole.u) < 1e-12


@pytest.mark.parametrize("curvature", ["empirical", "exact", "sampled", "logits"])
def test_every_curvature_counts_each_sample_once(curvature):
    net = small_net()
    data = [(x, F.one_hot(y, CLASSES).double()) for x, y in (batch(5), batch(2, seed=5))]
    stats = statistics_of(net, {"g": "act1"}, data, curvature=curvature, rows=3)
    assert stats["g"].count == 7


class TwoHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 5, 3)
        self.first, self.second = nn.Conv2d(5, 4, 1), nn.Conv2d(5, 4, 1)
        self.use_second = True

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x)
        z = self.first(h).mean((2, 3))
        return z + self.second(h).mean((2, 3)) if self.use_second else z


def test_a_sample_whose_loss_does_not_reach_a_group_counts_with_derivative_zero():
    torch.manual_seed(0)
    net, (x, y) = TwoHeads().double(), batch(8)
    taps = {"first": "first", "second": "second"}
    with collect(net, taps, curvature="empirical") as stats:
        stats.backward(net(x), y)
        S = stats["second"].S
        net.use_second = False
        stats.backward(net(x), y)
    assert stats["first"].count == stats["second"].count == 16
    assert torch.allclose(stats["second"].S, S / 2)


def test_a_failed_backward_pass_never_leaves_half_a_batch():
    net, (x, y) = small_net(), batch()

    def failing(gradient):
        raise MemoryError

    with collect(net, {"g": "act1"}) as stats:  # two passes a batch: u, then S
        stats.backward(net(x), y)
        S = stats["g"].S
        outputs = net(x)
        outputs.register_hook(failing)
        with pytest.raises(MemoryError):
            stats.backward(outputs, y)
        assert torch.equal(stats["g"].S, S) and stats["g"].count == len(x)
        outputs, calls = net(x), []
        outputs.register_hook(lambda g: failing(g) if calls else calls.append(1))
        with pytest.raises(MemoryError):
            stats.backward(outputs, y)
        with pytest.raises(RuntimeError, match="collect again"):
            stats["g"].S  # noqa: B018


@pytest.mark.parametrize(
    ("curvature", "soft", "rows", "expected"),
    [
        ("empirical", False, 1, 10),
        ("logits", False, 3, 30),
        ("sampled", False, 2, 20),
        ("exact", True, 1, 10 * CLASSES),
    ],
)
def test_kept_rows_give_S_of_every_group(curvature, soft, rows, expected):
    data = [batch(7, seed=1), batch(3, seed=2)]
    if soft:
        data = [(x, soft_labels(len(x))) for x, _ in data]
    taps = {"a": "act1", "b": "bn2", "both": ["act1", "bn2"]}
    kept = statistics_of(small_net(), taps, data, curvature=curvature, rows=rows, keep_rows=True)
    for name in taps:
        q = kept[name].rows
        assert q.shape == (expected, 5)
        assert relative_error(q.T @ q / kept[name].count, kept[name].S) < 1e-14


def test_kept_rows_of_all_groups_belong_to_the_same_sample_and_projection():
    """Channels of two groups that see one tensor: the cross-group block is known."""
    taps = {"first": Tap("act1", index=(0, 1)), "last": Tap("act1", index=(2, 3, 4)), "all": "act1"}
    data = [batch(7, seed=1), batch(3, seed=2)]
    kept = statistics_of(small_net(), taps, data, curvature="logits", rows=2, keep_rows=True)
    rows = kept.rows()
    assert torch.equal(torch.cat([rows["first"], rows["last"]], 1), rows["all"])
    cross = rows["first"].T @ rows["last"] / kept["all"].count
    assert relative_error(cross, kept["all"].S[:2, 2:]) < 1e-13


@pytest.mark.parametrize("reached_first", [True, False])
def test_a_group_that_the_loss_does_not_reach_has_rows_of_zeros(reached_first):
    torch.manual_seed(0)
    net, (x, y) = TwoHeads().double(), batch(8)
    taps = {"first": "first", "second": "second"}
    with collect(net, taps, curvature="empirical", keep_rows=True) as stats:
        for net.use_second in (reached_first, not reached_first):
            stats.backward(net(x), y)
    rows = stats.rows()
    assert len(rows["first"]) == len(rows["second"]) == 16
    reached, rest = rows["second"].split(8)[:: 1 if reached_first else -1]
    assert reached.abs().min() > 0 and not rest.any()


def test_rows_that_were_not_kept_are_an_error():
    stats = statistics_of(small_net(), {"g": "act1"}, [batch(3)])
    with pytest.raises(RuntimeError, match="keep_rows=True"):
        stats["g"].rows  # noqa: B018


def test_temperature_softens_the_labels_drawn_and_scales_their_gradient():
    net, (x, y) = small_net(), batch(4)
    T = 4.0
    jacobian = gate_jacobian(net, x, ["act1"], lambda z: (z / T).log_softmax(1))
    f = (net(x) / T).softmax(1).detach()
    expected = torch.einsum("nki,nk,nkj->ij", jacobian, f, jacobian) / len(x)
    stats = statistics_of(
        net, {"g": "act1"}, [(x, y)], curvature="sampled", temperature=T, rows=1500
    )
    assert relative_error(stats["g"].S, expected) < 0.06


def test_merged_collectors_equal_one():
    net = small_net()
    first, second = batch(6, seed=1), batch(4, seed=2)
    one = statistics_of(net, {"g": "act1"}, [first, second], curvature="empirical")
    merged = statistics_of(net, {"g": "act1"}, [first], curvature="empirical").merge(
        statistics_of(net, {"g": "act1"}, [second], curvature="empirical")
    )
    assert merged["g"].count == 10
    assert relative_error(merged["g"].S, one["g"].S) < 1e-14
    with pytest.raises(InputError, match="same groups and settings"):
        merged.merge(statistics_of(net, {"other": "act1"}, [first], curvature="empirical"))


def test_merging_joins_the_kept_rows():
    net = small_net()
    parts = [batch(6, seed=1), batch(4, seed=2)]
    settings = {"curvature": "empirical", "keep_rows": True}
    one = statistics_of(net, {"g": "act1"}, parts, **settings)
    first, second = (statistics_of(net, {"g": "act1"}, [part], **settings) for part in parts)
    assert torch.equal(first.merge(second)["g"].rows, one["g"].rows)
    with pytest.raises(InputError, match="keep_rows=True and False"):
        first.merge(statistics_of(net, {"g": "act1"}, parts, curvature="empirical"))


def test_state_dict_continues_to_the_same_bits(tmp_path):
    net = small_net()
    data = [batch(6, seed=1), batch(4, seed=2)]
    settings = {"curvature": "sampled", "rows": 2}
    whole = statistics_of(net, {"g": "act1"}, data, **settings)["g"]
    half = statistics_of(net, {"g": "act1"}, data[:1], **settings)
    torch.save(half.state_dict(), tmp_path / "s.pt")
    with collect(net, {"g": "act1"}, **settings) as stats:
        stats.load_state_dict(torch.load(tmp_path / "s.pt", weights_only=True))
        stats.backward(net(data[1][0]), data[1][1])
    assert torch.equal(stats["g"].S, whole.S) and torch.equal(stats["g"].u, whole.u)


def test_kept_rows_continue_from_a_state_dict(tmp_path):
    net = small_net()
    data = [batch(6, seed=1), batch(4, seed=2)]
    settings = {"curvature": "logits", "keep_rows": True}
    whole = statistics_of(net, {"g": "act1"}, data, **settings)["g"].rows
    half = statistics_of(net, {"g": "act1"}, data[:1], **settings).state_dict()
    torch.save(half, tmp_path / "s.pt")
    with collect(net, {"g": "act1"}, **settings) as stats:
        stats.load_state_dict(torch.load(tmp_path / "s.pt", weights_only=True))
        stats.backward(net(data[1][0]), data[1][1])
    assert torch.equal(stats["g"].rows, whole)
    without = collect(net, {"g": "act1"}, curvature="logits")
    with pytest.raises(InputError, match="keep_rows=False here"):
        without.load_state_dict(half)


WORKER = """
    import sys, torch, torch.distributed as dist
    from tests.test_statistics import batch, small_net, statistics_of
    rank, store, out = int(sys.argv[1]), sys.argv[2], sys.argv[3]
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    # Ragged: rank 0 has seven samples in two batches, rank 1 four in one.
    data = [batch(4, seed=0), batch(3, seed=1)] if rank == 0 else [batch(4, seed=2)]
    kept = {"curvature": "empirical", "keep_rows": True}
    stats = statistics_of(small_net(), {"g": "act1"}, data, **kept)
    stats.all_reduce()
    # A rank may have seen nothing at all.
    rest = statistics_of(small_net(), {"g": "act1"}, data[:rank], **kept)
    rest.all_reduce()
    # Groups of two widths share their messages.
    both = statistics_of(small_net(), {"g": "act1", "h": "head"}, data, curvature="empirical")
    both.all_reduce()
    nothing = statistics_of(small_net(), {"g": "act1"}, [], curvature="empirical").all_reduce()
    assert nothing["g"].count == 0
    torch.save(
        {
            "S": stats["g"].S, "u": stats["g"].u, "count": stats["g"].count,
            "rest": rest["g"].S, "rest count": rest["g"].count,
            "rows": stats["g"].rows, "rest rows": rest["g"].rows,
            "both": {n: (both[n].S, both[n].u, both[n].absolute, both[n].count) for n in "gh"},
        },
        f"{out}.{rank}",
    )
    dist.destroy_process_group()
"""


def test_sums_on_several_devices_are_not_reduced():
    stats = statistics_of(small_net(), {"g": "act1", "h": "head"}, [batch()], curvature="empirical")
    stats["h"].gram_sum = stats["h"].gram_sum.to("meta")
    with pytest.raises(InputError, match="must lie on one device, got cpu, meta"):
        stats.all_reduce()


@pytest.mark.skipif(
    not torch.distributed.is_gloo_available(), reason="torch was built without gloo"
)
def test_two_gloo_ranks_equal_one_process(tmp_path, pytestconfig):
    out = str(tmp_path / "rank")
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(WORKER), str(rank), str(tmp_path / "s"), out],
            cwd=pytestconfig.rootpath,
        )
        for rank in range(2)
    ]
    assert [w.wait(timeout=120) for w in workers] == [0, 0]
    ranks = [torch.load(f"{out}.{r}", weights_only=True) for r in range(2)]
    one = statistics_of(
        small_net(),
        {"g": "act1"},
        [batch(4, seed=0), batch(3, seed=1), batch(4, seed=2)],
        curvature="empirical",
        keep_rows=True,
    )["g"]
    for rank in ranks:
        assert torch.equal(rank["rows"], one.rows)
        assert torch.equal(rank["rest rows"], one.rows[7:])
    assert torch.equal(ranks[0]["S"], ranks[1]["S"])
    assert ranks[0]["count"] == one.count == 11
    assert relative_error(ranks[0]["S"], one.S) < 1e-14
    assert relative_error(ranks[0]["u"], one.u) < 1e-14
    taps = {"g": "act1", "h": "head"}
    both = statistics_of(
        small_net(),
        taps,
        [batch(4, seed=0), batch(3, seed=1), batch(4, seed=2)],
        curvature="empirical",
    )
    assert both["g"].S.shape != both["h"].S.shape
    for name in taps:
        S, u, absolute, count = ranks[1]["both"][name]
        assert relative_error(S, both[name].S) < 1e-14 and count == 11
        assert relative_error(u, both[name].u) < 1e-14
        assert relative_error(absolute, both[name].absolute) < 1e-14
    rest = statistics_of(small_net(), {"g": "act1"}, [batch(4, seed=2)], curvature="empirical")
    assert [r["rest count"] for r in ranks] == [4, 4]
    assert torch.equal(ranks[0]["rest"], rest["g"].S) and torch.equal(ranks[1]["rest"], rest["g"].S)


# --- manners -----------------------------------------------------------------------------------


def test_the_users_own_summed_backward_serves_the_empirical_curvature():
    net, (x, y) = small_net(), batch()
    expected = statistics_of(net, {"g": "act1"}, [(x, y)], curvature="empirical")["g"]
    with collect(net, {"g": "act1"}, curvature="empirical") as stats:
        F.cross_entropy(net(x), y, reduction="sum").backward()
    assert stats["g"].count == len(x)
    assert relative_error(stats["g"].S, expected.S) < 1e-12


def test_the_users_own_backward_is_refused_for_other_curvatures():
    net, (x, y) = small_net(), batch()
    with (
        collect(net, {"g": "act1"}, curvature="logits"),
        pytest.raises(RuntimeError, match="call stats.backward"),
    ):
        F.cross_entropy(net(x), y, reduction="sum").backward()


def test_two_losses_of_one_forward_add_up_per_sample():
    net, (x, y) = small_net(), batch()
    with collect(net, {"g": "act1"}, curvature="empirical") as stats:
        z = net(x)
        F.cross_entropy(z, y, reduction="sum").backward(retain_graph=True)
        F.cross_entropy(z, y, reduction="sum").backward()
    expected = statistics_of(net, {"g": "act1"}, [(x, y)], curvature="empirical")["g"]
    assert stats["g"].count == len(x)
    assert relative_error(stats["g"].S, 4 * expected.S) < 1e-12


def test_the_model_leaves_the_block_as_it_entered():
    net, (x, y) = small_net(), batch()
    net.train()
    net.conv2.weight.requires_grad_(False)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    statistics_of(net, {"g": "act1"}, [(x, y)])
    assert all(m.training for m in net.modules())
    assert [p.requires_grad for p in net.parameters()].count(False) == 1
    assert all(p.grad is None for p in net.parameters())
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert not net.act1._forward_hooks and not net._forward_hooks and not net._forward_pre_hooks


def test_an_exception_inside_the_block_also_restores_the_model():
    net = small_net().train()
    with pytest.raises(KeyboardInterrupt), collect(net, {"g": "act1"}):
        raise KeyboardInterrupt
    assert net.bn1.training and net.conv1.weight.requires_grad and not net.act1._forward_hooks


def test_parameter_gradients_can_be_kept():
    net, (x, y) = small_net(), batch()
    with collect(net, {"g": "act1"}, curvature="empirical", parameter_gradients=True):
        F.cross_entropy(net(x), y, reduction="sum").backward()
    expected = torch.autograd.grad(F.cross_entropy(net(x), y, reduction="sum"), net.conv1.weight)
    assert torch.allclose(net.conv1.weight.grad, expected[0])


def test_accumulated_gradients_and_statistics_are_those_of_the_whole_batch():
    net, (x, y) = small_net(), batch(9)
    parts = [(x[:5], y[:5]), (x[5:], y[5:])]

    def accumulate() -> dict[str, Tensor]:
        net.zero_grad()
        for part in parts:
            F.cross_entropy(net(part[0]), part[1], reduction="sum").backward()
        return {name: parameter.grad.clone() for name, parameter in net.named_parameters()}

    taps = {"gate": "act1", "conv": "conv2"}
    whole = statistics_of(net, taps, [(x, y)], curvature="empirical")
    plain = accumulate()
    with collect(net, taps, curvature="empirical", parameter_gradients=True) as stats:
        beside = accumulate()
    for name, gradient in plain.items():
        assert torch.equal(beside[name], gradient)
    for name in taps:
        assert stats[name].count == 9
        assert relative_error(stats[name].S, whole[name].S) < 1e-12
        assert relative_error(stats[name].u, whole[name].u) < 1e-12


def test_batchnorm_put_into_training_mode_inside_the_block_is_an_error():
    net, (x, _) = small_net(), batch()
    with collect(net, {"g": "act1"}), pytest.raises(RuntimeError, match="BatchNorm 'bn1'.*eval"):
        net.train()
        net(x)


def test_evaluation_inside_the_block_is_not_counted():
    net, (x, y) = small_net(), batch()
    with collect(net, {"g": "act1"}) as stats:
        with torch.no_grad():
            net(x)
        outputs = net(x)
        with torch.inference_mode():
            net(x)
        stats.backward(outputs, y)
    assert stats["g"].count == len(x)


def test_repeated_runs_give_equal_bits():
    net, data = small_net(dtype=torch.float32), [batch(dtype=torch.float32)]
    runs = [statistics_of(net, {"g": "act1"}, data, curvature="logits", seed=4) for _ in range(2)]
    assert torch.equal(runs[0]["g"].S, runs[1]["g"].S)
    assert torch.equal(runs[0]["g"].S, runs[0]["g"].S.T)


@pytest.mark.gpu
@pytest.mark.parametrize("channels_last", [False, True])
def test_a_gpu_collects_what_the_cpu_collects(cuda, channels_last):
    taps = {"conv": "conv1", "gates": ["act1", "bn2"]}
    data = [batch(64, seed=s, dtype=torch.float32) for s in range(3)]
    layout = torch.channels_last if channels_last else torch.contiguous_format
    net = small_net(dtype=torch.float32, inplace=True).to(cuda, memory_format=layout)
    there = [(x.to(cuda, memory_format=layout), y.to(cuda)) for x, y in data]
    stats = statistics_of(net, taps, there, site="weight", curvature="empirical")
    expected = statistics_of(
        small_net(), taps, [(x.double(), y) for x, y in data], site="weight", curvature="empirical"
    )
    for name in taps:
        assert stats[name].S.is_cuda and stats[name].count == expected[name].count
        assert relative_error(stats[name].S.cpu(), expected[name].S) < 1e-4
        assert relative_error(stats[name].u.cpu(), expected[name].u) < 1e-4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"site": "weights"}, "site must be one of gate, weight; got 'weights'"),
        ({"curvature": "hessian"}, "curvature must be one of .*; got 'hessian'"),
        ({"loss": "mse"}, "loss must be one of .*; got 'mse'"),
        ({"rows": 0}, "rows must be a positive integer, got 0"),
        ({"temperature": -1.0}, "temperature must be positive, got -1.0"),
        ({"temperature": "a"}, "temperature must be positive, got 'a'"),
        ({"seed": 2**70}, "seed must be an integer from 0"),
        ({"parameter_gradients": True}, "needs curvature='empirical', got curvature='logits'"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(InputError, match=message):
        collect(small_net(), {"g": "act1"}, **options)


def test_bad_input_is_named():
    net, (x, y) = small_net(), batch()
    with pytest.raises(InputError, match="no module 'act9'"):
        collect(net, {"g": "act9"})
    with (
        pytest.raises(InputError, match="BatchNorm '0' has no running statistics"),
        collect(nn.Sequential(nn.BatchNorm2d(3, track_running_stats=False)), {"g": "0"}),
    ):
        pass
    with pytest.raises(InputError, match="nothing to observe"):
        collect(net, {})
    with (
        collect(net, {"g": Tap("conv1", port="input")}),
        pytest.raises(InputError, match="no layer made it"),
    ):
        net(x)
    with collect(net, {"g": "act1"}) as stats:
        with pytest.raises(InputError, match="outputs carry no gradient"):
            stats.backward(net(x).detach(), y)
        for targets, message in [
            (y + CLASSES, r"targets must lie in 0\.\.3, got \d"),
            (y - 100, r"targets must lie in 0\.\.3, got -"),
            (y[:3], r"targets must be int64 \[9\]"),
            (torch.rand(9, 7), r"targets must have the outputs' shape \[9, 4\], got \[9, 7\]"),
            (None, "needs targets, got None"),
        ]:
            with pytest.raises(InputError, match=message):
                stats.backward(net(x), targets)
    with pytest.raises(RuntimeError, match="no sample seen"):
        stats["g"].S  # noqa: B018
    without_u = statistics_of(net, {"g": "act1"}, [(x, y)], first_order=False)
    with pytest.raises(RuntimeError, match="first_order=True"):
        without_u["g"].u  # noqa: B018
