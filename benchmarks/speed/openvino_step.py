"""A step of the exported UNet by OpenVINO beside ours eager: `python -m benchmarks.speed.openvino_step OUT`.

`unet_step` (performance/export.py) at full width with random weights in bfloat16, two rows of latents as with
guidance, 32 text tokens; by OpenVINO in bfloat16, and with its weights in int8 as NNCF compresses them. One
thread, and seconds of the processor, so that other work on the machine counts little; rounds are A B B A.
--blocks: transformer blocks of the innermost level, 10 at full size (13 GB of memory). It needs packages that
the project does not: `pip install openvino nncf`.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kolors_core.config import UNetConfig
from kolors_core.performance.export import Program, trace, unet_programs
from kolors_core.unet import UNet
from weights_convert.atomic_write import write_bytes

OURS = "ours, bfloat16"
ROOM = 2**22  # random numbers, which are repeated


def full_width(blocks: int) -> Program:
    """The program, with weights of the size that a layer's width asks for."""
    with torch.device("meta"):
        unet = UNet(UNetConfig(depths=(0, 2, blocks)))
    program = unet_programs(unet.to(torch.bfloat16))["unet_step"].to_empty(device="cpu")
    noise = torch.randn(ROOM, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    for name, parameter in program.named_parameters():
        flat, scale = parameter.data.view(-1), parameter[0].numel() ** -0.5
        for part in flat.split(ROOM):
            part.copy_(noise[: part.numel()] * (scale if parameter.ndim > 1 else 0.1))
        if parameter.ndim == 1 and name.endswith("weight"):
            parameter.data.add_(1)
    return program.requires_grad_(False)


def as_openvino(tensor: Tensor) -> Any:
    openvino = import_module("openvino")
    if tensor.dtype != torch.bfloat16:
        return openvino.Tensor(tensor.numpy())
    made = openvino.Tensor(openvino.Type.bf16, list(tensor.shape))
    made.data[:] = tensor.contiguous().view(torch.int16).numpy().view(made.data.dtype)
    return made


def compiled(model: Any, tensors: tuple[Tensor, ...]) -> Callable[[], Tensor]:
    properties = {"INFERENCE_PRECISION_HINT": "bf16", "INFERENCE_NUM_THREADS": 1, "NUM_STREAMS": 1}
    request = import_module("openvino").Core().compile_model(model, "CPU", properties).create_infer_request()
    inputs = [as_openvino(tensor) for tensor in tensors]

    def run() -> Tensor:
        found = np.array(request.infer(inputs)[0]).view(np.int16)
        return torch.from_numpy(found).view(torch.bfloat16)

    return run


def race(ours: Callable[[], Tensor], other: Callable[[], Tensor], rounds: int) -> dict[str, Any]:
    """Medians of the processor's seconds, and how far apart the outputs are."""
    first, second = ours().float(), other().float()
    seconds: dict[int, list[float]] = {0: [], 1: []}
    for which in (0, 1, 1, 0) * rounds:
        start = time.process_time()
        (ours, other)[which]()
        seconds[which].append(time.process_time() - start)
    mine, theirs = (statistics.median(seconds[which]) for which in (0, 1))
    error = ((second - first).norm() / first.norm()).item()
    return {"ours": mine, "openvino": theirs, "ratio": mine / theirs, "error": error, "seconds": seconds}


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--blocks", type=int, default=10)
    parser.add_argument("--pixels", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=2)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    openvino, nncf = import_module("openvino"), import_module("nncf")
    program = full_width(options.blocks)
    model = openvino.convert_model(trace(program))
    side = options.pixels // 8
    tensors = program.examples({"B": 2, "S": 32, "H": side, "W": side})
    rows: dict[str, Any] = {"blocks": options.blocks, "pixels": options.pixels}
    for name in ("bfloat16", "int8"):
        if name == "int8":
            model = nncf.compress_weights(model, mode=nncf.CompressWeightsMode.INT8_SYM)
        rows[name] = race(lambda: program(*tensors)[0], compiled(model, tensors), options.rounds)
        print(name, rows[name], flush=True)
        write_bytes(f"{json.dumps(rows, indent=1)}\n".encode(), options.out / "openvino_step.json")


if __name__ == "__main__":
    main()
