"""ControlNet files: loading and saving of Kolors' ControlNets, and loading of SDXL's for a Kolors UNet."""

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
    open_weights,
    read_json,
    save_component,
)
from kolors_core.devices import (
    Dtypes,
    check_low_cpu_mem_usage,
    dtype_of,
    merge_dtype_arguments,
    refuse_pickles,
    unwrap_compiled,
)
from kolors_core.loading import LoadReport, load
from kolors_core.module import require_plain
from kolors_core.unet import UNet
from kolors_core.validation import as_path
from weights_convert.atomic_write import atomic_folder
from weights_convert.safetensors_files import Source, Tensors


class KolorsControlNet(ControlNet):
    """ControlNet that can be loaded and saved, such as Kwai-Kolors/Kolors-ControlNet-Canny."""

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | Path, *, subfolder: str = "", torch_dtype: Dtypes = None,
        dtype: Dtypes = None, device: torch.device | str = "cpu", variant: str | None = None,
        revision: str | None = None, cache_dir: str | Path | None = None, local_files_only: bool = False,
        token: str | bool | None = None, use_safetensors: bool | None = None, low_cpu_mem_usage: bool = True,
    ) -> Self:  # fmt: skip
        """Load a folder or hub repository, strictly, fetching only the ControlNet's files.

        "tiny" is the embedded model's ControlNet, for Canny edges. torch_dtype, or by its newer name dtype:
        float32 if None; it must be the UNet's. variant: such as "fp16"; None selects the only one. Raises
        FileNotFoundError or ValueError naming the file, field or tensor.
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
        cls, pretrained_model_name_or_path: str | Path, unet: UNet, *, subfolder: str = "",
        variant: str | None = None, revision: str | None = None, cache_dir: str | Path | None = None,
        local_files_only: bool = False, token: str | bool | None = None,
    ) -> tuple[Self, LoadReport]:  # fmt: skip
        """Load an SDXL ControlNet for a Kolors UNet: an approximation, as it was trained with another UNet.

        It has no text projection, and its added condition has the width of SDXL's text: both are copied from
        the UNet. All other weights are SDXL's, with SDXL's timesteps for Kolors'. Returns it with the UNet's
        dtype and device, and a report whose `missing` are the copied tensors. Raises FileNotFoundError, or
        ValueError naming what does not fit; also for one with a text projection, see `from_pretrained`.
        """
        folder = fetch_component(
            pretrained_model_name_or_path, "controlnet", subfolder, variant, True, revision=revision,
            cache_dir=cache_dir, local_files_only=local_files_only, token=token,
        )  # fmt: skip
        folder = folder / subfolder
        file, unet = folder / "config.json", unwrap_compiled(unet)
        require_plain(unet, "borrow from it; borrow from a plain UNet, then quantize")
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
        source: Source | Tensors = open_weights(folder, variant)
        from_unet = ["text_proj."]
        if public.get("projection_class_embeddings_input_dim") != added:
            from_unet.append("add_embedding.")  # both of its layers, since they were trained together
            kept = {name: source[name] for name in source if not name.startswith("add_embedding.")}
            source = Tensors(kept, source.where)
        with torch.device("meta"):
            net = cls(config)
        state, weight = base_state(unet), unet.conv_in.weight
        copied = [name for name in net.state_dict() if name.startswith(tuple(from_unet))]
        partial = {name: (lambda shape, found, name=name: state[name]) for name in copied}
        report = load(net, source, "controlnet", dtype=weight.dtype, device=weight.device, partial=partial)
        if report.unexpected:
            raise ValueError(f"{source.where}: {report.unexpected[0]} is no tensor of a ControlNet")
        return net.eval(), report

    def save_pretrained(self, folder: str | Path, *, variant: str | None = None) -> None:
        """Write a new folder that the reference and `from_pretrained` load, whole or not at all.

        Raises FileExistsError if `folder` exists and is not empty, ValueError for a variant that is not
        letters, digits and underscores.
        """
        with atomic_folder(as_path("folder", folder)) as new_folder:
            save_component(self, new_folder, "controlnet", subfolder="", variant=variant)
