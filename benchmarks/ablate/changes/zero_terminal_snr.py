"""Zero terminal SNR: trained on pure noise too, with v-prediction, trailing steps and rescaled guidance.

Source: https://arxiv.org/abs/2305.08891, its four changes together. Kolors' last timestep leaves 1 / 29 of
the image in the noise, mostly its brightness, which noise that drawing starts from does not have.
"""

from functools import partial

from benchmarks.ablate.change import Change
from kolors_core.guidance import guided
from kolors_core.schedulers import DPMSolverMultistepScheduler

CHANGE = Change(
    scheduler=DPMSolverMultistepScheduler(
        prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing"
    ),
    guided=partial(guided, rescale=0.7, precompute=False),
)
