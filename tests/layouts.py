"""Tensors in every memory layout, and what holds of an operator whatever the layout."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

FLOATING = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def contiguous(shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape)


def channels_last(shape: tuple[int, ...]) -> Tensor:
    order = [0, *range(2, len(shape)), 1]
    return torch.randn([shape[d] for d in order]).movedim(-1, 1)


def slice_of_channels(shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape[0], shape[1] + 5, *shape[2:])[:, 3 : 3 + shape[1]]


def cropped(shape: tuple[int, ...]) -> Tensor:
    larger = torch.randn(*shape[:2], *(size + 2 for size in shape[2:]))
    return larger[(slice(None), slice(None), *(slice(1, -1) for _ in shape[2:]))]


def cropped_channels_last(shape: tuple[int, ...]) -> Tensor:
    larger = channels_last((*shape[:2], *(size + 2 for size in shape[2:])))
    return larger[(slice(None), slice(None), *(slice(1, -1) for _ in shape[2:]))]


def misaligned(shape: tuple[int, ...]) -> Tensor:
    return torch.randn(torch.Size(shape).numel() + 1)[1:].view(shape)


def reversed_dims(shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape[::-1]).permute(*range(len(shape) - 1, -1, -1))


def expanded_scalar(shape: tuple[int, ...]) -> Tensor:
    return torch.randn(()).expand(shape)


def expanded_positions(shape: tuple[int, ...]) -> Tensor:
    return torch.randn(*shape[:2], *(1 for _ in shape[2:])).expand(shape)


Maker = Callable[[tuple[int, ...]], Tensor]
SAME_LAYOUTS = [contiguous, channels_last, slice_of_channels, cropped, cropped_channels_last]
LAYOUTS = [(maker, maker) for maker in [*SAME_LAYOUTS, misaligned, reversed_dims]] + [
    (contiguous, channels_last),
    (channels_last, contiguous),
    (cropped, misaligned),
    (contiguous, expanded_scalar),
    (channels_last, expanded_scalar),
    (contiguous, expanded_positions),
    (channels_last, expanded_positions),
    (expanded_positions, contiguous),
    (reversed_dims, contiguous),
]


def converted(tensor: Tensor, dtype: torch.dtype, device: str) -> Tensor:
    """The same values in another dtype and device, with the same strides, holes included."""
    elements = tensor.untyped_storage().nbytes() // tensor.element_size()
    storage = tensor.as_strided((elements,), (1,), 0)
    storage = storage.to(device=device, dtype=dtype)
    return storage.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def view_amid_nan(layout: Maker, device: str) -> Tensor:
    """A cropped view ``[2, 5, 5, 6]`` of a tensor that is NaN elsewhere."""
    x = torch.full((2, 7, 9, 9), torch.nan)
    x = x.contiguous(memory_format=torch.channels_last) if layout is channels_last else x
    x[:, 1:6, 2:7, 2:8] = torch.randn(2, 5, 5, 6)
    return x.to(device)[:, 1:6, 2:7, 2:8]


def assert_equal_bits_with_any_threads(compute: Callable[[], Tensor]) -> None:
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 2, 3):
            torch.set_num_threads(count)
            results.append(compute())
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(results[0], other) for other in results[1:])
