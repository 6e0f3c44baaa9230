"""ControlNet files: loading and saving of Kolors' ControlNets, and loading of SDXL's for a Kolors UNet."""

from pathlib import Path
from typing import Self, cast

import torch

from kolors_core import checkpoint, devices
from kolors_core.adapters.controlnet import ControlNet, ControlNetConfig
from kolors_core.denoiser import require_unet
from kolors_core.devices import Dtypes
from kolors_core.hub import find_linked_file
from kolors_core.loading import LoadReport, check, load
from kolors_core.module import require_plain
from kolors_core.unet import UNet
from kolors_core.validation import as_path
from weights_convert.atomic_write import atomic_folder
from weights_convert.safetensors_files import Source, Tensors


class KolorsControlNet(ControlNet):
    """ControlNet that can be loaded and saved, such as Kwai-Kolors/Kolors-ControlNet-Canny."""

    source: str | None = None  # the folder, repository or file that it was loaded from

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | Path, *, subfolder: str = "", torch_dtype: Dtypes = None,
        dtype: Dtypes = None, device: torch.device | str = "cpu", variant: str | None = None,
        revision: str | None = None, cache_dir: str | Path | None = None, local_files_only: bool = False,
        token: str | bool | None = None,
    ) -> Self:  # fmt: skip
        """Load a folder or hub repository, strictly, fetching only the ControlNet's files.

        "tiny" is the embedded model's ControlNet, for Canny edges. torch_dtype, or by its newer name dtype:
        float32 if None; it must be the UNet's. variant: such as "fp16"; None selects the only one. Raises
        FileNotFoundError or ValueError naming the file, field or tensor.
        """
        name = pretrained_model_name_or_path
        is_embedded = name == checkpoint.EMBEDDED_NAME and not subfolder
        net = checkpoint.load_component(
            name, "controlnet", subfolder="controlnet" if is_embedded else subfolder, variant=variant,
            dtype=devices.dtype_of("unet", devices.merge_dtype_arguments(torch_dtype, dtype)), device=device,
            kind=checkpoint.ModelSpec(ControlNetConfig, cls), token=token,
            revision=revision, cache_dir=cache_dir, local_files_only=local_files_only,
        )  # fmt: skip
        net.source = str(Path(name, subfolder)) + (f"@{revision}" if revision else "")
        return net

    @classmethod
    def from_single_file(
        cls, pretrained_model_link_or_path: str | Path, *, config: str | Path | None = None,
        torch_dtype: Dtypes = None, dtype: Dtypes = None, device: torch.device | str = "cpu",
        revision: str | None = None, cache_dir: str | Path | None = None, local_files_only: bool = False,
        token: str | bool | None = None,
    ) -> Self:  # fmt: skip
        """Load a safetensors file with diffusers' names, strictly.

        pretrained_model_link_or_path: the file, or its address on the hub. config: a folder or hub repository
        with the config.json of a ControlNet, of that revision; if None the file's neighbor, or else the sizes
        of the released ones. Others, and errors: as in `from_pretrained`.
        """
        hub = {"cache_dir": cache_dir, "local_files_only": local_files_only, "token": token}
        dtype = devices.dtype_of("unet", devices.merge_dtype_arguments(torch_dtype, dtype))
        device = devices.loading_device(device)
        file = find_linked_file(pretrained_model_link_or_path, **hub)
        folder = file.parent
        if config is not None:
            hub["revision"] = revision
            folder = checkpoint.fetch_component(config, "controlnet", "", None, has_weights=False, **hub)
        elif revision is not None:
            raise ValueError("revision has no effect without config, whose it is")
        place = folder / "config.json"
        public = checkpoint.read_json(place) if config is not None or place.is_file() else {}
        is_given = config is not None or public.get("_class_name") == "ControlNetModel"
        sizes = ControlNetConfig.from_public(public, str(place)) if is_given else ControlNetConfig()
        net, source = checkpoint.ModelSpec(ControlNetConfig, cls).empty(sizes), Source([file])
        try:
            names = check(net, source, "controlnet")
        except ValueError as error:
            hint = "" if is_given else "; these are the released sizes, for others give config"
            raise ValueError(f"{error}{hint}") from None
        weights = None if device.type == "meta" else source
        net = cast(Self, checkpoint.UnloadedModel(net, weights, names).fill(dtype, device))
        net.source = str(pretrained_model_link_or_path)
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
        hub = dict(revision=revision, cache_dir=cache_dir, local_files_only=local_files_only, token=token)
        name, unet = pretrained_model_name_or_path, devices.unwrap_compiled(unet)
        folder = checkpoint.fetch_component(name, "controlnet", subfolder, variant, True, **hub)
        file = folder / subfolder / "config.json"
        require_unet(unet, "a ControlNet")
        require_plain(unet, "borrow from it; borrow from a plain UNet, then quantize")
        public = checkpoint.read_json(file)
        if public.get("encoder_hid_dim_type") is not None:
            raise ValueError(f"{file}: it has a text projection: load it by from_pretrained")
        added = unet.config.text_dim + 6 * unet.config.size_dim
        own = {
            "encoder_hid_dim_type": "text_proj", "encoder_hid_dim": unet.config.text_dim,
            "projection_class_embeddings_input_dim": added,
        }  # fmt: skip
        with torch.device("meta"):
            net = cls(ControlNetConfig.from_public(public | own, str(file)))
        source: Source | Tensors = checkpoint.open_weights(file.parent, variant)
        from_unet = ["text_proj."]
        if public.get("projection_class_embeddings_input_dim") != added:
            from_unet.append("add_embedding.")  # both of its layers, since they were trained together
            kept = {name: source[name] for name in source if not name.startswith("add_embedding.")}
            source = Tensors(kept, source.where)
        state, weight = checkpoint.base_state(unet), unet.conv_in.weight
        copied = [name for name in net.state_dict() if name.startswith(tuple(from_unet))]
        partial = {name: (lambda shape, found, name=name: state[name]) for name in copied}
        report = load(net, source, "controlnet", dtype=weight.dtype, device=weight.device, partial=partial)
        if report.unexpected:
            raise ValueError(f"{source.where}: {report.unexpected[0]} is no tensor of a ControlNet")
        return net.eval(), report

    def save_pretrained(self, folder: str | Path, *, variant: str | None = None) -> None:
        """Write a folder that the reference and `from_pretrained` load, whole or not at all.

        A saved model's folder is replaced. FileExistsError if `folder` has other files, ValueError for a
        variant that is not a word.
        """
        with atomic_folder(as_path("folder", folder), checkpoint.is_own_folder) as new_folder:
            checkpoint.save_component(self, new_folder, "controlnet", subfolder="", variant=variant)
