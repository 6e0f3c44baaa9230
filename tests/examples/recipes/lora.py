"""A LoRA of the images in `images`, or with `dora=True` a DoRA, of the embedded model or of another.

Look at: lora.safetensors, which `load_lora_weights` of this pipeline and of the reference reads.
"""

from kolors_core import KolorsPipeline
from kolors_core.adapters.lora import attach, save_adapters
from kolors_core.training.data import Batches, LatentDataset, buckets, read_folder
from kolors_core.training.loss import DiffusionLoss
from kolors_core.training.trainer import Trainer, TrainingConfig

pipe = KolorsPipeline.from_pretrained("tiny")
config = TrainingConfig(steps=2000, batch_size=16, learning_rate=1e-4)
batches = Batches(read_folder("images"), buckets(128), config.batch_size, config.seed)
data = LatentDataset(batches.examples, batches, pipe.vae, pipe.tokenizer, config, pipe.text_encoder)
adapter = attach(pipe.unet.requires_grad_(False), rank=16)
loss = DiffusionLoss(pipe.unet, None, pipe.scheduler.training_sigmas(), config)
Trainer(loss, data, config, "lora.run").fit()
save_adapters({"unet": adapter}, "lora.safetensors")
