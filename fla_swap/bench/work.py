"""The least an operator can do: bytes it must move, operations it must make, and the time that takes on this GPU.

Floor = the longest of

- bytes / copy rate. Forward: every input read once, the output written once. Forward and backward: the same, then every
  input and the output's gradient read once and every input's gradient written once.
- matrix operations (2 a multiply-add) / bf16 matrix product rate. Backward: twice the forward's (softmax: 2.5 times).
- exponentials / exponential rate; backward makes them once more.

All three rates are measured in the same run. With C = 64 tokens a chunk, a token and head needs

- decay family: 4KV for the state (write and read), and C(K + V) for the causal half of the chunk's own scores;
- delta family: 6KV + 2C(3K + 2V): the state is read twice, and the chunk's products are whole: K Kᵀ, Q Kᵀ, the inverse
  times K and V, the scores times V;
- slots (M of them): the decay family twice, K×M and M×V;
- quadratic features: the decay family with K(K + 1)/2 + K + 1 features in K's place for the state, K for the scores;
- window W: 4D for each of the pairs that the window allows;
- selective scan: an exponential for each token, channel and state.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from fla_swap.kernels.flops import decay, delta, pairs

NARROW, SLOTS = 16, 64


class Sized(Protocol):
    @property
    def batch(self) -> int: ...
    @property
    def time(self) -> int: ...
    @property
    def heads(self) -> int: ...
    @property
    def width(self) -> int: ...


@dataclass(frozen=True, kw_only=True)
class Rates:
    """What the GPU does a second: bytes copied (read + written), operations of a bf16 product, exponentials."""

    copy: float
    product: float
    exponential: float


def token_heads(shape: Sized) -> int:
    return shape.batch * shape.time * shape.heads


def state_products(shape: Sized) -> float:
    return token_heads(shape) * decay(shape.width, shape.width, shape.width)


def delta_products(shape: Sized) -> float:
    return token_heads(shape) * delta(shape.width, shape.width)


def slot_products(shape: Sized) -> float:
    slots = min(SLOTS, shape.width)
    return token_heads(shape) * (decay(shape.width, slots, shape.width) + decay(slots, shape.width, slots))


def feature_products(shape: Sized) -> float:
    narrow = min(NARROW, shape.width)
    return token_heads(shape) * decay(narrow * (narrow + 1) // 2 + narrow + 1, shape.width, narrow)


def window_products(shape: Sized, window: int) -> float:
    return shape.batch * shape.heads * pairs(shape.time, shape.time, window) * 4 * shape.width


def scan_exponentials(shape: Sized) -> float:
    return token_heads(shape) * shape.width * min(NARROW, shape.width)


def size(tensors: Iterable[Tensor]) -> int:
    return sum(x.numel() * x.element_size() for x in tensors)


def floors(inputs: int, output: int, products: float, exponentials: float, backward: float, rates: Rates):
    """(forward, forward and backward) in milliseconds; `inputs` and `output` in bytes, `backward` in forward's work."""
    forward = max((inputs + output) / rates.copy, products / rates.product, exponentials / rates.exponential)
    both = max(
        (3 * inputs + 2 * output) / rates.copy,
        products * (1 + backward) / rates.product,
        2 * exponentials / rates.exponential,
    )
    return forward * 1e3, both * 1e3
