"""One guided step of the full-size UNet in bfloat16 at 512x512: `python -m benchmarks.speed.unet_step OUT`.

All 2.58 B parameters, random, in memory once: both models read the same storage (5.2 GB). Each side does what
its pipeline does in a step before the sampler's own line: two latents, the UNet's forward, the guidance. The
prompt has 20 tokens, the negative one 2, of 256. Ours reads the text once a run of 25 steps: the row's value
counts a twenty-fifth of that in every step. --profile writes which operators take the time of both instead.
"""

from collections.abc import Callable

import diffusers
import torch
from torch import Tensor

from benchmarks.pairs import make_pair
from benchmarks.side_by_side import Row, faster, operators, race, timed, write_json
from benchmarks.speed import arguments
from kolors_core import EulerDiscreteScheduler
from kolors_core.chatglm import TextEmbedding
from kolors_core.conditioning import Conditioning, size_ids
from kolors_core.config import KOLORS, TINY, UNetConfig
from kolors_core.guidance import guided

STEPS, SCALE, SEED, TOKENS = 25, 5.0, 20240708, 256
PROMPT, EMPTY = 20, 2  # tokens
READS, STEP = "ours, reading the text", "ours, a step"


def embedding(tokens: int, config: UNetConfig, dtype: torch.dtype) -> TextEmbedding:
    """A random prompt's embedding with its pads collapsed."""
    generator = torch.Generator().manual_seed(SEED + tokens)
    counts = torch.ones(1, tokens + 1)
    counts[:, 0] = TOKENS - tokens
    states = torch.randn(1, tokens + 1, config.text_dim, generator=generator)
    pooled = torch.randn(1, config.text_dim, generator=generator)
    return TextEmbedding(states.to(dtype), pooled.to(dtype), counts)


def contestants(
    config: UNetConfig, pixels: int, dtype: torch.dtype
) -> dict[str, Callable[[], Tensor | None]]:
    """The reference's step, ours, and ours once a run. The steps return the denoised latents."""
    theirs, ours = make_pair("unet", config, SEED, dtype)
    both = [embedding(tokens, config, dtype) for tokens in (EMPTY, PROMPT)]
    sizes = size_ids((pixels, pixels), (0, 0), (pixels, pixels))
    negative, positive = (Conditioning(text.tokens, text.pooled, sizes, text.counts) for text in both)
    schedule = EulerDiscreteScheduler().schedule(STEPS)
    sigma = schedule.sigmas[STEPS // 2].item()
    shape = (1, config.in_channels, pixels // 8, pixels // 8)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(SEED)) * (1 + sigma**2) ** 0.5

    text = torch.cat([one.expanded().tokens for one in both])  # [2, 256, C]
    added = {
        "text_embeds": torch.cat([one.pooled for one in both]),
        "time_ids": sizes.to(dtype).repeat(2, 1),
    }
    scheduler = diffusers.EulerDiscreteScheduler(
        num_train_timesteps=1100, beta_start=0.00085, beta_end=0.014, beta_schedule="scaled_linear",
        steps_offset=1, timestep_spacing="leading",
    )  # fmt: skip
    scheduler.set_timesteps(STEPS)
    time = scheduler.timesteps[STEPS // 2]

    def reference() -> Tensor:
        latents = x.to(dtype)
        scaled = scheduler.scale_model_input(torch.cat([latents] * 2), time)
        noise = theirs(
            scaled, time, encoder_hidden_states=text, added_cond_kwargs=added, return_dict=False
        )[0]  # fmt: skip
        unconditional, conditional = noise.chunk(2)
        noise = unconditional + SCALE * (conditional - unconditional)
        return latents - sigma * noise

    def read() -> None:
        guided(ours, schedule, positive, negative, SCALE)

    denoise = guided(ours, schedule, positive, negative, SCALE)
    return {"reference": reference, STEP: lambda: denoise(x, sigma), READS: read}


def main() -> None:
    """Measure and write."""
    parser = arguments(__doc__, rounds=5)
    parser.add_argument("--small", action="store_true", help="rehearse with the embedded model's sizes")
    parser.add_argument("--profile", action="store_true", help="write unet_step_profile.json, not the row")
    options = parser.parse_args()
    config, pixels = (TINY.unet, 128) if options.small else (KOLORS.unet, 512)
    with torch.no_grad():
        runs = contestants(config, pixels, torch.bfloat16)
        theirs, ours = runs["reference"](), runs[STEP]()
        assert theirs is not None and ours is not None
        if options.profile:
            found = {name: operators(runs[name]) for name in ("reference", STEP)}
            write_json(found, options.out / "unet_step_profile.json")
            return
        result = race({name: timed(run) for name, run in runs.items()}, options.rounds, warm_ups=0)
    seconds = result.median(STEP) + result.median(READS) / STEPS
    Row(
        name="unet_step", work=f"UNet step, full size, bfloat16, {pixels}x{pixels}, batch 2",
        goal=faster(1.15), value=result.median("reference") / seconds, is_rehearsal=options.small,
        race=result, note=f"with a {STEPS}th of reading the text; "
        f"without it {result.ratio('reference', STEP):.2f} times as fast",
        details={
            "tokens": [EMPTY, PROMPT], "of": TOKENS, "seconds_with_reading": seconds,
            "difference": float((ours - theirs.float()).abs().max() / theirs.float().abs().max()),
        },
    ).write(options.out)  # fmt: skip


if __name__ == "__main__":
    main()
