"""An inpainting UNet of 9 input channels, which begins as the text-to-image UNet; masks are drawn at random.

Look at: the folder `inpainting`, which `KolorsInpaintPipeline.from_pretrained` reads.
"""

from dataclasses import replace

from kolors_core import KolorsInpaintPipeline, KolorsPipeline
from kolors_core.checkpoint import EMBEDDED, load_modified
from kolors_core.loading import zero_padded
from kolors_core.training.data import Batches, MaskedLatentDataset, buckets, read_folder
from kolors_core.training.loss import DiffusionLoss
from kolors_core.training.trainer import Trainer, TrainingConfig
from kolors_core.unet import UNet

pipe = KolorsPipeline.from_pretrained("tiny")
config = TrainingConfig(steps=20_000, batch_size=64, learning_rate=1e-5)
wider = {"conv_in.weight": zero_padded}
unet, _ = load_modified(EMBEDDED, "unet", lambda config: UNet(replace(config, in_channels=9)), wider)
batches = Batches(read_folder("images"), buckets(128), config.batch_size, config.seed)
data = MaskedLatentDataset(batches.examples, batches, pipe.vae, pipe.tokenizer, config, pipe.text_encoder)
loss = DiffusionLoss(unet, None, pipe.scheduler.training_sigmas(), config)
Trainer(loss, data, config, "inpainting.run").fit()
pipe = KolorsInpaintPipeline.from_pipe(pipe, unet=unet)
pipe.save_pretrained("inpainting")
