"""Textual inversion (https://arxiv.org/abs/2208.01618): the vector of a word, "zorp" in captions, is learned.

Look at: zorp.safetensors, which `load_textual_inversion` reads.
"""

from kolors_core import KolorsPipeline
from kolors_core.adapters.textual_inversion import add_words, learn_words, save_words, words_of
from kolors_core.training.data import Batches, LatentDataset, buckets, read_folder
from kolors_core.training.loss import DiffusionLoss
from kolors_core.training.trainer import Trainer, TrainingConfig

pipe = KolorsPipeline.from_pretrained("tiny")
config = TrainingConfig(steps=2000, batch_size=8, learning_rate=5e-3, weight_decay=0.0)
encoder = pipe.text_encoder
first = encoder.embedding.weight[pipe.tokenizer(["bear"]).ids[0, -1:]]  # of a word that is like it
add_words(encoder, {"zorp": first})
words = words_of(encoder)
batches = Batches(read_folder("images"), buckets(128), config.batch_size, config.seed)
data = LatentDataset(batches.examples, batches, pipe.vae, pipe.tokenizer, config, None, words=words)
loss = DiffusionLoss(pipe.unet, encoder, pipe.scheduler.training_sigmas(), config)
learn_words(loss, "zorp")
Trainer(loss, data, config, "zorp.run").fit()
save_words(encoder, "zorp.safetensors")
