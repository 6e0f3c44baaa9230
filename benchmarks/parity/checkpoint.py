"""The checkpoint of the page: its models in both libraries, and what stands in for those it lacks."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from diffusers import AutoencoderKL, ControlNetModel, UNet2DConditionModel
from diffusers.pipelines.kolors.text_encoder import ChatGLMModel
from torch import nn
from transformers import CLIPVisionConfig as ReferenceCLIPVisionConfig
from transformers import CLIPVisionModelWithProjection

from benchmarks.pairs import randomise
from kolors_core import KolorsControlNet
from kolors_core.adapters.clip_vision import CLIPVisionConfig
from kolors_core.adapters.controlnet import ControlNetConfig
from kolors_core.adapters.ip_adapter import IPAdapter, IPAdapterConfig, cross_attentions
from kolors_core.checkpoint import load_component, load_index, load_scheduler, open_component
from kolors_core.loading import load
from kolors_core.pipelines.adapter_methods import MODELS
from kolors_core.tokenizer import Tokenizer
from weights_convert import TABLES
from weights_convert.safetensors_files import Source, save_tensors, weight_files

REFERENCE: dict[str, Any] = {
    "text_encoder": ChatGLMModel, "unet": UNet2DConditionModel, "vae": AutoencoderKL,
    "image_encoder": CLIPVisionModelWithProjection, "controlnet": ControlNetModel,
}  # fmt: skip
RANDOM_CLIP = CLIPVisionConfig(
    image_size=56, patch_size=14, hidden_size=96, feed_forward_size=192, layers=4, heads=4, projection_dim=64
)
LARGE = 10**8  # parameters of a UNet; TINY has 8 million, Kolors 2,579


@dataclass(frozen=True)
class Checkpoint:
    """A folder of Kolors-diffusers' layout, checked by configs and file headers.

    places: each model's folder, and the IP-Adapter's file. random: those that the folder lacks, which are
    small and have random weights. device: where models run.
    """

    folder: Path
    places: dict[str, Path]
    random: frozenset[str]
    device: torch.device

    def source(self, component: str) -> Source:
        """The tensors of a model's files, those of their only variant if there are no plain ones."""
        place = self.places[component]
        if place.is_file():
            return Source([place])
        names = weight_files([file.name for file in place.iterdir()], None, str(place))
        return Source([place / name for name in names])

    def dtype(self, component: str) -> torch.dtype:
        """What the file has its weights in: no model is held in more."""
        source = self.source(component)
        return source.dtype(next(iter(source)))

    def variant(self, component: str) -> str | None:
        """Such as "fp16": in model.fp16.safetensors, or before or after the number of a shard."""
        parts = self.source(component).files[0].name.split(".")
        return parts[1].partition("-")[0] if len(parts) > 2 else None

    def parameters(self, component: str) -> int:
        """How many numbers a model has."""
        source = self.source(component)
        return sum(torch.Size(source.shape(name)).numel() for name in source)

    @property
    def is_large(self) -> bool:
        """Whether what all modules put out fits in memory for a small image and a short text only."""
        return self.parameters("unet") > LARGE

    @property
    def is_slow(self) -> bool:
        """Whether a whole run takes hours here."""
        return self.is_large and self.device.type == "cpu"

    def ours(self, component: str) -> nn.Module:
        """Our model, in the file's own dtype."""
        place, dtype = self.places[component], self.dtype(component)
        if component == "controlnet":
            return KolorsControlNet.from_pretrained(place, torch_dtype=dtype, device=self.device)
        if component != "ip_adapter":
            return load_component(
                place, component, subfolder="", dtype=dtype, device=self.device, kind=MODELS[component]
            )
        with torch.device("meta"):
            adapter = IPAdapter(self.adapter_config())
        load(adapter, self.source(component), component, dtype=self.dtype("unet"), device=self.device)
        return adapter.eval()

    def adapter_config(self) -> IPAdapterConfig:
        """The IP-Adapter's, from the shapes in its file."""
        source = self.source("ip_adapter")
        shapes = {TABLES["ip_adapter"].to_ours(name): source.shape(name) for name in source}
        return IPAdapterConfig.from_shapes(shapes, source.where)

    def theirs(self, component: str) -> nn.Module:
        """The reference's model, by its own loader, in the file's own dtype."""
        model = REFERENCE[component].from_pretrained(
            self.places[component], variant=self.variant(component), dtype=self.dtype(component)
        )
        return model.to(self.device).eval()

    def tokenizer(self) -> Tokenizer:
        """Ours."""
        return Tokenizer(self.folder / "tokenizer")


@contextmanager
def opened(folder: Path, device: torch.device) -> Iterator[Checkpoint]:
    """A checkpoint folder; what it lacks is there, with random weights, while this is open.

    Raises FileNotFoundError or ValueError naming what is missing or does not fit, before any weight is read.
    """
    load_index(folder)
    load_scheduler(folder)
    Tokenizer(folder / "tokenizer")
    places = {name: folder / name for name in ("text_encoder", "unet", "vae")}
    unet = {name: open_component(folder, name).model for name in places}["unet"]
    if len(adapters := sorted(folder.glob("ip_adapter*.safetensors"))) > 1:
        raise ValueError(
            f"{folder}: expected one IP-Adapter, found {adapters[0].name} and {adapters[1].name}"
        )
    if adapters:
        places["ip_adapter"] = adapters[0]
    places |= {name: folder / name for name in ("image_encoder", "controlnet") if (folder / name).exists()}
    random = frozenset(("image_encoder", "ip_adapter", "controlnet")) - places.keys()
    with TemporaryDirectory() as scratch:
        checkpoint = Checkpoint(folder, places, random, device)
        if random:
            _make_up(checkpoint, unet, Path(scratch))
        yield checkpoint


def _make_up(checkpoint: Checkpoint, unet: Any, scratch: Path) -> None:
    """Write small models of random weights for those that are missing, two of them by the reference."""
    places, clip_config = checkpoint.places, RANDOM_CLIP
    if "ip_adapter" in places:
        clip_config = replace(RANDOM_CLIP, hidden_size=checkpoint.adapter_config().image_dim)
    if "image_encoder" in places:
        clip_config = open_component(
            checkpoint.folder, "image_encoder", kind=MODELS["image_encoder"]
        ).model.config
    made: dict[str, Any] = {
        "image_encoder": lambda: CLIPVisionModelWithProjection(
            ReferenceCLIPVisionConfig(**clip_config.to_public())
        ),
        "controlnet": lambda: ControlNetModel.from_config(
            ControlNetConfig(**vars(unet.config), conditioning_widths=(8, 12, 16, 24)).to_public()
        ),
        "ip_adapter": lambda: IPAdapter(_adapter_config(unet, clip_config.hidden_size)),
    }
    for seed, name in enumerate(sorted(checkpoint.random)):
        model = made[name]()
        randomise(model, seed)
        places[name] = scratch / name
        if name == "ip_adapter":
            places[name] = scratch / "ip_adapter.safetensors"
            state = {TABLES[name].to_public(key): tensor for key, tensor in model.state_dict().items()}
            save_tensors(state, places[name])
        else:
            model.save_pretrained(places[name])


def _adapter_config(unet: Any, image_dim: int) -> IPAdapterConfig:
    widths = tuple(place.to_q.in_features for place in cross_attentions(unet).values())
    return IPAdapterConfig(
        image_dim=image_dim, width=128, queries=8, heads=2, feed_forward_size=512, layers=4,
        context_dim=unet.config.context_dim, cross_attention_widths=widths,
    )  # fmt: skip
