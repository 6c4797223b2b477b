"""stepquant: our own checkpoints in diffusers, which carry the whole recipe."""

from stepquant.targets.description import Target

STEPQUANT = Target(
    name="stepquant",
    program="stepquant in diffusers",
    formats=None,
    hadamard=None,
    hadamard_sizes=None,
    smoothing=True,
    means=True,
    branch=True,
    clip=True,
)
