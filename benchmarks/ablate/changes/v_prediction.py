"""v-prediction: the velocity on the circle of image and noise in place of the noise.

Source: https://arxiv.org/abs/2202.00512, appendix D. Its loss, unweighted, is that of the noise weighed by
1 + snr: what is nearly clean counts more.
"""

from benchmarks.ablate.change import Change
from kolors_core.schedulers import DPMSolverMultistepScheduler

CHANGE = Change(scheduler=DPMSolverMultistepScheduler(prediction_type="v_prediction", use_karras_sigmas=True))
