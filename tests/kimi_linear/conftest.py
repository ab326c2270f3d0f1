"""Every test draws fresh random numbers; a failure prints the seed, and TEST_SEED=<seed> draws them again."""

import os
import random

import pytest
import torch


@pytest.fixture(autouse=True)
def seed() -> int:
    value = int(os.environ.get("TEST_SEED", random.SystemRandom().randrange(2**31)))
    print(f"TEST_SEED={value}")
    torch.manual_seed(value)
    random.seed(value)
    return value
