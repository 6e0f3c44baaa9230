"""Distillation (https://arxiv.org/abs/2310.04378): a LoRA draws in 4 steps what the model does in 50, guided.

Look at: lcm.safetensors; a pipeline that has loaded it draws by `LCMScheduler` at a guidance scale of 1.
"""

from kolors_core import KolorsPipeline
from kolors_core.adapters.lora import attach, save_adapters
from kolors_core.training.data import Batches, LatentDataset, buckets, read_folder
from kolors_core.training.distillation import ConsistencyLoss
from kolors_core.training.trainer import Trainer, TrainingConfig

pipe = KolorsPipeline.from_pretrained("tiny")
config = TrainingConfig(steps=1500, batch_size=16, learning_rate=1e-4)
batches = Batches(read_folder("images"), buckets(128), config.batch_size, config.seed, caption_dropout=0)
data = LatentDataset(batches.examples, batches, pipe.vae, pipe.tokenizer, config, pipe.text_encoder)
adapter = attach(pipe.unet.requires_grad_(False), rank=64)
sigmas = pipe.scheduler.training_sigmas()
loss = ConsistencyLoss(pipe.unet, sigmas, config, guidance_scale=5.0, negative=data.text[""])
Trainer(loss, data, config, "lcm.run").fit()
save_adapters({"unet": adapter}, "lcm.safetensors")
