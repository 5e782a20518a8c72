"""The quadratic cost that every criterion produces."""

from __future__ import annotations

import pytest
import torch

from ccp_ext.cost import Cost


def test_objective_is_half_the_quadratic_form_minus_the_linear_term():
    S = torch.tensor([[2.0, 1.0, 0.0], [1.0, 4.0, -1.0], [0.0, -1.0, 6.0]])
    u = torch.tensor([0.5, -0.25, 1.0])
    removed = torch.tensor([True, True, False])
    assert Cost(S, u).objective(removed) == 0.5 * (2 + 4 + 2 * 1) - 0.25
    assert Cost(S).objective(removed) == 4.0
    assert Cost(u=u).objective(removed) == -0.25
    assert Cost(S).diagonal().objective(removed) == 3.0


def test_a_cost_needs_a_term():
    with pytest.raises(ValueError, match="S and u are both None"):
        Cost()
    assert Cost(u=torch.zeros(4)).channels == Cost(S=torch.zeros(4, 4)).channels == 4
