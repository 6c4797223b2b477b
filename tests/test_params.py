from pathlib import Path

import pytest
import yaml

from stepquant import params
from stepquant.errors import UserError

DEMO = Path(__file__).resolve().parent.parent / "lib/stepquant/profiles/demo.yaml"
GONE = object()


def write(folder, changes=()):
    """The demo profile with some values changed: (dotted key, value) pairs; GONE removes the key."""
    values = yaml.safe_load(DEMO.read_text())
    for key, value in changes:
        *parents, last = key.split(".")
        node = values
        for name in parents:
            node = node.setdefault(name, {})
        if value is GONE:
            del node[last]
        else:
            node[last] = value
    path = folder / "params.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def refusal(path, *arguments):
    with pytest.raises(UserError) as caught:
        params.section(path, *arguments) if arguments else params.check(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and "\n" not in message
    return message.removeprefix(f"{path}: ")


def test_the_demo_profile_is_fine_and_arrives_unchanged(tmp_path):
    path = write(tmp_path)
    params.check(path)
    values = yaml.safe_load(DEMO.read_text())
    for name in params.SECTIONS:
        assert params.section(path, name).model_dump() == values[name]


@pytest.mark.parametrize("name", [name for name in params.SECTIONS if name != "bins"])
def test_no_section_has_a_default_or_takes_an_unknown_key(tmp_path, name):
    for key in params.SECTIONS[name].model_fields:
        message = refusal(write(tmp_path, [(f"{name}.{key}", GONE)]), name)
        assert (
            message.startswith(f"{name}.{key}: missing; expected the keys ") and key in message.split("expected", 1)[1]
        )
    message = refusal(write(tmp_path, [(f"{name}.misspelt", 1)]), name)
    assert message.startswith(f"{name}.misspelt: unknown parameter; allowed: ")
    assert message.split("allowed: ")[1].split(", ") == list(params.SECTIONS[name].model_fields)


# key, bad value, what the message says is allowed
REFUSALS = [
    ("compute.device", 0, "string"),
    ("compute.dtype", "float64", "'float32', 'bfloat16' or 'float16'"),
    ("compute.threads", 0, "greater than 0"),
    ("compute.threads", "2", "integer"),
    ("compute.threads", True, "integer"),
    ("compute.offload", "sequential", "'none', 'model', 'group' or 'disk'"),
    ("compute.offload", "model", "no GPU memory to save with compute.device: cpu; set compute.offload: none, or a GPU"),
    ("compute.executor", "dask", "'local' or 'ray'"),
    ("compute.workers", 0, "greater than 0"),
    ("compute.address", "ray://head", "match pattern"),
    ("compute.gpus_per_unit", -0.5, "greater than or equal to 0"),
    ("compute.gpus_per_unit", 1.5, "fractions of one GPU, and whole numbers"),
    ("model.source", None, "string"),
    ("model.revision", 1, "string"),
    ("model.loras", None, "valid list"),
    ("model.loras", "lora.safetensors", "valid list"),
    ("sampling.height", -64, "greater than 0"),
    ("sampling.steps", 10.0, "integer"),
    ("sampling.flow_shift", 0.0, "greater than 0"),
    ("sampling.flow_shift", float("inf"), "finite number"),
    ("sampling.flow_shift", float("nan"), "finite number"),
    ("sampling.guidance_scale", 0.5, "greater than or equal to 1"),
    ("trajectories.manifest", ["a"], "string"),
    ("trajectories.calibration_prompts", 0, "greater than 0"),
    ("capture.seed", -1, "greater than or equal to 0"),
    ("capture.search_tokens", None, "integer"),
    ("target.program", "gguf", "'stepquant' or 'comfyui_w4a8'"),
    ("rotate.hadamard", "walsh", "'sylvester' or 'regular'"),
    ("format.weight", "int8", "'int4', 'mxfp4', 'nvfp4' or 'asym_w4a8'"),
    ("format.activation", "bf16", "'int4', 'mxfp4', 'nvfp4' or 'int8_row'"),
    ("format.e8m0_weight", "round", "'floor' or 'ceil'"),
    ("format.activation_scales", "mse", "'absmax' or 'error'"),
    ("format.activation_scales", "error", "format.activation is 'int4'; allowed: 'absmax', or 'error' with 'nvfp4'"),
    ("smooth.alpha", 1.5, "less than or equal to 1"),
    ("smooth.alpha", "find", "'search'"),
    ("smooth.beta", -0.5, "greater than or equal to 0"),
    ("smooth.candidates", [], "at least 1 item"),
    ("smooth.candidates", [0.5, 2.0], "less than or equal to 1"),
    ("lowrank.rank", -1, "greater than or equal to 0"),
    ("gptq.dampings", [0.0], "greater than 0"),
    ("gptq.dampings", [0.1, 0.01], "rising values, each once"),
    ("gptq.dampings", [], "at least 1 item"),
    ("gptq.act_order", "yes", "boolean"),
    ("gptq.column_block", 0, "greater than 0"),
    ("clip.ratios", [0.0], "greater than 0"),
    ("clip.ratios", [0.9, 0.9], "values repeat"),
    ("clip.exponent_offsets", [5], "less than or equal to 4"),
    ("clip.exponent_offsets", [0.5], "integer"),
    ("generate.prompts", -3, "greater than 0"),
    ("evaluate.confidence", 1.0, "less than 1"),
    ("report.title", "", "at least 1 character"),
    ("bins.high_noise", 0, "greater than 0"),
    ("bins.high_noise", "three", "integer"),
    ("bins.high_noise", [1000.0, float("nan"), 900.0], "finite number"),
]


@pytest.mark.parametrize(("key", "value", "allowed"), REFUSALS, ids=lambda value: str(value))
def test_a_bad_value_is_named_with_what_is_allowed(tmp_path, key, value, allowed):
    path = write(tmp_path, [(key, value)])
    message = refusal(path, key.split(".")[0])
    assert message.startswith(f"{key}: found ") and allowed in message
    culprits = value if isinstance(value, list) and value else [value]
    assert any(repr(culprit) in message for culprit in culprits)
    assert refusal(path) == message


def test_ray_numbers_the_gpus_of_a_worker_itself(tmp_path):
    """A worker sees the GPU it was given as cuda:0, so cuda:1 would be a GPU that is not there."""
    changes = [("compute.device", "cuda:1"), ("compute.executor", "ray")]
    message = refusal(write(tmp_path, changes), "compute")
    assert message.startswith("compute.executor: found 'ray'; ")
    assert message.endswith("so compute.device: cuda:1 names no GPU; set compute.device: cuda")
    for device, executor in (("cuda", "ray"), ("cpu", "ray"), ("cuda:1", "local")):
        path = write(tmp_path, [("compute.device", device), ("compute.executor", executor)])
        assert params.section(path, "compute").device == device


def test_every_key_is_described():
    """Its section's docstring lists it under Attributes."""
    for name, model in params.SECTIONS.items():
        described = model.__doc__.partition("Attributes:")[2]
        assert all(f" {key}: " in described for key in model.model_fields), name


def test_a_float_may_be_written_as_a_whole_number(tmp_path):
    assert params.section(write(tmp_path, [("sampling.flow_shift", 5)]), "sampling").flow_shift == 5.0


def test_plumbing_is_all_that_a_result_cannot_depend_on(tmp_path):
    path = write(
        tmp_path,
        [
            ("compute.workers", 7),
            ("compute.device", "cuda"),
            ("compute.offload", "disk"),
            ("compute.executor", "ray"),
            ("compute.gpus_per_unit", 0.5),
            ("compute.address", "head:6379"),
        ],
    )
    assert params.section(path, "compute").decisive() == {"device": "cuda", "dtype": "float32", "threads": 1}
    assert params.section(path, "capture").decisive() == params.section(path, "capture").model_dump()


def test_an_unknown_section_is_refused_whatever_section_is_read(tmp_path):
    message = refusal(write(tmp_path, [("lowrnk", {"rank": 8})]), "compute")
    assert message.startswith("unknown section 'lowrnk'; allowed: compute, model, ") and message.endswith(
        "report, experts"
    )


def test_a_misspelt_parameter_is_named_as_it_was_written(tmp_path):
    message = refusal(write(tmp_path, [("gptq.dampings", GONE), ("gptq.dampening", 0.01)]))
    assert (
        message
        == "gptq.dampening: unknown parameter; allowed: scales, refits, noise, dampings, act_order, column_block"
    )


def test_a_missing_section(tmp_path):
    assert refusal(write(tmp_path, [("gptq", GONE)]), "gptq") == "missing key 'gptq'"


def test_a_section_that_is_no_section(tmp_path):
    assert refusal(write(tmp_path, [("gptq", 3)]), "gptq") == "gptq: found 3; expected a section of keys"


def test_an_expert_s_override_changes_that_expert_and_those_keys_only(tmp_path):
    path = write(tmp_path, [("experts.low_noise.lowrank", {"rank": 64}), ("experts.low_noise.smooth", {"alpha": 0.25})])
    params.check(path)
    assert params.section(path, "lowrank", "low_noise").model_dump() == {"rank": 64, "seed": 0}
    assert params.section(path, "lowrank", "high_noise") == params.section(path, "lowrank")
    assert params.section(path, "lowrank").rank == 32
    smooth = params.section(path, "smooth")
    assert params.section(path, "smooth", "low_noise") == smooth.model_copy(update={"alpha": 0.25})
    assert params.section(path, "compute", "low_noise") == params.section(path, "compute")


def test_a_bad_override_is_named_as_an_override(tmp_path):
    message = refusal(write(tmp_path, [("experts.low_noise.lowrank", {"rnk": 64})]))
    assert message == "experts.low_noise.lowrank over lowrank.rnk: unknown parameter; allowed: rank, seed"
    message = refusal(write(tmp_path, [("experts.low_noise.gptq", {"dampings": -1.0})]), "gptq", "low_noise")
    assert message.startswith("experts.low_noise.gptq over gptq.dampings: found -1.0; ")


@pytest.mark.parametrize(
    "changes",
    [[("experts.low_noise.lowrnk", {})], [("experts.low_noise.clip", GONE)], [("experts.low_noise.format", {})]],
)
def test_an_expert_has_exactly_the_sections_that_can_be_overridden(tmp_path, changes):
    message = refusal(write(tmp_path, changes))
    assert (
        "low_noise has [" in message
        and "allowed: exactly ['center', 'clip', 'gptq', 'lowrank', 'rotate', 'smooth']" in message
    )


def test_an_expert_that_is_not_there(tmp_path):
    assert refusal(write(tmp_path), "gptq", "hgih_noise") == "missing key 'experts.hgih_noise.gptq'"


@pytest.mark.parametrize("changes", [[("bins.hgih_noise", 3)], [("bins.low_noise", GONE)]])
def test_bins_belong_to_the_experts(tmp_path, changes):
    message = refusal(write(tmp_path, changes))
    assert message.startswith("bins has [") and message.endswith(
        "allowed: exactly the experts, ['high_noise', 'low_noise']"
    )


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"a: [1", "not YAML: "),
        (b"a: \xff", "not YAML: "),
        (b"- 1\n", "found list; expected sections"),
        (b"", "found NoneType; expected sections"),
    ],
)
def test_a_file_that_holds_no_sections(tmp_path, content, what):
    path = tmp_path / "params.yaml"
    path.write_bytes(content)
    assert refusal(path).startswith(what)


def test_a_file_that_is_not_there(tmp_path):
    assert refusal(tmp_path / "absent.yaml") == "no such file; `stepquant profile demo` writes one"
    assert refusal(tmp_path) == "no such file; `stepquant profile demo` writes one"


def test_a_byte_order_mark_is_read_over(tmp_path):
    path = write(tmp_path)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    params.check(path)
