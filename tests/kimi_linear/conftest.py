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


if os.environ.get("TRITON_INTERPRET") == "1":
    from triton.runtime.interpreter import InterpretedFunction

    call, called = InterpretedFunction.__call__, set()

    def call_patched_once(self: InterpretedFunction, *arguments: object, **options: object) -> object:
        """A device function's call. Triton's own patches `triton.language` anew each time, always alike: half
        of a kernel's time.
        """
        if self.fn in called:
            return self.rewrite()(*arguments, **options)
        called.add(self.fn)
        return call(self, *arguments, **options)

    InterpretedFunction.__call__ = call_patched_once
