"""Flows that collide on uplinks: what ECMP hashing leaves of a RoCE fabric.

Each of `hosts` hosts of a rack keeps `flows` flows (queue pairs) open, each hashed onto one of
`uplinks` uplinks as fast as a host's NIC. A collective waits for its slowest flow, so the fullest
uplink sets the rate: efficiency = capacity for flows / expected fullest load. The expectation is
computed exactly, so that the same question always has the same answer.

Left out: packet spraying and adaptive routing, which make collisions vanish; several switch layers;
flows that end at different times.
"""

from functools import lru_cache
from math import exp, lgamma, log

import numpy as np

from llama2rt.errors import InputError


@lru_cache(maxsize=256)
def efficiency(flows: int, uplinks: int, hosts: int = 16) -> float:
    """Share in (0, 1] of the hosts' line rate that is left.

    flows: queue pairs a host keeps busy. uplinks: equal links that leave the rack. InputError for
    counts below 1 or more than 4096 flows in all.
    """
    for name, value in (("flows", flows), ("uplinks", uplinks), ("hosts", hosts)):
        if value < 1:
            raise InputError(f"{name}: expected at least 1, got {value}")
    if flows * hosts > 4096:
        raise InputError(f"flows: {flows} x {hosts} hosts, expected at most 4096 flows in all")
    # An uplink carries `flows` flows at full rate: as many as one host opens.
    return min(1.0, flows / expected_fullest(flows * hosts, uplinks))


def expected_fullest(balls: int, bins: int) -> float:
    """E[max load] of `balls` thrown at random into `bins`: the sum over k of P(max > k)."""
    total = 0.0
    for most in range(balls):
        within = _probability_none_above(most, balls, bins)
        total += 1.0 - within
        if within > 1 - 1e-12:
            break
    return total


def _probability_none_above(most: int, balls: int, bins: int) -> float:
    """P(every bin holds at most `most`).

    Bins that draw independent Poisson loads hold a multinomial once their sum is known, so this is
    a ratio of two Poisson probabilities; all terms are positive and nothing cancels.
    """
    if most * bins < balls:
        return 0.0
    load = _poisson(balls / bins, balls)
    load[most + 1 :] = 0.0
    return float(_power(load, bins)[balls] / _poisson(balls, balls)[balls])


def _poisson(mean: float, largest: int) -> np.ndarray:
    """Probabilities of 0 ... `largest` events."""
    return np.array([exp(j * log(mean) - mean - lgamma(j + 1)) for j in range(largest + 1)])


def _power(distribution: np.ndarray, times: int) -> np.ndarray:
    """Distribution of the sum of `times` independent draws, as far as `distribution` reaches."""
    result, square = None, distribution
    while times:
        if times & 1:
            result = square if result is None else np.convolve(result, square)[: len(square)]
        times >>= 1
        if times:
            square = np.convolve(square, square)[: len(square)]
    assert result is not None
    return result
