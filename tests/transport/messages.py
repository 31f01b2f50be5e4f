"""Trees and messages that the tests of this folder share."""

from __future__ import annotations

import numpy as np
import torch
from fuzz.wire_harness import ENVELOPE

from fedlora.core.tree import Tree
from fedlora.transport import Float32, Form, Packet, Precision, pack
from fedlora.transport.framing import varint

DENSE, BITMAP, CODED, POOLED, SEEDED, BOX, MIXED = 1, 2, 3, 4, 5, 6, 255


def one(values) -> dict[str, Tree]:
    """One part of one tensor."""
    return {"p": {"x": torch.as_tensor(values, dtype=torch.float32)}}


def packed(parts, precision: Precision | None = None, **form) -> Packet:
    """All parts in one number format."""
    return pack(parts, dict.fromkeys(parts, Form(precision or Float32(), **form)))


def body(parts, precision: Precision | None = None, **form) -> bytes:
    return packed(parts, precision, **form).raw[ENVELOPE:]


def bits(tensor) -> list[int]:
    """What tells two floats apart that compare equal."""
    return tensor.detach().reshape(-1).numpy().view(np.int32).tolist()


def same(left, right) -> bool:
    """Whether two messages' trees agree bit for bit, in names, order and shapes too."""
    return list(left) == list(right) and all(
        list(left[part]) == list(right[part])
        and all(
            left[part][name].shape == value.shape
            and np.array_equal(
                left[part][name].contiguous().numpy().reshape(-1).view(np.int32),
                value.contiguous().numpy().reshape(-1).view(np.int32),
            )
            for name, value in right[part].items()
        )
        for part in right
    )


def digits(*values: int) -> int:
    """Bytes of these counts."""
    return sum(len(varint(value)) for value in values)


def random_mask_tree(size: int, density: float, num_tensors: int = 1, seed: int = 0) -> Tree:
    """Exactly int(size * density) normal values at random places."""
    rng = np.random.default_rng(seed)
    values = np.zeros(size, np.float32)
    kept = rng.permutation(size)[: int(size * density)]
    values[kept] = rng.standard_normal(len(kept)) + 10
    return {f"t{i}": torch.tensor(part) for i, part in enumerate(np.array_split(values, num_tensors))}
