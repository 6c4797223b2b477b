import json

import pytest
import torch

from stepquant.errors import InvalidInput, UnsupportedCheckpoint, UserError
from stepquant.runtime.layout import QuantizationSettings, linear_layout

TARGETS = ("blocks.0.attn1.to_q", "blocks.0.ffn.net.2")
SETTINGS = QuantizationSettings(
    "nvfp4",
    "mxfp4",
    "ceil",
    "absmax",
    16,
    True,
    {TARGETS[1]: 64},
    (1000.0, 950.0, 900.0),
    TARGETS,
    eight_bit_format="mxfp8",
    eight_bit_bins={TARGETS[1]: (1,)},
)
CONFIG = {
    "quant_method": "stepquant",
    "version": 3,
    "weight_format": "nvfp4",
    "activation_format": "mxfp4",
    "activation_rounding": "ceil",
    "activation_scales": "absmax",
    "rank": 16,
    "mean_subtraction": True,
    "rotations": {"blocks.0.ffn.net.2": 64},
    "bin_edges": [1000.0, 950.0, 900.0],
    "targets": ["blocks.0.attn1.to_q", "blocks.0.ffn.net.2"],
    "eight_bit_format": "mxfp8",
    "eight_bit_bins": {"blocks.0.ffn.net.2": [1]},
    "hadamard": "sylvester",
}
NO_EIGHT_BITS = {"eight_bit_format": None, "eight_bit_bins": {}}


def test_config_is_the_documented_one():
    assert SETTINGS.to_config() == CONFIG


def test_config_survives_json():
    assert QuantizationSettings.from_config(json.loads(json.dumps(CONFIG))) == SETTINGS
    assert SETTINGS.bins == 2


def test_weights_only():
    settings = QuantizationSettings.from_config(CONFIG | NO_EIGHT_BITS | {"activation_format": None})
    assert settings.activation_format is None


@pytest.mark.parametrize(
    ("activation", "eight_bits"), [("int4", "int8"), ("mxfp4", "mxfp8"), ("nvfp4", "mxfp8")], ids=lambda name: name
)
def test_the_eight_bit_format_belongs_to_that_of_the_activations(activation, eight_bits):
    config = CONFIG | {"activation_format": activation, "eight_bit_format": eight_bits}
    assert QuantizationSettings.from_config(config).to_config() == config
    for other in {"int8", "mxfp8", "int4", "fp8"} - {eight_bits}:
        message = f"eight_bit_format is '{other}'; allowed beside {activation} activations: '{eight_bits}', or null"
        with pytest.raises(InvalidInput, match=message):
            QuantizationSettings.from_config(config | {"eight_bit_format": other})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight_format": "int8"}, "weight_format is 'int8'; allowed: int4, mxfp4, nvfp4, asym_w4a8$"),
        ({"weight_format": ["int4"]}, r"weight_format is \['int4'\]; allowed: int4, mxfp4, nvfp4, asym_w4a8"),
        ({"weight_format": "int8_row"}, "weight_format is 'int8_row'; allowed"),
        ({"activation_format": "mxfp8"}, "format is 'mxfp8'; allowed: int4, mxfp4, nvfp4, int8_row, or null"),
        ({"activation_format": "fp8"}, "activation_format is 'fp8'; allowed"),
        ({"activation_format": "asym_w4a8"}, "activation_format is 'asym_w4a8'; allowed"),
        ({"hadamard": "walsh"}, "hadamard is 'walsh'; allowed: sylvester, regular"),
        ({"hadamard": "regular", "rotations": {"blocks.0.ffn.net.2": 32}}, "a power of four, by module path"),
        ({"activation_rounding": "nearest"}, "activation_rounding is 'nearest'; allowed: floor, ceil"),
        ({"activation_scales": "max"}, "activation_scales is 'max'; allowed: absmax, error"),
        ({"activation_scales": "error"}, "activation_scales is 'error', but activations are mxfp4; allowed: 'absmax'"),
        ({"rank": -1}, "rank is -1; allowed: an integer of at least 0"),
        ({"rank": "16"}, "rank is '16'"),
        ({"mean_subtraction": 1}, "mean_subtraction is 1; allowed: true, false"),
        ({"rotations": {"blocks.0.ffn.net.2": 48}}, "a power of two, by module path"),
        ({"rotations": {"blocks.0.ffn.net.2": True}}, "a power of two, by module path"),
        ({"rotations": ["blocks.0.ffn.net.2"]}, "allowed: a Hadamard size, which is a power of two, by module path"),
        ({"rotations": {"blocks.1.ffn.net.2": 64}}, "name 'blocks.1.ffn.net.2', which is not in targets"),
        ({"bin_edges": [1000.0]}, "allowed: at least two falling values"),
        ({"bin_edges": [900.0, 1000.0]}, "allowed: at least two falling values"),
        ({"bin_edges": [1000.0, "900"]}, "allowed: at least two falling values"),
        ({"bin_edges": 3}, "bin_edges is 3; expected a list"),
        ({"targets": []}, "targets must be a list of module paths, at least one"),
        ({"targets": ["a", "a"]}, "none twice"),
        ({"targets": [1]}, "module paths"),
        ({"targets": "blocks"}, "targets is 'blocks'; expected a list"),
        (
            {"eight_bit_format": None},
            "eight_bit_bins has targets, but eight_bit_format is null; allowed: both",
        ),
        ({"eight_bit_bins": {}}, "eight_bit_format is 'mxfp8', but eight_bit_bins has no target"),
        ({"activation_format": None}, "but activation_format is null, so that activations stay unquantized"),
        ({"activation_format": "int8_row"}, "but int8_row activations have 8 bits in every bin; allowed: null"),
        ({"eight_bit_bins": [1]}, r"eight_bit_bins are \[1\]; allowed: a list of bin indices by module path"),
        ({"eight_bit_bins": {"blocks.1.ffn.net.2": [1]}}, "name 'blocks.1.ffn.net.2', which is not in targets"),
        *(
            ({"eight_bit_bins": {"blocks.0.ffn.net.2": bins}}, "net.2' are .*; allowed: rising .*, of 0 to 1")
            for bins in ([], [2], [-1], [1, 0], [1, 1], [True], [0.0], ["0"], 1, "1", None)
        ),
        ({"group_size": 16}, "unknown group_size; allowed: activation_format"),
    ],
)
def test_wrong_config(change, message):
    with pytest.raises(UserError, match=message):
        QuantizationSettings.from_config(CONFIG | change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"quant_method": "svdquant"}, "quant_method is 'svdquant'; allowed: 'stepquant'"),
        ({"version": 4}, "version is 4; this stepquant reads version 3: install the stepquant that wrote"),
        ({"version": 0}, "version is 0; this stepquant reads version 3"),
        ({"version": None}, "version is None; this stepquant reads version 3"),
    ],
)
def test_other_methods_and_versions(change, message):
    with pytest.raises(UnsupportedCheckpoint, match=message):
        QuantizationSettings.from_config(CONFIG | change)


@pytest.mark.parametrize("version", [1, 2])
def test_older_versions_name_the_remedy(version):
    """Version 1 had `centred` in place of `mean_subtraction`: the version is refused before any key is read."""
    old = {k: v for k, v in CONFIG.items() if k != "mean_subtraction"} | {"version": version, "centred": True}
    with pytest.raises(UnsupportedCheckpoint) as caught:
        QuantizationSettings.from_config(old)
    assert str(caught.value) == (
        f"quantization_config: version is {version}, written by an older stepquant; this one reads version 3: "
        "write the checkpoint again with stage pack (dvc repro)"
    )


def test_wrong_values_are_value_errors():
    with pytest.raises(ValueError, match="rank is -1") as caught:
        QuantizationSettings.from_config(CONFIG | {"rank": -1})
    assert isinstance(caught.value, InvalidInput)


def test_missing_keys():
    with pytest.raises(InvalidInput, match="missing rank, targets"):
        QuantizationSettings.from_config({k: v for k, v in CONFIG.items() if k not in ("rank", "targets")})


@pytest.mark.parametrize(
    ("weight", "activation", "rank", "expected"),
    [
        (
            "int4",
            "int4",
            8,
            {
                "qweight": ((256, 64), torch.int8),
                "wscales": ((2, 256), torch.bfloat16),
                "smooth_factor": ((128,), torch.bfloat16),
                "proj_down": ((128, 8), torch.bfloat16),
                "proj_up": ((256, 8), torch.bfloat16),
                "clip_ratio": ((3,), torch.float32),
            },
        ),
        (
            "mxfp4",
            "mxfp4",
            0,
            {
                "qweight": ((256, 64), torch.int8),
                "wscales": ((4, 256), torch.uint8),
                "smooth_factor": ((128,), torch.bfloat16),
                "clip_ratio": ((3,), torch.float32),
                "clip_exponent": ((3,), torch.int8),
            },
        ),
        (
            "nvfp4",
            None,
            0,
            {
                "qweight": ((256, 64), torch.int8),
                "wscales": ((8, 256), torch.float8_e4m3fn),
                "wtscale": ((1,), torch.bfloat16),
                "wcscales": ((256,), torch.bfloat16),
                "smooth_factor": ((128,), torch.bfloat16),
            },
        ),
    ],
)
def test_tensors_of_a_linear(weight, activation, rank, expected):
    settings = QuantizationSettings(
        weight, activation, "ceil", "absmax", rank, False, {}, (1000.0, 900.0, 600.0, 0.0), ("a",)
    )
    assert linear_layout(settings, N=256, K=128) == expected


def test_a_layout_with_mean_subtraction_has_a_mean():
    settings = QuantizationSettings("int4", "int4", "ceil", "absmax", 0, True, {}, (1000.0, 0.0), ("a",))
    assert linear_layout(settings, N=256, K=128)["mean"] == ((128,), torch.bfloat16)
