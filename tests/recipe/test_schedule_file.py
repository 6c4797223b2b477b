"""The schedule file: what it predicts, and what is said when it is missing or damaged."""

import pytest

from stepquant.errors import DamagedFile, MissingFile
from stepquant.recipe.schedule_file import ExpertSchedule, Schedule, read_schedule, write_schedule

EXPERT = ExpertSchedule(
    bin_edges=[900.0, 500.0, 0.0],
    sites=["attn1.qkv", "ffn.up"],
    eight_bit={1: {"ffn.up": [0, 1]}},
    errors={
        "activations": [[[1.0, 2.0], [3.0, 4.0]], [[5.0, 6.0], [7.0, 8.0]]],
        "activations_8_bit": [[[0.1, 0.1], [0.1, 0.1]], [[0.1, 0.1], [0.1, 0.1]]],
        "weights": [[[1.0, 1.0], [1.0, 1.0]], [[1.0, 1.0], [1.0, 1.0]]],
    },
    cost=[[1.0, 2.0], [3.0, 4.0]],
)
SCHEDULE = Schedule(eight_bit_format="int8", budget=0.5, share=0.3, experts={"low_noise": EXPERT})


def test_the_file_gives_back_what_was_written(tmp_path):
    write_schedule(tmp_path / "schedule.json", SCHEDULE)
    assert read_schedule(tmp_path / "schedule.json") == SCHEDULE


def test_scheduled_slots_count_with_their_8_bit_error():
    """36 of activations and 8 of weights; block 1, ffn.up has 4 and 8 of the 36, which become 0.1 each."""
    assert SCHEDULE.predicted_error(eight_bit=False) == pytest.approx(44.0)
    assert SCHEDULE.predicted_error(eight_bit=True) == pytest.approx(44.0 - 12.0 + 0.2)


def test_a_site_that_is_not_listed_stays_in_4_bits():
    assert EXPERT.blocks == 2
    assert EXPERT.bins(1, "ffn.up") == (0, 1) and EXPERT.bins(0, "ffn.up") == EXPERT.bins(1, "attn1.qkv") == ()


def test_a_missing_or_damaged_file_names_the_stage(tmp_path):
    file = tmp_path / "schedule.json"
    with pytest.raises(MissingFile, match="run stage schedule first"):
        read_schedule(file)
    file.write_text('{"budget": "much"}')
    with pytest.raises(DamagedFile, match="schedule.json: .*run stage schedule again"):
        read_schedule(file)


def test_another_expert_is_refused():
    with pytest.raises(DamagedFile, match="has low_noise, not high_noise"):
        SCHEDULE.expert("high_noise")
