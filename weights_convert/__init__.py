"""Key-mapping tables between public Kolors checkpoints and kolors_core, as data."""

from collections.abc import Collection

from weights_convert.chatglm import CHATGLM
from weights_convert.clip_vision import CLIP_VISION
from weights_convert.controlnet import CONTROLNET
from weights_convert.face_id import FACE_ID
from weights_convert.ip_adapter import IP_ADAPTER
from weights_convert.key_mapping import Table
from weights_convert.unet import UNET
from weights_convert.vae import VAE

# A ControlNet has all required names of a UNet, so it is tried first. Another format of a component is one
# more table, under any other name.
TABLES: dict[str, Table] = {
    table.component: table for table in (CONTROLNET, UNET, VAE, CHATGLM, CLIP_VISION, IP_ADAPTER, FACE_ID)
}


def detect_component(names: Collection[str], where: str) -> tuple[Table, bool]:
    """Find the table of a set of tensor names, and whether the names are ours (else public).

    Raises ValueError naming `where` and the missing tensor if no table has all its required names.
    """
    have, most = set(names), 0
    why = "none of the tensors of a Kolors UNet, VAE, ChatGLM, CLIP, IP-Adapter or ControlNet is in it"
    for table in TABLES.values():
        for is_ours in (False, True):
            required = {table.to_ours(name) if is_ours else name: why for name, why in table.required.items()}
            absent = [name for name in required if name not in have]
            if not absent:
                return table, is_ours
            if len(required) - len(absent) > most:  # the best match so far
                most, why = len(required) - len(absent), f"{absent[0]} is missing ({required[absent[0]]})"
    hint = "; one shard alone is not enough, give its folder" if "-of-" in where else ""
    raise ValueError(f"{where}: not a component of Kolors: {why}{hint}")
