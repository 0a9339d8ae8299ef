"""How tests compare with references that we did not write."""

import logging

import torch
from torch import Tensor

logger = logging.getLogger("parity")


def relative_error(value: Tensor, expected: Tensor) -> float:
    """The largest difference over the largest expected magnitude."""
    assert value.shape == expected.shape, (value.shape, expected.shape)
    difference = (value.cpu().double() - expected.cpu().double()).abs().max()
    return (difference / expected.double().abs().max()).item()


def assert_close(value: Tensor, expected: Tensor, limit: float, what: str) -> None:
    """Assert that the relative error is under `limit`; `--log-cli-level=INFO` shows it."""
    error = relative_error(value, expected)
    logger.info("%s: relative error %.1e (limit %.0e)", what, error, limit)
    assert error < limit, f"{what}: relative error {error:.2e}, limit {limit:.0e}"


def same_weights(first, second) -> bool:
    """Whether two modules hold the same names with the same numbers."""
    first, second = first.state_dict(), second.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)
