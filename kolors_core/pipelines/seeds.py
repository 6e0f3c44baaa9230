"""Seeds: a generator's state as its seed and how many numbers were drawn since, and back."""

import torch

WORDS = 624  # numbers of 32 bits that a CPU's Mersenne Twister computes at once
MAX_DRAWN = 2**21  # a state further from its seed is not searched for
_STATE, _NEXT = slice(24, 24 + 8 * WORDS), slice(16, 24)  # bytes of a CPU generator's state


def seeded_generator(seed: int, drawn: int = 0) -> torch.Generator:
    """Return a CPU's generator with this seed, from which `drawn` numbers of 32 bits were drawn."""
    generator = torch.Generator().manual_seed(seed)
    _draw(generator, drawn)
    return generator


def numbers_drawn(generator: torch.Generator) -> int | None:
    """Return how many numbers of 32 bits were drawn since the generator got its seed.

    0 for a new one; None if it cannot be known: after more than `MAX_DRAWN`, or on another device.
    """
    fresh = torch.Generator(generator.device).manual_seed(generator.initial_seed())
    state = generator.get_state()
    if torch.equal(state, fresh.get_state()):
        return 0
    if generator.device.type != "cpu":
        return None
    _draw(fresh, 1)  # which computes the first numbers
    for block in range(0, MAX_DRAWN, WORDS):
        if torch.equal(fresh.get_state()[_STATE], state[_STATE]):
            drawn = block + int.from_bytes(state[_NEXT].numpy().tobytes(), "little")
            twin = seeded_generator(generator.initial_seed(), drawn)
            return drawn if torch.equal(twin.get_state(), state) else None
        _draw(fresh, WORDS)
    return None


def _draw(generator: torch.Generator, count: int) -> None:
    while count > 0:
        torch.empty(min(count, 2**20), dtype=torch.int32).random_(generator=generator)
        count -= 2**20
