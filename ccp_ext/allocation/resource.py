"""What a model costs as a function of its groups' widths: a form of degree two, plus tables.

A convolution between two groups costs the product of their widths, a normalisation its width, and
a layer that reads a concatenation a sum of products. Written out so, a cost can be minimised term
by term, where a function that returns one number can only be tried.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np

Width = int | np.ndarray


@dataclass(frozen=True)
class Affine:
    """The size of one side of a layer: ``constant + sum_g weights[g] * keep[g]``."""

    constant: int
    weights: Mapping[str, int] = field(default_factory=dict)

    def __call__(self, keep: Mapping[str, Width]) -> Width:
        return self.constant + sum(weight * keep[name] for name, weight in self.weights.items())


@dataclass(frozen=True)
class Table:
    """A cost that only a table knows: ``value(out, inputs)`` for the two sides of a layer.

    Attributes:
        out, inputs: the sides as functions of the keep counts.
        value: takes integer arrays that broadcast together.
        at_least: the least value at these widths or wider ones.
        steps: for each side, a function that is the same for widths with the same values.
    """

    out: Affine
    inputs: Affine
    value: Callable[[Width, Width], np.ndarray]
    at_least: Callable[[Width, Width], np.ndarray]
    steps: tuple[Callable[[Width], np.ndarray], Callable[[Width], np.ndarray]]

    @property
    def groups(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys((*self.out.weights, *self.inputs.weights)))

    def __call__(self, keep: Mapping[str, Width]) -> np.ndarray:
        return self.value(self.out(keep), self.inputs(keep))


@dataclass(frozen=True)
class Resource:
    """A cost of a model, for keep counts n_g of its groups:

        constant + sum_g linear[g] n_g + sum_{a,b} products[a, b] n_a n_b + sum of the tables.

    The coefficients are not negative.

    Attributes:
        products: each pair of groups once; (a, a) is a square.
    """

    constant: float = 0
    linear: Mapping[str, float] = field(default_factory=dict)
    products: Mapping[tuple[str, str], float] = field(default_factory=dict)
    tables: tuple[Table, ...] = ()

    def __call__(self, keep: Mapping[str, int]) -> float:
        """The cost, an exact integer if the coefficients are and there is no table."""
        total = self.constant
        total += sum(c * keep[name] for name, c in self.linear.items())
        total += sum(c * keep[a] * keep[b] for (a, b), c in self.products.items())
        return total + sum(float(table(keep)) for table in self.tables)

    @classmethod
    def of_products(cls, constant: int, terms: Iterable[tuple[int, Affine, Affine]]) -> Resource:
        """``constant`` plus the sum of coefficient * first * second over the terms."""
        linear: dict[str, int] = {}
        products: dict[tuple[str, str], int] = {}
        for coefficient, first, second in terms:
            constant += coefficient * first.constant * second.constant
            for one, other in ((first, second), (second, first)):
                for name, weight in one.weights.items():
                    linear[name] = linear.get(name, 0) + coefficient * weight * other.constant
            for a, weight in first.weights.items():
                for b, other_weight in second.weights.items():
                    pair = (b, a) if (b, a) in products else (a, b)
                    value = coefficient * weight * other_weight
                    products[pair] = products.get(pair, 0) + value
        return cls(
            constant,
            {name: c for name, c in linear.items() if c},
            {pair: c for pair, c in products.items() if c},
        )
