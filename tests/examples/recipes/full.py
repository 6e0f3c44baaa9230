"""Full fine-tuning with a moving average, on one process, or sharded (FSDP2) under `torchrun`.

Then it is started once more without: one process reads the shards, and writes the pipeline.
Look at: the folder `full`, which `KolorsPipeline.from_pretrained` reads.
"""

import os

from kolors_core import KolorsPipeline
from kolors_core.performance.processes import join_processes
from kolors_core.training.data import Batches, LatentDataset, buckets, read_folder
from kolors_core.training.loss import DiffusionLoss
from kolors_core.training.trainer import Trainer, TrainingConfig

shard = "RANK" in os.environ  # by torchrun
if shard:
    join_processes()
pipe = KolorsPipeline.from_pretrained("tiny")
config = TrainingConfig(steps=20_000, batch_size=64, learning_rate=1e-5, ema_decay=0.9999, shard=shard)
batches = Batches(read_folder("images"), buckets(128), config.batch_size, config.seed)
data = LatentDataset(batches.examples, batches, pipe.vae, pipe.tokenizer, config, pipe.text_encoder)
loss = DiffusionLoss(pipe.unet, None, pipe.scheduler.training_sigmas(), config)
trainer = Trainer(loss, data, config, "full.run")
trainer.fit()
if not shard:
    trainer.load_ema_weights()
    pipe.save_pretrained("full")
