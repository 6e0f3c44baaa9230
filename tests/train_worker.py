"""One process of several: `torchrun -m tests.train_worker ddp|fsdp PICTURES TOKENIZER OUT`.

Killed in its fifth step, it goes on from the state saved after three, and writes the losses from there.
"""

import sys
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

from kolors_core.placement import join_processes
from tests.test_training import CONFIG, Killed, kill, make_trainer

if __name__ == "__main__":
    way, pictures, tokenizer, out = sys.argv[1], *map(Path, sys.argv[2:])
    torch.set_num_threads(1)
    join_processes()
    config = replace(CONFIG, shard=way == "fsdp")
    first = make_trainer(out, pictures, tokenizer, config)
    first.on_step = kill
    try:
        first.fit()
    except Killed:
        losses = make_trainer(out, pictures, tokenizer, config).fit()
        if dist.get_rank() == 0:
            (out / "losses.txt").write_text("\n".join(map(repr, losses)))
    dist.destroy_process_group()
