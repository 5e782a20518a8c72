"""The layers of a pruned model beside those of the plain one."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ccp_ext.activations import input_tap, read_at
from ccp_ext.compensation.branches import Branch, norm_factor
from ccp_ext.cutting import CONVOLUTIONS, Cut, fingerprint
from ccp_ext.datasets.image_set import ImageSet
from ccp_ext.errors import InputError
from ccp_ext.evaluation import place, training_flags_kept
from ccp_ext.graph import Tap


@dataclasses.dataclass
class Layer:
    """A convolution or linear layer in both models.

    Attributes:
        outputs, inputs: what stays of the plain one's.
        cut: whether it lost inputs.
        norms: by path the BatchNorm layers, in both models, that read the output.
        addend: where to read what the output is added to.
        block: path of a module around the layer and its addend, which takes one tensor, if the
            layer, or its branch, runs before its addend is there.
        branch: it and the convolution that feeds it, if both take a step together.
        only_constant: it has too many features to be solved.
        calls: in one forward pass.
    """

    path: str
    plain: nn.Module
    slim: nn.Module
    outputs: Tensor
    inputs: Tensor
    cut: bool
    calls: int = 0
    norms: dict[str, tuple[_BatchNorm, _BatchNorm]] = dataclasses.field(default_factory=dict)
    addend: Tap | None = None
    block: str | None = None
    branch: Branch | None = None
    only_constant: bool = False

    @property
    def takes_constant(self) -> bool:
        return self.slim.bias is not None or bool(self.norms)

    @property
    def entry(self) -> Tap:
        """Where a pass of the slim model halts first for it: before its branch, or itself."""
        if self.branch:
            return Tap(self.branch.path, "input")
        return input_tap(self.slim, self.path)

    @property
    def features(self) -> int:
        """Values that an output position reads: the side of its normal equations."""
        return self.slim.weight[0].numel()

    @property
    def widest(self) -> int:
        """The largest side of all equations that its refit takes."""
        own = 0 if self.only_constant else self.features
        return max(own, self.branch.features if self.branch else 0)

    def lost(self, x: Tensor) -> Tensor:
        """Of the plain input x, what the removed channels contribute to the outputs that stay."""
        gone = torch.ones(self.plain.weight.shape[1], dtype=torch.bool, device=x.device)
        gone[self.inputs] = False
        weight = self.plain.weight[self.outputs][:, gone]
        if isinstance(self.plain, nn.Linear):
            return nn.functional.linear(x[..., gone], weight).movedim(-1, 1)
        return self.plain._conv_forward(x[:, gone], weight, None)

    def set_constant(self, constant: Tensor, *, with_bias: bool = False) -> None:
        """Let the layer add ``constant`` [O]; ``with_bias``: the plain bias is in it already."""
        shift: Tensor | float = constant
        if self.slim.bias is not None:
            own = 0.0 if with_bias else self.plain.bias.detach()[self.outputs]
            self.slim.bias.data.copy_(own + constant)
            shift = 0.0
        for plain, slim in self.norms.values():
            slim.running_mean.copy_(plain.running_mean[self.outputs] - shift)
            slim.running_var.copy_(plain.running_var[self.outputs])

    def before_norm(self, addend: Tensor) -> Tensor:
        """What the layer must give so that its BatchNorm, if any, gives the addend [N, O, ...].

        Zero where the BatchNorm's factor is: nothing that the layer does changes that channel.
        """
        for plain, _ in self.norms.values():
            factor = norm_factor(plain)[self.outputs].view(-1, *[1] * (addend.dim() - 2))
            addend = torch.where(factor == 0, 0.0, addend / factor)
        return addend


def find_layers(model: nn.Module, slim: nn.Module, images: ImageSet) -> list[Layer]:
    """Every layer that is not grouped, in the order of the forward pass.

    The slim model runs on one image for it.

    Raises:
        InputError: ``slim`` is not a pruned ``model``, or they are on different devices.
    """
    plan = getattr(slim, "ccp_plan", None)
    if plan is None or plan.fingerprint != fingerprint(model):
        raise InputError("compensation: slim must be the given model after ccp_ext.prune")
    if place(slim, None) != place(model, None):
        raise InputError(
            f"compensation: the model is on {place(model, None)}, slim on {place(slim, None)}; put "
            "both on one device"
        )
    modules, plain_modules = dict(slim.named_modules()), dict(model.named_modules())
    device = place(slim, None)
    layers = {}
    for path, module in modules.items():
        if isinstance(module, (*CONVOLUTIONS, nn.Linear)) and getattr(module, "groups", 1) == 1:
            plain, cut = plain_modules[path], plan.modules.get(path, Cut())
            outputs, inputs = map(range, plain.weight.shape[:2])
            index = (
                torch.tensor(list(p), device=device)
                for p in (cut.out or outputs, cut.inputs or inputs)
            )
            layers[path] = Layer(path, plain, module, *index, cut=cut.inputs is not None)
    order: list[Layer] = []
    made: dict[int, tuple[Layer, Tensor]] = {}  # the tensors stay alive, so ids are unique

    def leave(layer: Layer, output: Tensor) -> None:
        layer.calls += 1
        made[id(output)] = layer, output
        if layer.calls == 1:
            order.append(layer)

    def enter(path: str, x: Tensor) -> None:
        if id(x) in made:
            made[id(x)][0].norms[path] = plain_modules[path], modules[path]

    with contextlib.ExitStack() as stack:
        for path, layer in layers.items():
            stack.callback(read_at(slim, Tap(path), partial(leave, layer)).remove)
        for path, module in modules.items():
            if isinstance(module, _BatchNorm) and module.running_mean is not None:
                stack.callback(read_at(slim, Tap(path, "input"), partial(enter, path)).remove)
        with evaluating(slim):
            slim(as_input(slim, images.normalise(images.images[:1])))
    return order


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradients, inside the block."""
    with training_flags_kept(model), torch.no_grad():
        model.eval()
        yield


def as_input(model: nn.Module, x: Tensor) -> Tensor:
    """x on the model's device and in its dtype."""
    parameter = next(model.parameters())
    return x.to(parameter.device, parameter.dtype)
