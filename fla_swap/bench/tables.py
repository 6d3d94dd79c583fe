"""The operators' rows as Markdown: speed against floor and peer, memory, cold start, errors, notes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fla_swap.bench import work
from fla_swap.bench.catalogue import Shape, by_name
from fla_swap.bench.decode import READ_ONLY
from fla_swap.bench.measuring import Row
from fla_swap.bench.work import Rates

if TYPE_CHECKING:
    from fla_swap.bench.results import Results

SPEEDUP, MEMORY, COLD_FORWARD, COLD_BOTH = 1.5, 0.7, 3.0, 8.0
"""The bars: times as fast as the peer, of its peak memory; seconds from a fresh cache to the first result."""
PEERS = ("fla", "flex")
BY_EVENTS = " ᵉ"


def markdown(results: Results) -> str:
    """The tables of this machine's rows."""
    rows = newest(results.here())
    rates = results.rates.get(results.where)
    lines = ["# Operators: floor, ours, peer", "", *(f"- {name}: {value}" for name, value in results.about.items())]
    if rates is None:
        return "\n".join(lines) + "\n"
    lines += [
        f"- measured: copy {rates.copy / 1e12:.2f} TB/s, bf16 product {rates.product / 1e12:.0f} TFLOP/s, "
        f"exponentials {rates.exponential / 1e12:.2f} T/s",
        "",
        *_paragraphs(work.__doc__ or ""),
        "",
    ]
    whole = {k: ways for k, ways in rows.items() if not k[1].startswith("step ")}
    steps = {k: ways for k, ways in rows.items() if k[1].startswith("step ")}
    if whole:
        lines += [*speed(whole, rates), "", *resources(whole), "", *errors(whole), "", *misses(whole), ""]
    if steps:
        lines += [*decode_steps(steps, rates), ""]
    lines += [
        f"- {row.operator}, {row.way}, {row.shape}: {n}" for w in rows.values() for row in w.values() for n in row.notes
    ]
    return "\n".join(lines).rstrip() + "\n"


def newest(rows: list[Row]) -> dict[tuple[str, str], dict[str, Row]]:
    """(operator, shape) → way → row; a row of newer code stands later and replaces the older one."""
    found: dict[tuple[str, str], dict[str, Row]] = {}
    for row in rows:
        ways = found.setdefault((row.operator, row.shape), {})
        ways.pop(row.way, None)
        ways[row.way] = row
    order = list(by_name())
    return dict(sorted(found.items(), key=lambda item: order.index(item[0][0])))


def shape_of(label: str) -> Shape:
    """The shape that a label was made from."""
    sizes = {part[0]: int(part[1:]) for part in label.removeprefix("step ").split()}
    return Shape(batch=sizes["B"], time=sizes["T"], heads=sizes["H"], width=sizes["D"])


def peer_of(ways: dict[str, Row]) -> Row | None:
    return next((ways[name] for name in PEERS if name in ways), None)


def speed(rows: dict[tuple[str, str], dict[str, Row]], rates: Rates) -> list[str]:
    head = ["operator", "shape"]
    for direction in ("forward", "forward+backward"):
        head += [f"{direction}: floor", "ours", "ours / floor", "peer", "peer / ours"]
    table = [head]
    for (name, label), ways in rows.items():
        ours, peer = ways.get("ours"), peer_of(ways)
        forward, both = floor_of(name, label, ours, rates)
        table.append([name, label])
        for floor, field in ((forward, "forward"), (both, "both")):
            own, other = _value(ours, field), _value(peer, field)
            table[-1] += [
                milliseconds_text(floor),
                _timed(ours, field),
                times_text(own, floor),
                _timed(peer, field),
                times_text(other, own),
            ]
        softmax = ways.get("sdpa")
        if softmax is not None:
            row = ["full softmax (SDPA flash)", label, "", _timed(softmax, "forward"), "", "", ""]
            table.append([*row, "", _timed(softmax, "both"), "", "", ""])
    text = (
        "Milliseconds, median, of the device alone (replays of a CUDA graph, L2 cache overwritten before each);"
        f"{BY_EVENTS}: of calls from Python, where the host's part may be the longer."
    )
    return [text, "", *markdown_table(table)]


def _timed(row: Row | None, field: str) -> str:
    """Milliseconds with the mark of what timed them, or in a word why there are none."""
    value = _value(row, field)
    if row is None or value is not None:
        return milliseconds_text(value) + BY_EVENTS * (getattr(row, f"clock_{field}", "") == "events")
    stages = ("forward: ", "backward: ")[: 1 if field == "forward" else 2]
    notes = [note for note in row.notes if note.startswith(stages) and not note.endswith("no result")]
    if not notes:
        return "–"
    return "not done" if "not done after" in notes[0] else "refused" if "Error" in notes[0] else "failed"


def floor_of(name: str, label: str, row: Row | None, rates: Rates) -> tuple[float | None, float | None]:
    if row is None or not row.output:
        return None, None
    case, shape = by_name()[name], shape_of(label)
    return work.floors(row.inputs, row.output, case.products(shape), case.exponentials(shape), case.backward, rates)


def resources(rows: dict[tuple[str, str], dict[str, Row]]) -> list[str]:
    table = [["operator", "shape", "peak forward: ours", "peer", "peak both: ours", "peer", "ours / peer"]]
    table[0] += ["cold forward: ours", "peer", "cold both: ours", "peer"]
    for (name, label), ways in rows.items():
        ours, peer = ways.get("ours"), peer_of(ways)
        cells = [name, label]
        for field in ("peak_forward", "peak_both"):
            cells += [_number(_value(ours, field)), _number(_value(peer, field))]
        cells.append(times_text(_value(ours, "peak_both"), _value(peer, "peak_both")))
        for field in ("cold_forward", "cold_both"):
            cells += [_number(_value(ours, field), 1), _number(_value(peer, field), 1)]
        table.append(cells)
    text = (
        "Peak of allocated memory beyond the inputs (GiB, results and gradients included); seconds from the call to "
        "the first result with empty compiler caches (torch and Triton imported before), forward, then forward and "
        "backward (both calls together)."
    )
    return [text, "", *markdown_table(table)]


def errors(rows: dict[tuple[str, str], dict[str, Row]]) -> list[str]:
    table = [["operator", "shape", "forward: ours", "peer", "worst gradient: ours", "peer"]]
    for (name, label), ways in rows.items():
        ours, peer = ways.get("ours"), peer_of(ways)
        cells = [name, label, _error(_value(ours, "error_forward")), _error(_value(peer, "error_forward"))]
        for row in (ours, peer):
            worst = f" ({row.worst_gradient})" if row is not None and row.worst_gradient else ""
            cells.append(_error(_value(row, "error_backward")) + worst)
        table.append(cells)
    return [
        "RMS(reference − result) / RMS(reference) of one head against the float64 recurrence:",
        "",
        *markdown_table(table),
    ]


def misses(rows: dict[tuple[str, str], dict[str, Row]]) -> list[str]:
    """What is under the bars of `SPEEDUP`, `MEMORY` and the cold starts."""
    found = []
    for (name, label), ways in rows.items():
        ours, peer = ways.get("ours"), peer_of(ways)
        if ours is None:
            continue
        for field, text in (("forward", "forward"), ("both", "forward+backward")):
            own, other = _value(ours, field), _value(peer, field)
            if own and other and other / own < SPEEDUP:
                found.append(f"{name} {label}: {text} {other / own:.2f}× the peer's speed")
        own, other = ours.peak_both, _value(peer, "peak_both")
        if own and other and own / other > MEMORY:
            found.append(f"{name} {label}: {own / other:.2f} of the peer's peak memory")
        for own, bar, text in ((ours.cold_forward, COLD_FORWARD, "forward"), (ours.cold_both, COLD_BOTH, "both")):
            if own is not None and own > bar:
                found.append(f"{name} {label}: cold start, {text}, {own:.1f} s")
    bars = (
        f"{SPEEDUP}× the peer's speed, {MEMORY} of its peak memory, cold start {COLD_FORWARD:g} s and {COLD_BOTH:g} s"
    )
    return [f"Bars ({bars}): " + ("all met." if not found else "missed by"), "", *(f"- {line}" for line in found)]


def decode_steps(rows: dict[tuple[str, str], dict[str, Row]], rates: Rates) -> list[str]:
    table = [["operator", "shape", "floor", "ours, CUDA graph", "ours / floor", "ours, Python", "peer, CUDA graph"]]
    table[0].append("peer, Python")
    for (name, label), ways in rows.items():
        ours, peer = ways.get("ours"), peer_of(ways)
        floor = None
        if ours is not None and ours.state:
            moved = ours.state * (1 if name in READ_ONLY else 2) + ours.inputs + ours.output
            floor = moved / rates.copy * 1e3
        own = _value(ours, "graph")
        cells = [
            name,
            label.removeprefix("step "),
            _us(floor),
            _us(own),
            times_text(own, floor),
            _us(_value(ours, "eager")),
        ]
        table.append([*cells, _us(_value(peer, "graph")), _us(_value(peer, "eager"))])
    return ["One decode step, microseconds:", "", *markdown_table(table)]


def _value(row: Row | None, field: str) -> float | None:
    return None if row is None else getattr(row, field)


def milliseconds_text(x: float | None) -> str:
    return "–" if x is None else f"{x:.3f}"


def _us(x: float | None) -> str:
    return "–" if x is None else f"{x * 1e3:.1f}"


def _number(x: float | None, digits: int = 2) -> str:
    return "–" if x is None else f"{x:.{digits}f}"


def _error(x: float | None) -> str:
    return "–" if x is None else f"{x:.1e}"


def times_text(x: float | None, y: float | None) -> str:
    return f"{x / y:.2f}×" if x and y else "–"


def markdown_table(table: list[list[str]]) -> list[str]:
    head, *body = table
    return ["| " + " | ".join(head) + " |", "|---" * len(head) + "|", *("| " + " | ".join(r) + " |" for r in body)]


def _paragraphs(text: str) -> list[str]:
    return text.strip().splitlines()
