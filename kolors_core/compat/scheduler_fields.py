"""Fields of the reference's schedulers, by name, for an editor's completion of their constructors."""

from collections.abc import Sequence
from typing import TypedDict


class Fields(TypedDict, total=False):
    """Fields of the reference's classes; some take only the values that change nothing."""

    num_train_timesteps: int
    beta_start: float
    beta_end: float
    beta_schedule: str
    trained_betas: Sequence[float] | None
    prediction_type: str
    timestep_spacing: str
    steps_offset: int
    use_karras_sigmas: bool
    use_exponential_sigmas: bool | None
    use_beta_sigmas: bool | None
    rescale_betas_zero_snr: bool
    final_sigmas_type: str
    interpolation_type: str
    sigma_min: float | None
    sigma_max: float | None
    timestep_type: str
    algorithm_type: str
    solver_order: int
    solver_type: str
    lower_order_final: bool
    euler_at_final: bool
    thresholding: bool
    dynamic_thresholding_ratio: float
    sample_max_value: float
    use_lu_lambdas: bool | None
    use_flow_sigmas: bool | None
    flow_shift: float | None
    lambda_min_clipped: float
    variance_type: str | None
    use_dynamic_shifting: bool
    time_shift_type: str
    predict_x0: bool
    disable_corrector: Sequence[int]
    solver_p: None
    shift_terminal: None
    clip_sample: bool
    clip_sample_range: float
    noise_sampler_seed: None
    set_alpha_to_one: bool
    skip_prk_steps: bool
    original_inference_steps: int
    timestep_scaling: float
    shift: float
    base_shift: float
    max_shift: float
    base_image_seq_len: int
    max_image_seq_len: int
    invert_sigmas: bool
    stochastic_sampling: bool
    sigma_data: float
    sigma_schedule: str
    rho: float
