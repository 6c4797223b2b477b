"""What stepquant has to know about a pipeline class and its denoiser class, as data.

A family is found by the class name in model_index.json (`find_family`). Everything that differs between families is
asked from it, so that no other module names a pipeline class.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from stepquant.models.sites import Site
from stepquant.params import Sampling

Config = Mapping[str, Any]  # a config.json, or model_index.json


@dataclass(frozen=True)
class BlockStack:
    """The repeated blocks of a denoiser.

    Attributes:
        attribute: name of the ModuleList, which is also the prefix of the weights' keys.
        count_key: key of config.json with the number of blocks.
        carried: name of the block's argument that the block's output replaces for the next block.
    """

    attribute: str
    count_key: str
    carried: str


@dataclass(frozen=True)
class DenoiserClass:
    """A denoiser class of diffusers.

    Attributes:
        name: class name, as in config.json.
        stack: its blocks.
        latents: argument of forward with the noisy latents [B, C, F, H, W]; channels after `out_channels` are
            conditions.
        timestep: argument of forward with t, [B] or [B, tokens].
        sites: the sites of a block by the denoiser's config, in the order in which they are reached.
        float32: names of the modules and parameters that diffusers keeps in float32 for every dtype
            (`_keep_in_fp32_modules` of the class).
    """

    name: str
    stack: BlockStack
    latents: str
    timestep: str
    sites: Callable[[Config], tuple[Site, ...]]
    float32: tuple[str, ...]

    def keeps_float32(self, key: str) -> bool:
        """Whether diffusers keeps the tensor of this key in float32."""
        return any(name in key.split(".") for name in self.float32)

    def load(self) -> Any:
        """The class itself. Importing diffusers takes seconds, so nothing else here does it."""
        import diffusers

        return getattr(diffusers, self.name)


@dataclass(frozen=True)
class ExpertRange:
    """One denoiser of a pipeline.

    Attributes:
        name: of the expert.
        subfolder: its component in the pipeline.
        low: lowest t, as a fraction of the scheduler's num_train_timesteps.
        high: highest t, as a fraction.
    """

    name: str
    subfolder: str
    low: float
    high: float


@dataclass(frozen=True)
class PromptImages:
    """The images of a prompt, named as in the prompt manifest and in the pipeline's call.

    Attributes:
        required: every prompt has them.
        optional: a prompt may have them.
    """

    required: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()


@dataclass(frozen=True)
class Family:
    """A pipeline class of diffusers.

    Attributes:
        pipeline: class name, as in model_index.json.
        denoiser: class of its experts.
        experts: the experts by model_index.json, in the order in which a sampler reaches them. Raises InvalidInput if
            the index names experts that the pipeline would not call as the index says.
        images: the images of a prompt, by model_index.json and an expert's config.
        check: refuses settings of model_index.json and the experts' configs with which the pipeline cannot run, or
            would run as another model.
        check_sampling: refuses sampling parameters that this pipeline cannot follow, by the sampling section and an
            expert's config.
        call: the arguments of the pipeline's call but for prompt, images and generator, by the sampling section and
            model_index.json (which a loaded pipeline has as its config).
    """

    pipeline: str
    denoiser: DenoiserClass
    experts: Callable[[Config], tuple[ExpertRange, ...]]
    images: Callable[[Config, Config], PromptImages]
    check: Callable[[Config, Sequence[Config]], None]
    check_sampling: Callable[[Sampling, Config], None]
    call: Callable[[Sampling, Config], dict[str, Any]]

    def load(self) -> Any:
        """The pipeline class itself; imports diffusers, which takes seconds."""
        import diffusers

        return getattr(diffusers, self.pipeline)
