"""Tensors in Zarr v3 groups: uncompressed, written once, complete or refused.

    <group>/zarr.json             attributes: {"complete": true, ...}, written last
    <group>/<array>/zarr.json     bfloat16 is stored as uint16 with the attribute {"view": "bfloat16"}
    <group>/<array>/c/...         one chunk, or one per index of the first axis for arrays of 3 and more axes

An array can be divided into parts of some rows (Zarr's sharding): still one file, but a read of some rows takes only
the bytes of their parts. A group can be in an object store, with a pointer in its place (object_store.py). Zarr reads a
missing chunk as zeros without an error, so a group without its marker, or with fewer chunk files than its arrays need,
is refused.
"""

import json
from math import prod
from pathlib import Path
from typing import Any

import torch
import zarr

from stepquant.errors import UserError
from stepquant.storage import object_store


def write_group(
    folder: Path,
    tensors: dict[str, torch.Tensor],
    attributes: dict[str, Any],
    *,
    part_rows: dict[str, int] | None = None,
) -> None:
    """Write tensors as one group; the completion marker is written last.

    Args:
        folder: the group's folder; an existing group is replaced.
        tensors: by array name, of any dtype that NumPy has, or bfloat16.
        attributes: JSON values.
        part_rows: rows per part, by name, of the 2-D arrays that are read in parts.
    """
    group = zarr.open_group(folder, mode="w")
    for name, tensor in tensors.items():
        _write_array(group, name, tensor, (part_rows or {}).get(name))
    group.attrs.update(attributes | {"complete": True})


def _write_array(group: zarr.Group, name: str, tensor: torch.Tensor, part_rows: int | None) -> None:
    view = tensor.detach().cpu().contiguous()
    attributes = {}
    if view.dtype == torch.bfloat16:
        view, attributes = view.view(torch.uint16), {"view": "bfloat16"}
    array = view.numpy()
    chunk, file = (1, *array.shape[1:]) if array.ndim >= 3 else array.shape, None
    if part_rows:
        chunk, file = (part_rows, *array.shape[1:]), (-(-len(array) // part_rows) * part_rows, *array.shape[1:])
    stored = group.create_array(
        name,
        shape=array.shape,
        chunks=tuple(max(1, n) for n in chunk),
        shards=file,
        dtype=array.dtype,
        compressors=None,
        attributes=attributes,
        config={"write_empty_chunks": True},
    )
    stored[...] = array


def group_metadata(attributes: dict[str, Any]) -> str:
    """The text of zarr.json of a complete group whose members are written by others."""
    return json.dumps(
        {"attributes": attributes | {"complete": True}, "zarr_format": 3, "node_type": "group"},
        indent=2,
        sort_keys=True,
    )


def open_group(folder: Path) -> zarr.Group:
    """Open a complete group, on disk or in the object store that a pointer names.

    Args:
        folder: the group's folder, or the place where it would be on disk.

    Returns:
        The group, read-only.

    Raises:
        UserError: the group is missing, its metadata is damaged, or it was not finished.
    """
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
    """Read an array of a group.

    Args:
        group: from `open_group`.
        name: the array's name.
        index: NumPy-style index; only the chunks and parts that it touches are read.

    Returns:
        The array, or `array[index]`, on the CPU.

    Raises:
        UserError: the array or one of its chunks is missing or damaged.
    """
    where = f"{group.store_path}/{name}"
    with object_store.reported(where):
        array = _array(group, name)
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


def array_shape(group: zarr.Group, name: str) -> tuple[int, ...]:
    """The shape of an array of a group, without reading its chunks. Raises UserError if there is no such array."""
    with object_store.reported(group.store_path):
        shape: tuple[int, ...] = _array(group, name).shape
    return shape


def _array(group: zarr.Group, name: str) -> zarr.Array:
    array = group.get(name)
    if not isinstance(array, zarr.Array):
        raise UserError(f"{group.store_path}/{name}: no such array")
    return array
