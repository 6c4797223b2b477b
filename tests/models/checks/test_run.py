"""The parameters of a run against the model: sizes, frames, text, guidance, experts, bins and steps."""

from pathlib import Path

import pytest
import yaml
from PIL import Image

from stepquant.errors import UserError
from stepquant.models.checks import check_known, check_pictures, check_run
from stepquant.models.prompts import Prompt
from stepquant.models.source import describe_experts
from stepquant.params import Sampling
from stepquant.profiles import read_profiles

UNIPC = {"_class_name": "UniPCMultistepScheduler", "prediction_type": "flow_prediction", "use_flow_sigmas": True}
# UniPC cuts t = 1000 shift s / (1 + (shift - 1) s), s = 1, 3/4, 1/2, 1/4 to whole numbers; s = 1 is 0.999...
FOUR_STEPS = "with 4 steps and flow_shift 5 t = 999, 937, 833, 625"
SAMPLING = Sampling(
    height=32,
    width=48,
    num_frames=9,
    steps=4,
    flow_shift=5.0,
    guidance_scale=3.0,
    guidance_scale_2=3.0,
    max_sequence_length=16,
)
BINS = {"high_noise": 1, "low_noise": 1}


@pytest.fixture
def model(source):
    return describe_experts(source.folder, str(source.folder), None)


@pytest.fixture
def dense(source):
    source.configure("model_index.json", boundary_ratio=None, transformer_2=[None, None])
    return describe_experts(source.folder, str(source.folder), None)


@pytest.fixture
def refusal(source, model):
    def run(bins=BINS, manifest=model, **changes):
        with pytest.raises(UserError) as caught:
            check_run(source.folder, manifest, SAMPLING.model_copy(update=changes), bins)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    return run


def test_what_fits_passes(source, model):
    check_run(source.folder, model, SAMPLING, BINS)
    check_run(source.folder, model, SAMPLING)


@pytest.mark.parametrize(
    ("key", "value", "near"),
    [("height", 37, "32 or 48"), ("width", 40, "32 or 48"), ("height", 8, "16"), ("width", 833, "832 or 848")],
)
def test_a_size_that_the_model_does_not_divide(refusal, key, value, near):
    assert refusal(**{key: value}) == f"sampling.{key}: {value}; this model needs a multiple of 16: use {near}"


def test_the_multiple_follows_the_vae_and_the_patch(refusal, model):
    """TI2V-5B: 16 pixels per latent, patches of 2 x 2."""
    large = model.model_copy(update={"compression": model.compression.model_copy(update={"scale_factor_spatial": 16})})
    assert refusal(manifest=large, width=48).startswith("sampling.width: 48; this model needs a multiple of 32: use 32")


@pytest.mark.parametrize(
    ("frames", "near"), [(1, "5"), (2, "5"), (4, "5"), (6, "5 or 9"), (8, "5 or 9"), (80, "77 or 81"), (82, "81 or 85")]
)
def test_a_number_of_frames_that_the_vae_does_not_make(refusal, frames, near):
    assert refusal(num_frames=frames) == (
        f"sampling.num_frames: {frames}; this model makes 1 + a multiple of 4 frames, at least 5: use {near}"
    )


def test_more_text_than_the_tokenizer_takes(refusal, source, model):
    assert refusal(max_sequence_length=33) == (
        "sampling.max_sequence_length: 33; allowed: at most 32, the tokenizer's model_max_length"
    )
    source.configure("tokenizer/tokenizer_config.json", model_max_length=1000000000000000019884624838656)
    check_run(source.folder, model, SAMPLING.model_copy(update={"max_sequence_length": 512}), BINS)


def test_a_second_guidance_scale_without_effect(refusal, source, model, dense):
    assert refusal(guidance_scale=1.0).startswith("sampling.guidance_scale_2: 3 has no effect with sampling.guidance_")
    none = SAMPLING.model_copy(update={"guidance_scale": 1.0, "guidance_scale_2": 1.0})
    check_run(source.folder, model, none, BINS)
    one = SAMPLING.model_copy(update={"guidance_scale": 1.0})
    check_run(source.folder, dense, one, {"denoiser": 1})  # a dense model has no second scale


def test_two_experts_in_the_parameters_of_a_dense_model(refusal, dense):
    assert refusal(manifest=dense) == (
        "bins: has high_noise, low_noise; this model has the single expert denoiser: set bins.denoiser, and nothing "
        "else"
    )


@pytest.mark.parametrize("bins", [{"denoiser": 2}, {"high_noise": 1}, BINS | {"middle": 1}, {}])
def test_other_experts_than_the_model_has(refusal, bins):
    message = "; this model has the experts high_noise and low_noise: set bins.high_noise and bins.low_noise, and "
    assert message in refusal(bins=bins)


def test_a_bin_that_no_step_reaches(refusal, source, model):
    edges = {"high_noise": [1000, 975, 940, 900], "low_noise": [900, 700, 0]}
    assert refusal(bins=edges) == (
        f"bins.high_noise: bin 1 (940, 975] has no step; {FOUR_STEPS}; use edges [1000, 940, 900], or more "
        "sampling.steps"
    )
    check_run(source.folder, model, SAMPLING, edges | {"high_noise": [1000, 940, 900]})


@pytest.mark.parametrize(
    ("expert", "spec", "empty", "edges"),
    [
        ("high_noise", [1000, 999.5, 900], "0 (999.5, 1000]", "1000, 900"),
        ("high_noise", 4, "1 (950, 975]", "1000, 950, 900"),
        ("low_noise", [900, 850, 700, 0], "0 (850, 900]", "900, 700, 0"),
        ("low_noise", [900, 700, 500, 0], "2 (0, 500]", "900, 700, 0"),
    ],
)
def test_the_edges_that_are_named_have_a_step_each(refusal, source, model, expert, spec, empty, edges):
    message = refusal(bins=BINS | {expert: spec})
    assert message.startswith(f"bins.{expert}: bin {empty} has no step; ") and f"use edges [{edges}]" in message
    named = [float(edge) for edge in edges.split(", ")]
    check_run(source.folder, model, SAMPLING, BINS | {expert: named})


def test_an_expert_that_no_step_reaches(refusal):
    # one step is at t = 999
    assert refusal(steps=1) == (
        "sampling.steps: no step reaches the expert low_noise (0 <= t <= 900); with 1 steps and flow_shift 5 t = 999; "
        "use more steps, or a smaller sampling.flow_shift"
    )


def test_a_step_at_the_boundary_belongs_to_the_first_expert(source, model):
    """The pipelines compare t >= boundary_ratio x 1000: with t = 999, 937, 833, 625 and 0.833 three are high noise."""
    source.configure("model_index.json", boundary_ratio=0.833)
    manifest = describe_experts(source.folder, str(source.folder), None)
    check_run(source.folder, manifest, SAMPLING, {"high_noise": [1000, 950, 900, 833], "low_noise": 1})


def test_the_scheduler_of_the_folder_is_asked(refusal, source):
    source.configure("scheduler/scheduler_config.json", use_flow_sigmas=False)
    assert "sampling.flow_shift does not act on UniPCMultistepScheduler" in refusal()


def test_a_model_that_is_not_here_is_checked_as_far_as_it_is_known(model):
    with pytest.raises(UserError, match="sampling.height: 37"):
        check_known(model, UNIPC, SAMPLING.model_copy(update={"height": 37}), BINS)
    check_known(model, UNIPC, SAMPLING, BINS)


def test_the_pictures_of_the_demo_are_too_small_for_the_real_model(tmp_path):
    picture = tmp_path / "large.png"
    Image.new("RGB", (832, 480)).save(picture)
    demo = Path(__file__).resolve().parents[3] / "data/calibration/images/calibration_00.png"
    real = Sampling(**yaml.safe_load(read_profiles()["wan2.2-i2v-a14b"])["sampling"])
    prompts = [Prompt("calibration_00", "calibration", "a crab", "", {"image": demo}, 0)]
    with pytest.raises(UserError) as caught:
        check_pictures(prompts, real, "trajectories.manifest")
    assert str(caught.value) == (
        "trajectories.manifest: the picture of prompt calibration_00 has 64 x 64 pixels, for videos of 832 x 480; its "
        "part of their shape must have at least 25% of their pixels; give prompts of your own in trajectories.manifest"
    )
    check_pictures(prompts, real.model_copy(update={"height": 64, "width": 64}), "key")
    check_pictures([Prompt("text", "calibration", "a crab", "", {}, 0)], real, "key")  # text-to-video
    last = {"image": picture, "last_image": demo}
    with pytest.raises(UserError, match="prompt both has 64 x 64"):
        check_pictures([Prompt("both", "calibration", "a crab", "", last, 0)], real, "key")
