"""The settings of the recipe against the sizes of a model, from its manifest alone."""

from stepquant.errors import UserError
from stepquant.formats import check_groups, eight_bit_partner, get_format
from stepquant.models.manifest import ModelManifest
from stepquant.params import Format, Rotate
from stepquant.quantize.rotate import check_rotation


def check_shapes(
    manifest: ModelManifest, expert: str, formats: Format, rank: int, rotate: Rotate | None = None
) -> None:
    """Refuse settings that do not fit the model, before any work.

    Args:
        manifest: The source model.
        expert: Name of the expert.
        formats: Formats whose group sizes must divide the channels of every site.
        rank: Rank of the low-rank branch, at most the smaller dimension of every site's weight.
        rotate: Hadamard sizes that must divide the channels of every site; None for none.

    Raises:
        UserError: The first of them that does not fit.
    """
    for name, site in manifest.expert(expert).sites.items():
        where, rows, columns = f"{expert} {name}", site.rows, site.columns
        for kind in ("weight", "activation"):
            check_groups(columns, get_format(getattr(formats, kind)), f"format.{kind}, {where}")
        if rotate is not None:
            for size in rotate.hadamard_sizes:
                check_rotation(size, columns, f"rotate.hadamard_sizes, {where}", kind=rotate.hadamard)
        if rank > min(rows, columns):
            raise UserError(
                f"lowrank.rank: {rank} for {where}, a weight of {rows} x {columns}; allowed: 0 to {min(rows, columns)}"
            )


def check_eight_bits(manifest: ModelManifest, expert: str, formats: Format) -> None:
    """Refuse a model with a site whose channels cannot be divided into the groups of the 8-bit format of activations.

    Raises:
        UserError: The first such site.
    """
    wide = eight_bit_partner(get_format(formats.activation))
    for name, site in manifest.expert(expert).sites.items():
        check_groups(site.columns, wide, f"8-bit activations, {expert} {name}")
