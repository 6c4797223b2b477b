"""Statistics of captions, at the sites that read the text tokens alone."""

from dataclasses import dataclass
from pathlib import Path

from stepquant.calibration.captions import CAPTIONS_PER_BATCH, CaptionInputs, caption_calls
from stepquant.calibration.replay import BlockObservers, ReplayWork, cut_ranges, load_glue, replay_block, replayed_calls
from stepquant.calibration.sampling_plan import SamplingPlan
from stepquant.calibration.statistics_files import block_name
from stepquant.calibration.trajectories import Trajectories
from stepquant.models.expert import open_expert


@dataclass(frozen=True)
class CaptionShard(ReplayWork):
    """The work of one unit: all captions through one range of blocks. It needs no other unit.

    Its files are those of a `Shard`, for the sites that read text alone. A site's input does not depend on the hidden
    states, so no block waits for another, and the blocks of a range run on a video of one patch.
    """

    def __call__(self, folder: Path) -> None:
        """Run the blocks on the captions and write the unit's files.

        Args:
            folder: the unit's folder.

        Raises:
            UserError: NaN or Inf in an activation, or a missing or damaged input.
        """
        trajectories = Trajectories(self.trajectories)
        calls, captions = (
            replayed_calls(trajectories, self.expert, self.bins, self.capture),
            caption_calls(trajectories),
        )
        model = open_expert(self.manifest, self.expert, self.compute)
        sites = tuple(site for site in self.manifest.expert(self.expert).ordered_sites if site.text_alone)
        glue = load_glue(self.manifest.model_dump_json(), self.expert, self.compute)
        inputs = CaptionInputs.of(trajectories, self.manifest, self.expert, glue)
        plans: dict[str, SamplingPlan] = {}  # the same in every block
        for index in self.blocks:
            observers = BlockObservers(self, index, calls, captions, plans)
            batches = (
                # In the plan of a text site, the captions come after the calls.
                (range(len(calls) + part.start, len(calls) + part.stop), inputs(part))
                for part in cut_ranges(len(captions), CAPTIONS_PER_BATCH)
            )
            for _ in replay_block(model.block(index), sites, batches, observers.observe):
                pass
            observers.save(folder / block_name(index))
