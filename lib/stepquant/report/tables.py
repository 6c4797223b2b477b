"""Tables over variants as plain cells, for the terminal (rich) and the report (HTML).

The first cell of a row is its head. The note of a cell (an interval, a difference) is shown only in HTML.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table as RichTable

from stepquant.evaluate.fidelity import PSNR_CAP
from stepquant.evaluate.metrics_file import Compared, Estimate, Record

NONE = "–"  # no value by definition, such as the PSNR of BF16 against itself


@dataclass(frozen=True)
class Cell:
    """A value as text, a note about it, and whether it is the best among the variants with 4-bit activations."""

    text: str
    note: str = ""
    best: bool = False


@dataclass(frozen=True)
class Table:
    """A title, a head per column, and rows with one cell per column."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]


@dataclass(frozen=True)
class _Column:
    """A column of the summary.

    Attributes:
        head: The head of the column.
        show: Record -> cell.
        score: Record -> score; the highest is the best, and None does not compete.
        brief: Whether the column is in the brief table.
    """

    head: str
    show: Callable[[Record], Cell]
    score: Callable[[Record], float | None] = lambda record: None
    brief: bool = False


def summary_table(records: Sequence[Record]) -> Table:
    """One row per variant: formats, size, fidelity to BF16, temporal metrics, layer error per expert."""
    return _summary(records, _columns(records))


def brief_table(records: Sequence[Record]) -> Table:
    """The columns of the summary that fit a terminal of 80 characters with two experts."""
    return _summary(records, [column for column in _columns(records) if column.brief])


def layer_tables(records: Sequence[Record], expert: str) -> list[Table]:
    """Layer errors of one expert by site, by timestep bin and by block; a column per quantized variant."""
    of_expert = [record for record in records if expert in record.layers]
    return [
        _layer_table("Site", of_expert, lambda record: record.layers[expert].sites),
        _layer_table("Timestep bin", of_expert, lambda record: dict(enumerate(record.layers[expert].bins))),
        _layer_table("Block", of_expert, lambda record: dict(enumerate(record.layers[expert].blocks))),
    ]


def experts(records: Sequence[Record]) -> list[str]:
    """Every expert with layer errors in some record, sorted."""
    return sorted({expert for record in records for expert in record.layers})


def rich_table(table: Table) -> RichTable:
    """The table for a terminal: best values in bold, without notes."""
    shown = RichTable(title=table.title, box=SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    for i, head in enumerate(table.columns):
        shown.add_column(head, justify="right" if i else "left", no_wrap=not i, vertical="bottom")
    for row in table.rows:
        shown.add_row(*(f"[bold]{cell.text}[/bold]" if cell.best else cell.text for cell in row))
    return shown


def size(count: int) -> str:
    """Bytes in decimal units, as model hubs print them."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.2f} MB"


def format_pair(record: Record) -> str:
    """Formats of weights and activations, such as `nvfp4/nvfp4`, `int4/int4 + int8` or `int4/bf16`."""
    weight, activation = (record.format.weight, record.format.activation) if record.format else (None, None)
    return f"{weight or 'bf16'}/{activation or 'bf16'}".replace("+", " + ")  # a terminal can break it there


def _columns(records: Sequence[Record]) -> list[_Column]:
    return [
        _Column("variant", lambda r: Cell(r.variant), brief=True),
        _Column("formats W/A", lambda r: Cell(format_pair(r)), brief=True),
        _Column("size", lambda r: Cell(size(r.memory.packed_bytes))),
        _Column("of BF16", lambda r: Cell(f"{r.memory.ratio:.0%}"), brief=True),
        _Column("PSNR, dB", lambda r: _decibels(r.videos.psnr), lambda r: _mean(r.videos.psnr), True),
        _Column("SSIM", lambda r: _estimate(r.videos.ssim, 3), lambda r: _mean(r.videos.ssim), True),
        _Column("first frame, dB", lambda r: _compared(r.videos.first_frame_psnr, 1)),
        _Column("flicker score", lambda r: _compared(r.videos.temporal_flickering, 3)),
        _Column("motion, levels", lambda r: _compared(r.videos.motion, 1)),
        *(_error_column(expert) for expert in experts(records)),
    ]


def _error_column(expert: str) -> _Column:
    def error(record: Record) -> float | None:
        return record.layers[expert].mean if expert in record.layers else None

    def score(record: Record) -> float | None:
        found = error(record)
        return None if found is None else -found

    return _Column(f"layer error, {expert}", lambda record: _error(error(record)), score, brief=True)


def _summary(records: Sequence[Record], columns: Sequence[_Column]) -> Table:
    cells = []
    for column in columns:
        best = _best([column.score(record) for record in records], records)
        cells.append([replace(column.show(record), best=i in best) for i, record in enumerate(records)])
    return Table("Variants", tuple(column.head for column in columns), tuple(zip(*cells)))


def _layer_table(head: str, records: Sequence[Record], values: Callable[[Record], Mapping[Any, float | None]]) -> Table:
    rows = []
    for name in sorted({name for record in records for name in values(record)}):
        errors = [values(record).get(name) for record in records]
        best = _best([None if error is None else -error for error in errors], records)
        cells = (replace(_error(error), best=i in best) for i, error in enumerate(errors))
        rows.append((Cell(str(name)), *cells))
    return Table(f"By {head.lower()}", (head, *(record.variant for record in records)), tuple(rows))


def _best(scores: Sequence[float | None], records: Sequence[Record]) -> set[int]:
    """Positions of the highest score. Only variants with quantized activations compete; the others are more exact."""
    competing = {
        i: score
        for i, (score, record) in enumerate(zip(scores, records))
        if score is not None and record.format and record.format.activation
    }
    return {i for i, score in competing.items() if score == max(competing.values())}


def _error(value: float | None) -> Cell:
    return Cell(NONE if value is None else f"{value:.4f}")


def _mean(value: Estimate | None) -> float | None:
    return None if value is None else value.mean


def _estimate(value: Estimate | None, digits: int) -> Cell:
    if value is None:
        return Cell(NONE)
    return Cell(f"{value.mean:.{digits}f}", f"[{value.low:.{digits}f}, {value.high:.{digits}f}]")


def _decibels(value: Estimate | None) -> Cell:
    """An Estimate in dB; at the cap the videos do not differ."""
    return Cell("identical") if value and value.low >= PSNR_CAP else _estimate(value, 1)


def _compared(value: Compared | None, digits: int) -> Cell:
    """The value, and the interval of its difference to BF16."""
    if value is None:
        return Cell(NONE)
    if value.difference is None:
        return Cell(f"{value.mean:.{digits}f}")
    low, high = (f"{end:+.{digits}f}".replace("-", "−") for end in (value.difference.low, value.difference.high))
    return Cell(f"{value.mean:.{digits}f}", f"Δ [{low}, {high}]")
