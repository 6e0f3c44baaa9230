"""DreamBooth (https://arxiv.org/abs/2208.12242): the whole UNet learns a subject, and keeps its class, a dog.

Look at: the folder `dreambooth`. `train_lora` of kolors_core/pipelines/lora_recipe.py does it with a LoRA.
"""

from pathlib import Path

import torch

from kolors_core import KolorsPipeline
from kolors_core.training.data import Batches, LatentDataset, buckets, read_folder
from kolors_core.training.loss import DiffusionLoss
from kolors_core.training.trainer import Trainer, TrainingConfig

pipe = KolorsPipeline.from_pretrained("tiny")
config = TrainingConfig(steps=400, batch_size=16, learning_rate=5e-6)
Path("class").mkdir(exist_ok=True)
for seed in range(100):  # prior preservation: what the model draws of the class before it is trained
    [image] = pipe("a dog", generator=torch.Generator().manual_seed(seed)).images
    image.save(f"class/{seed}.png")
    Path(f"class/{seed}.txt").write_text("a dog")
subject, known = read_folder("images"), read_folder("class")
examples = subject * max(1, len(known) // len(subject)) + known  # half of what is drawn is the subject
batches = Batches(examples, buckets(128), config.batch_size, config.seed)
data = LatentDataset(examples, batches, pipe.vae, pipe.tokenizer, config, pipe.text_encoder)
loss = DiffusionLoss(pipe.unet, None, pipe.scheduler.training_sigmas(), config)
Trainer(loss, data, config, "dreambooth.run").fit()
pipe.save_pretrained("dreambooth")
