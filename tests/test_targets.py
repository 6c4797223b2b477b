"""Targets: what each can carry, refused key by key before anything runs."""

import pytest

from stepquant import params, profiles
from stepquant.errors import UserError
from stepquant.targets import TARGETS

READY = profiles.read_profiles()


@pytest.fixture
def file(tmp_path):
    """The demo with the recipe of comfyui_w4a8 laid over it."""
    path = tmp_path / "params.yaml"
    path.write_text(profiles.overlay(READY["demo"], READY["comfyui_w4a8"]))
    return path


def test_each_target_has_a_profile_that_fits(file):
    params.check(file)
    file.write_text(READY["demo"])
    params.check(file)
    assert {params.section(file, "target").program} | {"comfyui_w4a8"} == set(TARGETS)


def test_another_recipe_laid_over_names_its_own_target(file):
    file.write_text(profiles.overlay(file.read_text(), READY["paper"]))
    params.check(file)
    assert params.section(file, "target").program == "stepquant"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("weight: asym_w4a8", "weight: int4", "format.weight, .activation: found 'int4 with int8_row'"),
        ("activation: int8_row", "activation: nvfp4", "allowed with .*: asym_w4a8 with int8_row"),
        ("alpha: 0", "alpha: 0.5", "smooth.alpha: found 0.5; .* has no smoothing; .*: 0"),
        ("alpha: 0", "alpha: search", "smooth.alpha: found 'search'"),
        ("beta: 0", "beta: null", "smooth.beta: found None"),
        ("gradient_steps: 0", "gradient_steps: 3", "smooth.gradient_steps: found 3"),
        ("means: false", "means: true", "center.means: found True; .* subtracts no mean"),
        ("hadamard: regular", "hadamard: sylvester", "rotate.hadamard: found 'sylvester'"),
        ("hadamard_sizes: [256]", "hadamard_sizes: [0, 256]", r"rotate.hadamard_sizes: found \[0, 256\]"),
        ("hadamard_sizes: [256]", "hadamard_sizes: [64]", r"rotate.hadamard_sizes: found \[64\]"),
        ("rank: 0", "rank: 16", "lowrank.rank: found 16; .* has no low-rank branch; .*: 0"),
        ("ratios: [1.0]", "ratios: [0.9, 1.0]", "clip.ratios, .exponent_offsets"),
        ("rotate: {}, lowrank: {}", "rotate: {}, lowrank: {rank: 8}", "lowrank.rank: found 8"),  # of an expert
    ],
)
def test_what_comfyui_cannot_carry_is_refused(file, old, new, message):
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))
    with pytest.raises(UserError, match=message) as caught:
        params.check(file)
    assert str(caught.value).startswith(f"{file}: ") and "`stepquant profile comfyui_w4a8`" in str(caught.value)


@pytest.mark.parametrize("program", ["comfyui_w4a8", "stepquant"])
def test_nothing_is_scheduled_where_activations_have_eight_bits(file, program):
    file.write_text(file.read_text().replace("program: comfyui_w4a8", f"program: {program}"))
    params.check(file)
    file.write_text(file.read_text().replace("activation_budget: 0.0", "activation_budget: 0.1"))
    message = rf"found 0.1; int8_row activations have 8 bits in every timestep bin \(target.program: {program}\);"
    for check in (params.check, params.check_budget):
        with pytest.raises(UserError, match=f"precision.activation_budget: {message} allowed with them: 0$"):
            check(file)


def test_a_regular_matrix_has_a_power_of_four(file):
    file.write_text(file.read_text().replace("hadamard_sizes: [256]", "hadamard_sizes: [128]"))
    with pytest.raises(UserError, match="allowed are 0 and powers of four, as rotate.hadamard is regular"):
        params.check(file)


def test_a_stage_refuses_as_check_does(file):
    """With the sections that a stage reads alone: it has no others where DVC runs it by itself."""
    params.check_target(file, "high_noise")
    file.write_text(file.read_text().replace("rank: 0", "rank: 16"))
    with pytest.raises(UserError, match="lowrank.rank: found 16"):
        params.check_target(file, "high_noise")
