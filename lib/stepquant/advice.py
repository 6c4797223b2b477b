"""Which parameter lowers the memory of a stage. `stepquant plan` prints it beforehand, a failed stage afterwards."""

# The activations of a whole video have to fit where it is sampled, and the weights unless they are offloaded.
SAMPLE_ELSEWHERE = (
    "set compute.offload: group (device) or disk (device and host), or lower sampling.num_frames, .height and .width, "
    "or sample on a larger machine and fetch the out with DVC"
)
LESS_MEMORY = {
    "trajectories": SAMPLE_ELSEWHERE,
    "generate": SAMPLE_ELSEWHERE,
    "capture": "lower capture.calls_per_chunk (device) or .calls_per_shard (host), then sampling.num_frames, .height "
    "or .width",
    "lowrank": "lower capture.search_tokens",
    "gptq": "no parameter helps: the Hessian of the widest site has to fit",
    "clip": "lower capture.search_tokens",
    "sensitivity": "lower sampling.num_frames, .height or .width: the graph of one call of a block has to fit",
    "pack": "no parameter helps: one block has to fit",
    "evaluate": "lower capture.heldout_tokens",
}
