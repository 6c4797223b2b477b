from io import StringIO

import pytest
from rich.console import Console

from stepquant.evaluate.layers import LayerError
from stepquant.evaluate.metrics_file import (
    Compared,
    Estimate,
    FormatPair,
    Layers,
    Record,
    VideoMetrics,
    Videos,
    memory,
    summarize_layers,
)
from stepquant.report.tables import NONE, brief_table, experts, layer_tables, rich_table, size, summary_table


def record(variant: str, psnr: float | None, error: float | None, activation: str | None = "nvfp4") -> Record:
    difference = psnr and Estimate(mean=-0.02, low=-0.03, high=0.01)
    compared = Compared(mean=0.9, low=0.8, high=1.0, difference=difference)
    one = VideoMetrics(
        psnr=psnr,
        psnr_frames=psnr and [psnr],
        ssim=psnr and 0.5,
        first_frame_psnr=0.9,
        temporal_flickering=0.9,
        motion=0.9,
    )
    errors = (
        [LayerError(e, 0, s, 0, error) for e in ("low_noise", "high_noise") for s in ("ffn.up", "attn1.qkv")]
        if error
        else []
    )
    return Record(
        variant=variant,
        format=psnr and FormatPair(weight="nvfp4", activation=activation),
        videos=Videos(
            count=1,
            psnr=psnr and Estimate(mean=psnr, low=psnr - 1 if psnr < 100 else 100.0, high=psnr),
            ssim=psnr and Estimate(mean=0.5, low=0.5, high=0.5),
            first_frame_psnr=compared,
            temporal_flickering=compared,
            motion=compared,
            per_video={"a": one},
        ),
        layers=summarize_layers(errors),
        memory=memory(2_500_000 if psnr else 10_000_000, 10_000_000),
    )


RECORDS = [
    record("bf16", None, None),
    record("w4a16", 50.0, 0.01, None),
    record("rtn", 20.0, 0.3),
    record("full", 30.0, 0.1),
]


def column(table, head: str) -> list:
    i = table.columns.index(head)
    return [row[i] for row in table.rows]


def test_a_row_per_variant_in_the_order_given():
    table = summary_table(RECORDS)
    assert [cell.text for cell in column(table, "variant")] == ["bf16", "w4a16", "rtn", "full"]
    assert all(len(row) == len(table.columns) for row in table.rows)


def test_what_cells_say():
    table = summary_table(RECORDS)
    assert [cell.text for cell in column(table, "formats W/A")] == [
        "bf16/bf16",
        "nvfp4/bf16",
        "nvfp4/nvfp4",
        "nvfp4/nvfp4",
    ]
    assert [cell.text for cell in column(table, "of BF16")] == ["100%", "25%", "25%", "25%"]
    assert [cell.text for cell in column(table, "PSNR, dB")] == [NONE, "50.0", "20.0", "30.0"]
    assert column(table, "PSNR, dB")[2].note == "[19.0, 20.0]"
    assert column(table, "flicker score")[0].note == ""
    assert column(table, "flicker score")[2].note == "Δ [−0.030, +0.010]"
    assert [cell.text for cell in column(table, "layer error, low_noise")] == [NONE, "0.0100", "0.3000", "0.1000"]


def test_only_variants_with_quantized_activations_compete():
    table = summary_table(RECORDS)
    for head in ("PSNR, dB", "layer error, high_noise"):
        assert [cell.best for cell in column(table, head)] == [False, False, False, True]
    assert not any(cell.best for cell in column(table, "of BF16"))


def test_the_best_of_a_tie_are_all_of_it():
    table = summary_table([record("rtn", 20.0, 0.1), record("full", 20.0, 0.1)])
    assert [cell.best for cell in column(table, "PSNR, dB")] == [True, True]


def test_videos_at_the_cap_are_identical():
    assert column(summary_table([record("full", 100.0, 0.1)]), "PSNR, dB")[0].text == "identical"


def test_layer_tables():
    site, bins, blocks = layer_tables(RECORDS, "low_noise")
    assert site.columns == ("Site", "w4a16", "rtn", "full")  # BF16 has no layer error
    assert [[cell.text for cell in row] for row in site.rows] == [
        ["attn1.qkv", "0.0100", "0.3000", "0.1000"],
        ["ffn.up", "0.0100", "0.3000", "0.1000"],
    ]
    assert [cell.best for cell in site.rows[0]] == [False, False, False, True]
    assert [row[0].text for row in bins.rows] == [row[0].text for row in blocks.rows] == ["0"]


def test_variants_may_differ_in_what_they_measured():
    other = record("one_clip", 25.0, 0.2)
    other = other.model_copy(
        update={"layers": {"low_noise": Layers(mean=0.2, sites={"ffn.up": 0.2}, bins=[0.2, 0.2], blocks=[0.2])}}
    )
    site, bins, _ = layer_tables([RECORDS[3], other], "low_noise")
    assert [cell.text for cell in site.rows[0]] == ["attn1.qkv", "0.1000", NONE]
    assert [cell.text for cell in bins.rows[1]] == ["1", NONE, "0.2000"]


def test_experts_are_those_with_layers():
    assert experts(RECORDS) == ["high_noise", "low_noise"]
    assert experts(RECORDS[:1]) == []


def test_the_brief_table_fits_a_terminal_of_80_characters():
    text = StringIO()
    records = [*RECORDS, record("svdquant_gptq", 25.0, 0.2)]
    Console(file=text, width=80).print(rich_table(brief_table(records)))
    lines = text.getvalue().splitlines()
    assert "…" not in text.getvalue()
    for shown in records:
        assert sum(line.startswith(f"{shown.variant} ") for line in lines) == 1
    assert next(line for line in lines if line.startswith("full")).split() == [
        "full",
        "nvfp4/nvfp4",
        "25%",
        "30.0",
        "0.500",
        "0.1000",
        "0.1000",
    ]


@pytest.mark.parametrize(
    "count, text", [(1_234_567, "1.23 MB"), (999_999_999, "1000.00 MB"), (14_300_000_000, "14.30 GB")]
)
def test_sizes(count, text):
    assert size(count) == text
