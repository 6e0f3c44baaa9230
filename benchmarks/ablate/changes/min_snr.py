"""Min-SNR weights: a timestep's error of the image counts by min(snr, 5).

Source: https://arxiv.org/abs/2303.09556, with the gamma of its section 4. Timesteps of little noise, whose
errors are tiny and of little use, count less.
"""

from benchmarks.ablate.change import Change

CHANGE = Change(training={"min_snr_gamma": 5.0})
