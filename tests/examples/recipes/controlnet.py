"""A ControlNet (https://arxiv.org/abs/2302.05543) of Canny's edges, which begins as the UNet's down path.

Look at: the folder `canny`, which `KolorsControlNet.from_pretrained` reads.
"""

from kolors_core import KolorsControlNet, KolorsPipeline, canny
from kolors_core.training.data import Batches, LatentDataset, buckets, read_folder
from kolors_core.training.loss import DiffusionLoss
from kolors_core.training.trainer import Trainer, TrainingConfig

pipe = KolorsPipeline.from_pretrained("tiny")
config = TrainingConfig(steps=20_000, batch_size=64, learning_rate=1e-5)
batches = Batches(read_folder("images"), buckets(128), config.batch_size, config.seed)
encoders = pipe.vae, pipe.tokenizer, config, pipe.text_encoder
data = LatentDataset(batches.examples, batches, *encoders, control=canny)
net = KolorsControlNet.from_unet(pipe.unet.requires_grad_(False))
loss = DiffusionLoss(pipe.unet, None, pipe.scheduler.training_sigmas(), config, net)
Trainer(loss, data, config, "canny.run").fit()
net.save_pretrained("canny")
