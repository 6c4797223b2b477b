"""Tensors in Zarr v3 groups: uncompressed, written once, complete or refused.

    <group>/zarr.json             attributes: {"complete": true, ...}, written last
    <group>/<array>/zarr.json     bfloat16 is kept as uint16 with the attribute {"view": "bfloat16"}
    <group>/<array>/c/...         one chunk, or one per index of the first axis for arrays of 3 and more axes

A group may lie in an object store, with a pointer in its place (object_store.py). Zarr reads a missing chunk as zeros without an
error, so a group without its marker, or with fewer chunk files than its arrays need, is refused.
"""

import json
from math import prod
from pathlib import Path
from typing import Any

import torch
import zarr

from stepquant.errors import UserError
from stepquant.storage import object_store


def write_group(folder: Path, tensors: dict[str, torch.Tensor], attributes: dict[str, Any]) -> None:
    """Write tensors as one group; the completion marker comes last."""
    group = zarr.open_group(folder, mode="w")
    for name, tensor in tensors.items():
        view = tensor.detach().cpu().contiguous()
        extra = {}
        if view.dtype == torch.bfloat16:
            view, extra = view.view(torch.uint16), {"view": "bfloat16"}
        array = view.numpy()
        chunks = (1, *array.shape[1:]) if array.ndim >= 3 else array.shape
        stored = group.create_array(
            name,
            shape=array.shape,
            chunks=tuple(max(1, n) for n in chunks),
            dtype=array.dtype,
            compressors=None,
            attributes=extra,
            config={"write_empty_chunks": True},
        )
        stored[...] = array
    group.attrs.update(attributes | {"complete": True})


def group_metadata(attributes: dict[str, Any]) -> str:
    """The zarr.json of a complete group whose members are written elsewhere."""
    return json.dumps(
        {"attributes": attributes | {"complete": True}, "zarr_format": 3, "node_type": "group"},
        indent=2,
        sort_keys=True,
    )


def open_group(folder: Path) -> zarr.Group:
    """A complete group, on disk or where a pointer leads (object_store.py). Raises UserError if it is missing or was not finished."""
    store, path = object_store.find(folder) or (folder, "")
    try:
        with object_store.reported(folder):
            group = zarr.open_group(store, path=path, mode="r")
    except FileNotFoundError:
        raise UserError(f"{folder}: no such Zarr group; run the stage that writes it") from None
    except ValueError as error:
        raise UserError(f"{folder}: broken Zarr metadata ({error}); remove it and run its stage again") from None
    if not group.attrs.get("complete"):
        raise UserError(f"{folder}: this Zarr group was never finished; remove it and run its stage again")
    return group


def read_tensor(group: zarr.Group, name: str, index: Any = ...) -> torch.Tensor:
    """An array of a group, or `array[index]`. Raises UserError if the array or one of its chunks is missing or broken."""
    where = f"{group.store_path}/{name}"
    with object_store.reported(where):
        if name not in group:
            raise UserError(f"{where}: no such array")
        array = group[name]
        expected, found = prod(-(-n // c) for n, c in zip(array.shape, array.chunks)), array.nchunks_initialized
        if found != expected:
            raise UserError(
                f"{where}: {found} of {expected} chunks are there; remove the folder and run its stage again"
            )
        try:
            tensor = torch.from_numpy(array[index])
        except ValueError as error:
            raise UserError(
                f"{where}: a chunk is truncated ({error}); remove the folder and run its stage again"
            ) from None
    return tensor.view(torch.bfloat16) if array.attrs.get("view") == "bfloat16" else tensor
