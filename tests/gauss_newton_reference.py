"""Gauss-Newton steps by dense linear algebra."""

from __future__ import annotations

import torch

from ccp_ext.compensation.gauss_newton import Network, Parameters, Samples


def changes_of_outputs(
    network: Network, start: Parameters, moved: Parameters, samples: Samples
) -> tuple[torch.Tensor, torch.Tensor]:
    """J times what was moved, and J times the least step that solves min |J d - (y - f)|^2.

    The steps themselves differ in what the outputs do not depend on, as the scales that a ReLU
    lets through.
    """
    outputs = [lambda p, x=x: network(p, x).flatten() for x, _ in samples]
    jacobian = torch.cat(
        [torch.cat([j.flatten(1) for j in torch.func.jacrev(f)(start)], 1) for f in outputs]
    )
    error = torch.cat([(y - network(start, x)).flatten() for x, y in samples])
    step = torch.linalg.lstsq(jacobian, error.unsqueeze(1), driver="gelsd").solution.squeeze(1)
    taken = torch.cat([(b - a).flatten() for a, b in zip(start, moved, strict=True)])
    return jacobian @ taken, jacobian @ step
