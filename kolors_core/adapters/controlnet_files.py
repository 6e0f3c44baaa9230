"""ControlNets from files and to them: Kolors' own, and SDXL's beside a Kolors UNet."""

from pathlib import Path
from typing import Self

import torch

from kolors_core.adapters.controlnet import ControlNet, ControlNetConfig
from kolors_core.checkpoint import (
    EMBEDDED,
    EMBEDDED_NAME,
    ModelSpec,
    base_state,
    fetch_component,
    load_component,
    read_json,
    save_component,
    weights_in,
)
from kolors_core.devices import (
    Dtypes,
    check_low_cpu_mem_usage,
    dtype_of,
    merge_dtype_arguments,
    plain,
    refuse_pickles,
)
from kolors_core.loading import LoadReport, load
from kolors_core.module import require_plain
from kolors_core.unet import UNet
from kolors_core.validation import as_path
from weights_convert.atomic_write import atomic_folder
from weights_convert.safetensors_files import Source, Tensors

DEFAULT_SCALE = 0.8


class KolorsControlNet(ControlNet):
    """A ControlNet that loads and saves itself, such as Kwai-Kolors/Kolors-ControlNet-Canny."""

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        subfolder: str = "",
        torch_dtype: Dtypes = None,
        dtype: Dtypes = None,
        device: torch.device | str = "cpu",
        variant: str | None = None,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        token: str | bool | None = None,
        use_safetensors: bool | None = None,
        low_cpu_mem_usage: bool = True,
    ) -> Self:
        """Load a folder or hub repository, strictly; only its own files are fetched. "tiny" is the embedded
        model's, of Canny's edges.

        torch_dtype, or by its newer name dtype: float32 if None, and expected as the UNet's. variant: such as
        "fp16"; None takes the only one there is. Raises FileNotFoundError or ValueError naming the file,
        field or tensor.
        """
        refuse_pickles(use_safetensors)
        check_low_cpu_mem_usage(low_cpu_mem_usage)
        name = pretrained_model_name_or_path
        net = load_component(
            EMBEDDED / "controlnet" if name == EMBEDDED_NAME else name, "controlnet", subfolder=subfolder,
            variant=variant, dtype=dtype_of("unet", merge_dtype_arguments(torch_dtype, dtype)), device=device,
            kind=ModelSpec(ControlNetConfig, cls), revision=revision, cache_dir=cache_dir,
            local_files_only=local_files_only, token=token,
        )  # fmt: skip
        assert isinstance(net, cls)
        return net

    @classmethod
    def from_sdxl(
        cls,
        pretrained_model_name_or_path: str | Path,
        unet: UNet,
        *,
        subfolder: str = "",
        variant: str | None = None,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        token: str | bool | None = None,
    ) -> tuple[Self, LoadReport]:
        """An SDXL ControlNet beside a Kolors UNet: an approximation, since it was trained beside another.

        It has no text projection, and its added condition is as wide as SDXL's text: both are the UNet's. All
        else is SDXL's, whose time it takes for Kolors'. The report names as `missing` what the UNet gave.
        Returns it with the UNet's dtype and device. Raises FileNotFoundError or ValueError naming what does
        not fit; for one with a text projection, which needs no borrowing, too.
        """
        folder = fetch_component(
            pretrained_model_name_or_path, "controlnet", subfolder, variant, True, revision=revision,
            cache_dir=cache_dir, local_files_only=local_files_only, token=token,
        )  # fmt: skip
        place = folder / subfolder
        file, unet = place / "config.json", plain(unet)
        require_plain(unet, "borrow from it; borrow from a plain UNet, then quantise")
        public = read_json(file)
        if public.get("encoder_hid_dim_type") is not None:
            raise ValueError(f"{file}: it has a text projection: load it by from_pretrained")
        added = unet.config.text_dim + 6 * unet.config.size_dim
        config = ControlNetConfig.from_public(
            public | {
                "encoder_hid_dim_type": "text_proj", "encoder_hid_dim": unet.config.text_dim,
                "projection_class_embeddings_input_dim": added,
            },
            str(file),
        )  # fmt: skip
        source: Source | Tensors = weights_in(place, variant)
        lent = ["text_proj"]
        if public.get("projection_class_embeddings_input_dim") != added:  # its two layers belong together
            lent.append("add_embedding")
            kept = {name: source[name] for name in source if not name.startswith("add_embedding.")}
            source = Tensors(kept, source.where)
        with torch.device("meta"):
            net = cls(config)
        state = base_state(unet)
        partial = {
            name: (lambda shape, found, name=name: state[name]) for name in net.state_dict()
            if name.partition(".")[0] in lent
        }  # fmt: skip
        weight = unet.conv_in.weight
        report = load(net, source, "controlnet", dtype=weight.dtype, device=weight.device, partial=partial)
        if report.unexpected:
            raise ValueError(f"{source.where}: {report.unexpected[0]} is no tensor of a ControlNet")
        return net.eval(), report

    def save_pretrained(self, folder: str | Path, *, variant: str | None = None) -> None:
        """Write a new folder that the reference and `from_pretrained` load, whole or not at all.

        Raises FileExistsError if `folder` is there already and not empty, ValueError for a variant that is
        not letters, digits and underscores.
        """
        with atomic_folder(as_path("folder", folder)) as place:
            save_component(self, place, "controlnet", subfolder="", variant=variant)
