"""The table of variants against the lists of dvc.yaml."""

from pathlib import Path

import pytest
import yaml

from stepquant.errors import UserError
from stepquant.recipe.variants import DESCRIPTIONS, ORDER, REFERENCE, VARIANTS, packed_variant

DVC = yaml.safe_load((Path(__file__).resolve().parents[2] / "dvc.yaml").read_text())
LISTS = {name: value for entry in DVC["vars"] if isinstance(entry, dict) for name, value in entry.items()}
NOTHING = "artifacts/model"  # what a variant depends on in place of a kind of factors that it does not use


def test_dvc_packs_exactly_the_variants():
    assert list(LISTS["packed"]) == list(VARIANTS)


def test_dvc_samples_the_reference_and_every_variant_in_the_order_of_the_tables():
    assert tuple(LISTS["sampled"]) == ORDER == (REFERENCE, *VARIANTS)


@pytest.mark.parametrize("name", VARIANTS)
def test_dvc_declares_the_factors_that_a_variant_uses(name):
    variant = VARIANTS[name]
    used = {
        "branch": "artifacts/lowrank" if variant.low_rank else NOTHING,
        "residual": "artifacts/residual" if variant.gptq else NOTHING,
        "clip": "artifacts/clip" if variant.clip else NOTHING,
        "schedule": "artifacts/schedule.json" if variant.scheduled else NOTHING,
    }
    assert LISTS["packed"][name] == used


def test_every_variant_is_described():
    assert set(DESCRIPTIONS) == {REFERENCE, *VARIANTS} and all(DESCRIPTIONS.values())


def test_other_names_are_refused():
    assert packed_variant("full") is VARIANTS["full"]
    for name in ("bf16", "fulll"):
        with pytest.raises(UserError, match=f"--variant {name}; allowed: w4a16, rtn,"):
            packed_variant(name)
