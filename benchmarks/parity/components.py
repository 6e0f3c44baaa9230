"""The models one by one, and what each is run on in both libraries."""

from collections.abc import Callable, Iterator
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from benchmarks.full_size import Tensors, run_chatglm, run_chatglm_reference, run_unet, run_unet_reference
from benchmarks.pairs import WeightsAs
from benchmarks.parity.checkpoint import Checkpoint
from benchmarks.parity.layers import modules_of_file, our_modules, their_modules
from benchmarks.parity.measure import FLOAT32, TOLERANCES, Case, Side
from kolors_core.adapters.clip_vision import preprocess_clip
from kolors_core.adapters.ip_adapter import attach
from kolors_core.checkpoint import open_component
from kolors_core.context import ImagePrompt
from kolors_core.image import preprocess_vae
from kolors_core.pipelines.adapter_methods import MODELS
from kolors_core.pipelines.lora_methods import LoRAMethods
from weights_convert import TABLES

SEED = 20240706
PROMPTS = ["一张瓢虫的照片，微距，变焦，高质量，电影，拿着一个木牌", "a photo of a red fox"]
SLOW = "a CPU computes models of this size in float16 a thousand times as slowly as in float32"
NEVER = "the released weights overflow in it, and neither library runs the VAE so"


def picture(side: int) -> Image.Image:
    """Blurred colours."""
    values = np.random.default_rng(SEED).integers(0, 256, (7, 8, 3), dtype=np.uint8)
    return Image.fromarray(values).resize((side, side), Image.Resampling.BICUBIC)


class Inputs:
    """What the models are run on: each is given what the one before makes of two prompts or an image."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        config = open_component(checkpoint.folder, "unet").model.config
        side = min(config.sample_size, 32) if checkpoint.is_large else config.sample_size
        self.channels, self.size = config.out_channels, (side, side - 3)  # not square, and not even
        self.draw = torch.Generator().manual_seed(SEED)

    def noise(self, *shape: int) -> Tensor:
        """Standard normal noise."""
        return torch.randn(shape, generator=self.draw, dtype=torch.float64)

    def exactly(self, component: str, run: Callable[[Any, Tensors], Tensors], given: Tensors) -> Tensors:
        """What our model makes of this in float64."""
        model = self.checkpoint.ours(component)
        with torch.no_grad(), WeightsAs(torch.float64):
            found = run(model, {name: x.to(self.checkpoint.device) for name, x in given.items()})
        return {name: x.cpu() for name, x in found.items()}

    @cached_property
    def tokens(self) -> Tensors:
        """Two prompts; for a large model with fewer pads."""
        length = 64 if self.checkpoint.is_large else 256
        batch = self.checkpoint.tokenizer()(PROMPTS, max_length=length)
        return {"ids": batch.ids, "mask": batch.mask, "positions": batch.positions}

    @cached_property
    def condition(self) -> Tensors:
        """What a UNet reads."""
        text = self.exactly("text_encoder", run_chatglm, self.tokens)
        height, width = (8 * side for side in self.size)
        sizes = [[height, width, 8, 16, height, width], [1024, 1023, 0, 0, height, width]]
        return {
            "latents": self.noise(2, self.channels, *self.size), "timestep": torch.tensor(401),
            "text_tokens": text["tokens"], "pooled_text": text["pooled"], "size_ids": torch.tensor(sizes),
        }  # fmt: skip

    @cached_property
    def image(self) -> Tensors:
        """An image for the VAE, in [-1, 1]."""
        height, width = (8 * side for side in self.size)
        return {"images": preprocess_vae([picture(max(height, width))], height, width).double()}

    @cached_property
    def latents(self) -> Tensors:
        """Of that image."""
        return {"latents": self.exactly("vae", encode, self.image)["mean"]}

    @cached_property
    def pixels(self) -> Tensors:
        """Two images for CLIP."""
        place, kind = self.checkpoint.places["image_encoder"], MODELS["image_encoder"]
        encoder = open_component(place, "image_encoder", subfolder="", kind=kind).model
        pictures = [picture(80), picture(90).rotate(90)]
        return {"pixels": preprocess_clip(pictures, encoder.config.image_size).double()}

    @cached_property
    def states(self) -> Tensors:
        """What an IP-Adapter and its UNet read."""
        return self.condition | {"states": self.exactly("image_encoder", see, self.pixels)["states"]}


def encode(model: Any, given: Tensors) -> Tensors:
    """Our VAE's encoder."""
    found = model.encode_images(**given)
    return {"mean": found.mean, "std": found.std}


def encode_reference(model: Any, given: Tensors) -> Tensors:
    """The reference leaves the scale to its pipelines."""
    found, scale = model.encode(given["images"]).latent_dist, model.config.scaling_factor
    return {"mean": found.mean * scale, "std": found.std * scale}


def decode(model: Any, given: Tensors) -> Tensors:
    """Our VAE's decoder."""
    return {"image": model.decode_latents(**given)}


def decode_reference(model: Any, given: Tensors) -> Tensors:
    """The reference's."""
    return {"image": model.decode(given["latents"] / model.config.scaling_factor).sample}


def see(model: Any, given: Tensors) -> Tensors:
    """CLIP's states that IP-Adapters read, and its embedding; both libraries call it alike."""
    found = model(given["pixels"], output_hidden_states=True)
    return {"states": found.hidden_states[-2], "embedding": found.image_embeds}


def control(model: Any, given: Tensors) -> Tensors:
    """What our ControlNet adds, all maps in one row."""
    return {"residuals": torch.cat([residual.flatten() for residual in model(**given)])}


def control_reference(model: Any, given: Tensors) -> Tensors:
    """The reference leaves the text projection to its caller."""
    skips, mid = model(
        given["latents"], given["timestep"], controlnet_cond=given["image"], return_dict=False,
        encoder_hidden_states=model.encoder_hid_proj(given["text_tokens"]),
        added_cond_kwargs={"text_embeds": given["pooled_text"], "time_ids": given["size_ids"]},
    )  # fmt: skip
    return {"residuals": torch.cat([residual.flatten() for residual in (*skips, mid)])}


def plain(name: str, component: str, checkpoint: Checkpoint, inputs: Tensors, runs: Any, **more: Any) -> Case:
    """A case of one model in each library. runs: ours and the reference's."""
    run_ours, run_theirs = runs

    def ours() -> Side:
        model = checkpoint.ours(component)
        return Side(models=(model,), modules=our_modules(model), run=partial(run_ours, model))

    def theirs() -> Side:
        model = checkpoint.theirs(component)
        modules = their_modules(model, TABLES[component])
        return Side(models=(model,), modules=modules, run=partial(run_theirs, model))

    weights = "random" if component in checkpoint.random else "checkpoint"
    return Case(name=name, inputs=inputs, ours=ours, theirs=theirs, weights=weights, **more)


def ip_adapter(checkpoint: Checkpoint, given: Inputs, **more: Any) -> Case:
    """The resampler, and a UNet with its branches."""
    table = TABLES["ip_adapter"]

    def ours() -> Side:
        unet, adapter = checkpoint.ours("unet"), checkpoint.ours("ip_adapter")
        modules = our_modules(unet, adapter)
        handle = attach(unet, adapter)

        def run(given: Tensors) -> Tensors:
            prompt = ImagePrompt(handle.adapter.tokens(given["states"][:, None]))
            rest = {name: x for name, x in given.items() if name != "states"}
            return {"noise": unet(**rest, image_prompts=[prompt])}

        return Side(models=(unet, adapter), modules=modules, run=run)

    def theirs() -> Side:
        unet = checkpoint.theirs("unet")
        modules = their_modules(unet, TABLES["unet"])
        source = checkpoint.source("ip_adapter")
        tensors = {name: source[name].to(unet.dtype) for name in source}
        nested: dict[str, Tensors] = {"image_proj": {}, "ip_adapter": {}}
        for name, tensor in tensors.items():
            part, _, rest = name.partition(".")
            nested[part][rest] = tensor
        unet._load_ip_adapter_weights([nested])
        unet.to(checkpoint.device)
        modules |= modules_of_file(unet, tensors, table)

        def run(given: Tensors) -> Tensors:
            added = {"text_embeds": given["pooled_text"], "time_ids": given["size_ids"]}
            added["image_embeds"] = [given["states"][:, None]]
            text = given["text_tokens"]
            return {
                "noise": unet(
                    given["latents"], given["timestep"], encoder_hidden_states=text, added_cond_kwargs=added
                ).sample
            }

        return Side(models=(unet,), modules=modules, run=run)

    more["weights"] = "random" if "ip_adapter" in checkpoint.random else "checkpoint"
    return Case(name="IP-Adapter", inputs=given.states, ours=ours, theirs=theirs, **more)


class Loras(LoRAMethods):
    """What LoRA needs of a pipeline."""

    def __init__(self, unet: Any) -> None:
        self.unet, self.text_encoder = unet, None


def lora(checkpoint: Checkpoint, given: Inputs, **more: Any) -> Case:
    """A UNet with a LoRA on every attention, of random weights that float16 holds exactly."""
    source, state, draw = checkpoint.source("unet"), {}, torch.Generator().manual_seed(SEED)
    for name in source:
        path = name.removesuffix(".weight")
        if path.endswith(("to_q", "to_k", "to_v", "to_out.0")):
            out, width = source.shape(name)
            shapes = {"lora_A": (4, width), "lora_B": (out, 4)}
            for role, shape in shapes.items():
                factor = torch.randn(shape, generator=draw) * 0.2 / shape[1] ** 0.5
                state[f"unet.{path}.{role}.weight"] = factor.half().float()

    def ours() -> Side:
        unet = checkpoint.ours("unet")
        Loras(unet).load_lora_weights(state)
        return Side(models=(unet,), modules=our_modules(unet), run=partial(run_unet, unet))

    def theirs() -> Side:
        unet = checkpoint.theirs("unet")
        unet.load_lora_adapter(dict(state), prefix="unet")
        modules = their_modules(unet, TABLES["unet"])
        return Side(models=(unet,), modules=modules, run=partial(run_unet_reference, unet))

    return Case(name="LoRA", inputs=given.condition, ours=ours, theirs=theirs, weights="random", **more)


def cases(checkpoint: Checkpoint) -> Iterator[Case]:
    """All components, one after another: the inputs of each are made when it is asked for."""
    given = Inputs(checkpoint)
    slow = {"float16": SLOW} if checkpoint.is_slow else {}
    never = {"float16": NEVER}
    rounded = TOLERANCES | {"float64": FLOAT32}
    yield plain(
        "ChatGLM", "text_encoder", checkpoint, given.tokens, (run_chatglm, run_chatglm_reference),
        left_out=slow, tolerances=rounded, note="float64: the reference takes norms and rotation in float32.",
    )  # fmt: skip
    yield plain("UNet", "unet", checkpoint, given.condition, (run_unet, run_unet_reference), left_out=slow)
    runs = encode, encode_reference
    yield plain("VAE encoder", "vae", checkpoint, given.image, runs, left_out=never)
    runs = decode, decode_reference
    yield plain("VAE decoder", "vae", checkpoint, given.latents, runs, left_out=never)
    yield plain("CLIP vision", "image_encoder", checkpoint, given.pixels, (see, see), left_out=slow)
    yield ip_adapter(checkpoint, given, left_out=slow)
    height, width = (8 * side for side in given.size)
    image = torch.rand(2, 3, height, width, generator=given.draw, dtype=torch.float64)
    runs = control, control_reference
    inputs = given.condition | {"image": image}
    yield plain("ControlNet", "controlnet", checkpoint, inputs, runs, left_out=slow)
    yield lora(checkpoint, given, left_out=slow)
