"""Rectified flow with logit-normal times: the velocity of a straight line from image to noise.

Source: https://arxiv.org/abs/2209.03003; times as in https://arxiv.org/abs/2403.03206, section 3.1, of mean 0
and standard deviation 1: the middle of the line, where image and noise are as large, is trained on most.
"""

from benchmarks.ablate.change import Change
from kolors_core.schedulers import FlowMatchEulerDiscreteScheduler

CHANGE = Change(
    scheduler=FlowMatchEulerDiscreteScheduler(num_train_timesteps=1100),  # of whose sigmas DPM++ 2M draws
    training={"logit_normal": (0.0, 1.0)},
)
