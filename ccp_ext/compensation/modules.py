"""Whole modules of a pruned model, fitted to what the plain model's modules give."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp

from ccp_ext.compensation.branches import Folded
from ccp_ext.compensation.gauss_newton import (
    Network,
    Parameters,
    Precondition,
    Samples,
    channels_last,
    gram_with_ones,
    improve,
    kronecker_inverse,
)
from ccp_ext.compensation.holding import GIBIBYTE, too_wide
from ccp_ext.compensation.layers import Layer, as_input, evaluating, find_layers
from ccp_ext.compensation.refitting import MEMORY
from ccp_ext.datasets.image_set import ImageSet
from ccp_ext.errors import InputError
from ccp_ext.graph import Tap
from ccp_ext.passes import Walk, tapped
from ccp_ext.patches import as_maps
from ccp_ext.progress import tqdm

# Output positions that determine a step; about so many, of all images together.
_POSITIONS = 1 << 19
# Of these, as many as go through a module together.
_SAMPLE_POSITIONS = 1 << 14
# Every so manieth sample makes the preconditioner.
_PRECONDITIONING = 4
# Of the largest output, as much may a copy with folded BatchNorms differ.
_TOLERANCE = 1e-3


def refit_modules(
    model: nn.Module,
    slim: nn.Module,
    images: ImageSet,
    modules: Sequence[str] | None = None,
    *,
    steps: int = 2,
    iterations: int = 8,
    memory: float = MEMORY,
    batch_size: int = 128,
    seed: int = 0,
    progress: bool = True,
) -> dict[str, float]:
    """Fit all convolutions of a module together, so that it gives the plain model's output again.

    :func:`ccp_ext.refit` wants each layer's own output back. What lies inside of a module is
    nobody's concern: here its layers take Gauss-Newton steps together toward the module's output
    alone, on what the slim model, repaired up to there, gives it as input. That is block
    reconstruction (BRECQ, Li et al., ICLR 2021) of a pruned network, by second-order steps (see
    :func:`ccp_ext.compensation.gauss_newton.improve`) from where a refit has left it. No labels
    and no loss of the network enter.

    The convolutions (not grouped) and linear layers with a place for a constant take part: their
    weights, and their biases or those of the BatchNorms behind them. A module with many of them
    needs many images: the last stage of ResNet-56 overfits 2,500 of 32x32.

    Args:
        model: the plain model.
        slim: the pruned one, from :func:`ccp_ext.prune` and repaired; changed in place.
        images: training images. The first of them are used: the larger the maps of a module's
            output, the fewer.
        modules: paths of modules that take one tensor and give one, in the order of the forward
            pass; a layer is one too. By default the children of the model that can be fitted, give
            as many channels as before, and hold layers that lost inputs or the last layer.
        steps: Gauss-Newton steps of a module, each from where the last one has led, at least 1.
        iterations: of the conjugate gradients that solve for a step, at least 1.
        memory: GiB for inputs and targets of one module, whose images are fewer if need be. The
            widest layers stay as they are where the normal equations of all of a module's would
            take more than half of it.
        batch_size: images that go through the models together up to the module.
        seed: of the random signs that make the preconditioner.

    Returns:
        By module the squared error of its output, as a part of what it was before.

    Raises:
        InputError: ``slim`` is not a pruned ``model``, an option is out of range, or a module is
            not as described.
    """
    for name, value in (("steps", steps), ("iterations", iterations)):
        if value < 1:
            raise InputError(f"refit_modules: {name} must be 1 or more, got {value!r}")
    if not 0 < memory < math.inf:
        raise InputError(f"refit_modules: memory must be a positive number of GiB, got {memory!r}")
    size = memory * GIBIBYTE
    layers = find_layers(model, slim, images)
    example = images.normalise(images.images[:1])
    left: dict[str, float] = {}
    with evaluating(model), evaluating(slim):
        wanted = _children(layers) if modules is None else modules
        solvable = {path: _solvable(path, layers, size) for path in wanted}
        complaints = {k: _complaint(model, slim, k, v, example) for k, v in solvable.items()}
        for path, complaint in complaints.items():
            if complaint and modules is not None:
                raise InputError(f"refit_modules: {path!r} {complaint}")
        fitting = [path for path, complaint in complaints.items() if not complaint]
        for path in tqdm(fitting, "refit modules", disable=not progress, leave=False):
            x = _seen(slim, Tap(path, "input"), example)
            network = FoldedModule.of(slim, path, solvable[path], x, seed)
            samples = _samples(model, slim, path, images, network.positions(x), batch_size, size)
            left[path] = _fit(network, samples, steps, iterations)
    return left


def _fit(network: FoldedModule, samples: Samples, steps: int, iterations: int) -> float:
    start = network.get()
    before = network.loss(start, samples)
    moved = start
    for step in range(steps):
        moved = improve(replace(network, seed=network.seed + step), moved, samples, iterations)
    network.put(moved)
    return network.loss(moved, samples) / before if before else 1.0


@dataclass(frozen=True)
class FoldedModule(Network):
    """A module as a function of its layers' weights and constants, with BatchNorms folded in.

    Attributes:
        module: a copy, whose BatchNorms behind the layers do nothing.
        layers: by path in the module, those of the model itself.
        seed: of the preconditioner's random signs.
    """

    module: nn.Module
    layers: dict[str, Folded]
    seed: int

    @classmethod
    def of(
        cls, model: nn.Module, path: str, layers: Sequence[Layer], x: Tensor, seed: int
    ) -> FoldedModule:
        """
        Args:
            x: an input of the module, to test the copy by.

        Raises:
            InputError: no layer can take part, the copy does not give what the module does, or it
                has no forward-mode derivatives.
        """
        original = model.get_submodule(path)
        found = dict(_folded(path, layers))
        if not found:
            raise InputError(f"refit_modules: {path!r} has no layer that can take part")
        network = cls(copy.deepcopy(original), {k: f for k, (f, _) in found.items()}, seed)
        for name, (folded, norm) in found.items():
            layer = network.module.get_submodule(name)
            layer.bias = nn.Parameter(torch.zeros_like(folded.get()[1]))
            if norm:
                network.module.set_submodule(norm, nn.Identity())
        network.module.requires_grad_(False)
        start, expected = network.get(), original(x.clone())
        tolerance = max(_TOLERANCE, 8 * torch.finfo(x.dtype).eps)
        if not (network(start, x) - expected).abs().max() <= tolerance * expected.abs().max():
            raise InputError(
                f"refit_modules: {path!r} has something that reads the input of a BatchNorm "
                "besides it"
            )
        try:
            jvp(lambda p: network(p, x), (start,), (start,))
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # what lacks a rule raises this or NotImplementedError
            raise InputError(
                f"refit_modules: {path!r} has no forward-mode derivatives: "
                f"{str(error).partition('.')[0]}"
            ) from error
        return network

    def positions(self, x: Tensor) -> int:
        """Of the output for one image."""
        last = self.module.get_submodule(list(self.layers)[-1])
        return math.prod(as_maps(last, self(self.get(), x)).shape[2:])

    def get(self) -> Parameters:
        return tuple(value for layer in self.layers.values() for value in layer.get())

    def put(self, parameters: Parameters) -> None:
        pairs = zip(parameters[::2], parameters[1::2], strict=True)
        for layer, (weight, constant) in zip(self.layers.values(), pairs, strict=True):
            layer.put(weight, constant)

    def __call__(self, parameters: Parameters, x: Tensor) -> Tensor:
        # The module may change its input in place.
        return functional_call(self.module, self._named(parameters), (x.clone(),))

    def preconditioner(self, parameters: Parameters, samples: Samples) -> Precondition:
        """Inverses of Kronecker products near the layers' blocks of J'J (K-FAC).

        The right factor is made of the layer's inputs, the left one of derivatives of the sum of
        outputs with random signs.
        """
        generator = torch.Generator().manual_seed(self.seed)
        left = dict.fromkeys(self.layers, 0.0)
        right = dict.fromkeys(self.layers, 0.0)
        outputs: dict[str, Tensor] = {}

        def see(path: str, layer: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor:
            right[path] = right[path] + gram_with_ones(layer, args[0].detach())
            outputs[path] = output.requires_grad_()
            return output.clone()  # what follows may change it in place

        with contextlib.ExitStack() as stack:
            for path in self.layers:
                layer = self.module.get_submodule(path)
                hook = layer.register_forward_hook(
                    lambda layer, args, output, path=path: see(path, layer, args, output)
                )
                stack.callback(hook.remove)
            for x, target in samples[::_PRECONDITIONING]:
                signs = torch.randint(0, 2, target.shape, generator=generator).to(target) * 2 - 1
                with torch.enable_grad():
                    y = self(parameters, x)
                gradients = torch.autograd.grad(y, list(outputs.values()), signs)
                for path, gradient in zip(outputs, gradients, strict=True):
                    layer = self.module.get_submodule(path)
                    rows = as_maps(layer, gradient).transpose(0, 1).flatten(1)
                    left[path] = left[path] + rows @ rows.T
        return kronecker_inverse(
            [(left[path] / right[path][-1, -1].to(left[path]), right[path]) for path in self.layers]
        )

    def _named(self, parameters: Parameters) -> dict[str, Tensor]:
        layers = [self.module.get_submodule(path) for path in self.layers]
        own = {id(value): name for name, value in self.module.named_parameters()}
        names = [own[id(value)] for layer in layers for value in (layer.weight, layer.bias)]
        return dict(zip(names, parameters, strict=True))


def _folded(path: str, layers: Sequence[Layer]) -> Iterator[tuple[str, tuple[Folded, str | None]]]:
    """Of the module's layers that run once and have a place for a constant there: path in the
    module, empty for itself, with that of the BatchNorm behind it."""
    shared = [norm for layer in layers for norm in layer.norms]
    for layer in layers:
        name = "" if layer.path == path else layer.path.removeprefix(f"{path}.")
        inside = all(norm.startswith(f"{path}.") for norm in layer.norms)
        if name == layer.path or layer.calls != 1 or len(layer.norms) > 1 or not inside:
            continue
        ((norm, (_, own)),) = layer.norms.items() or ((None, (None, None)),)
        if shared.count(norm) <= 1 and (own or layer.slim).bias is not None:
            yield name, (Folded(layer.slim, own), norm and norm.removeprefix(f"{path}."))


def _children(layers: Sequence[Layer]) -> list[str]:
    """The model's children, in the order of the pass, with layers that were cut or the last."""
    chosen = [layer for layer in layers if layer.cut or layer is layers[-1]]
    return list(dict.fromkeys(layer.path.partition(".")[0] for layer in chosen))


def _solvable(path: str, layers: Sequence[Layer], memory: float) -> list[Layer]:
    """The module's layers, but for the widest if the normal equations of all do not fit."""
    chosen, side = set(), 0.0
    for layer in sorted(layers, key=lambda layer: layer.features):
        if layer.path == path or layer.path.startswith(f"{path}."):
            side = math.hypot(side, layer.features)
            if not too_wide(side, memory):
                chosen.add(layer.path)
    return [layer for layer in layers if layer.path in chosen]


def _complaint(
    model: nn.Module, slim: nn.Module, path: str, layers: Sequence[Layer], example: Tensor
) -> str | None:
    """Why a module cannot be fitted, by a pass of both models on one image."""
    seen: list[Tensor | None] = []

    def see(module: nn.Module, args: tuple, kwargs: dict, output: object) -> None:
        fits = not kwargs and len(args) == 1 and isinstance(args[0], Tensor)
        seen.append(output if fits and isinstance(output, Tensor) else None)

    for net in (model, slim):
        module = dict(net.named_modules()).get(path)
        if module is None or module is net:
            return "is not a module inside of the model"
        hook = module.register_forward_hook(see, with_kwargs=True)
        try:
            net(as_input(net, example))
        finally:
            hook.remove()
    if len(seen) != 2 or any(output is None for output in seen):
        return "does not run once, from one tensor to one"
    if seen[0].shape != seen[1].shape:
        return "gives fewer channels than that of the plain model"
    try:
        FoldedModule.of(slim, path, layers, _seen(slim, Tap(path, "input"), example), 0)
    except InputError as error:
        return str(error).partition(f"{path!r} ")[2]
    return None


def _samples(
    model: nn.Module,
    slim: nn.Module,
    path: str,
    images: ImageSet,
    positions: int,
    batch_size: int,
    memory: float,
) -> list[tuple[Tensor, Tensor]]:
    """Inputs of the slim model's module and outputs of the plain one's, of the first images."""

    def pair(batch: Tensor) -> tuple[Tensor, Tensor]:
        return _seen(slim, Tap(path, "input"), batch), _seen(model, Tap(path), batch)

    fitting = int(memory / sum(maps.nbytes for maps in pair(images.normalise(images.images[:1]))))
    wanted = max(1, min(fitting, math.ceil(_POSITIONS / positions), len(images)))
    part = max(1, _SAMPLE_POSITIONS // positions)
    samples: list[tuple[Tensor, Tensor]] = []
    for batch, _ in images.subset(range(wanted)).batches(min(batch_size, wanted)):
        parts = (channels_last(maps).split(part) for maps in pair(batch))
        samples += zip(*parts, strict=True)
    return samples


def _seen(model: nn.Module, tap: Tap, x: Tensor) -> Tensor:
    """The tensor at the tap; the pass goes no further."""
    with tapped(model, {tap: tap}) as reader:
        walk = Walk(reader, as_input(model, x), lambda _, tensor: tensor.clone())
        with contextlib.closing(walk):
            walk.until(tap)
            return walk.seen[tap][0]
