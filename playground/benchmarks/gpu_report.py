"""The figures of `playground.benchmarks.benchmark gpu` as tables, and what was aimed at beside what was measured."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from playground.benchmarks.variants import DEFAULT, FROZEN, MATERIALISED, MIXLORA, REFERENCE, measured

GIB = 2**30
MOST_TIME, MOST_MEMORY = 1.05, 1.05  # of LoRA r=E
LEAST_DECODING = 0.95  # of LoRA r=E, unmerged
LEAST_GAIN = 3.0  # over building the update of every instance
QLORA_GIB = 16  # for a step of 4 instances on 4-bit weights, with gradient checkpointing

Row = dict[str, Any]
Taken = dict[str, Any]
"""By case: `{"date": ..., "rows": [...]}`, a row for each variant."""


def table(rows: list[Row]) -> str:
    """The rows of one case as text."""
    lines = [
        f"{'variant':<18} {'ms':>10} {'vs LoRA r=E':>12} {'GiB':>7} {'vs LoRA':>8} {'tokens/s':>9} {'operations':>11}"
    ]
    for row in rows:
        if "out_of_memory" in row:
            lines.append(f"{row['variant']:<18} {'out of memory':>10}")
            continue
        size = f"{row['peak_bytes'] / GIB:.2f}" if "peak_bytes" in row else ""
        of_size = f"{row['peak_bytes_ratio']:.3f}x" if "peak_bytes_ratio" in row else ""
        lines.append(
            f"{row['variant']:<18} {row['milliseconds']:>10.2f} {row['milliseconds_ratio']:>11.3f}x {size:>7} "
            f"{of_size:>8} {row.get('tokens_per_second', ''):>9} {row.get('profile', {}).get('operations', ''):>11}"
        )
    return "\n".join(lines)


def markdown(taken: Taken) -> str:
    """All cases as a Markdown table: a line per case, times and memory in units of LoRA r=E's."""
    cases = _by_variant(taken)
    variants, mixlora = (measured(names, cases.values()) for names in ([FROZEN, *MIXLORA, MATERIALISED], MIXLORA))
    lines = [
        f"| case | {REFERENCE} | {' | '.join(variants)} | peak, {REFERENCE} | {' | '.join(mixlora)} |",
        "| --- |" + " --- |" * (len(variants) + 2 + len(mixlora)),
    ]
    for case, rows in cases.items():
        cells = [_time(rows[REFERENCE]), *(_ratio(rows.get(name), "milliseconds_ratio") for name in variants)]
        cells.append(f"{rows[REFERENCE]['peak_bytes'] / GIB:.1f} GiB" if "peak_bytes" in rows[REFERENCE] else "")
        cells += [_ratio(rows.get(name), "peak_bytes_ratio") for name in mixlora]
        lines.append(f"| {case} | {' | '.join(cells)} |")
    return "\n".join(lines)


def goals(settings: dict[str, Any], taken: Taken) -> list[str]:
    """A line per goal: met or missed, by the worst case, which is named."""
    lines = [_line(*goal) for goal in _goals(settings, taken) if goal[2]]
    if lines and settings["size"] != "7b":
        lines.insert(0, f"The goals are for 7B; at size {settings['size']} they are here to compare with:")
    return lines


def _goals(settings: dict[str, Any], taken: Taken) -> Iterator[tuple[str, bool, dict[str, float], float]]:
    """What is aimed at, whether more is worse, what was measured by case and variant, and the limit."""
    train = {case: rows for case, rows in _by_variant(taken).items() if " train," in case}
    decode = {case: rows for case, rows in _by_variant(taken).items() if " decode," in case}
    yield (
        f"a training step takes at most {MOST_TIME} of LoRA r=E",
        True,
        {
            f"{case}, {name}": rows[name]["milliseconds_ratio"]
            for case, rows in train.items()
            for name in _fitting(rows)
        },
        MOST_TIME,
    )
    yield (
        f"it needs at most {MOST_MEMORY} of LoRA's memory",
        True,
        {f"{case}, {name}": rows[name]["peak_bytes_ratio"] for case, rows in train.items() for name in _fitting(rows)},
        MOST_MEMORY,
    )
    yield (
        f"decoding is at least {LEAST_DECODING} as fast as with unmerged LoRA",
        False,
        {
            f"{case}, {name}": 1 / rows[name]["milliseconds_ratio"]
            for case, rows in decode.items()
            for name in _fitting(rows)
        },
        LEAST_DECODING,
    )
    yield (
        f"a training step is at least {LEAST_GAIN} times faster than with the update built",
        False,
        {
            f"{case}, {name}": rows[MATERIALISED]["milliseconds"] / rows[name]["milliseconds"]
            for case, rows in train.items()
            if "milliseconds" in rows[MATERIALISED]
            for name in _fitting(rows)
        },
        LEAST_GAIN,
    )
    if settings["size"] == "7b" and settings["layers"] is None and settings["batch_size"] == 4:
        yield (
            f"QLoRA with 4 instances and gradient checkpointing takes at most {QLORA_GIB} GiB",
            True,
            {
                f"{case}, {name}": rows[name]["peak_bytes"] / GIB
                for case, rows in train.items()
                if case.startswith("nf4 train, checkpointing on")
                for name in _fitting(rows)
            },
            QLORA_GIB,
        )


def _line(goal: str, more_is_worse: bool, measured: dict[str, float], limit: float) -> str:
    worst = (max if more_is_worse else min)(measured, key=measured.__getitem__)
    met = measured[worst] <= limit if more_is_worse else measured[worst] >= limit
    return f"- {'met' if met else 'MISSED'}: {goal}; worst: {measured[worst]:.3f} ({worst})"


def _by_variant(taken: Taken) -> dict[str, dict[str, Row]]:
    return {case: {row["variant"]: row for row in found["rows"]} for case, found in taken.items()}


def _fitting(rows: dict[str, Row]) -> list[str]:
    """The variants that the goals are for: the default, or in figures from before it was measured all of MixLoRA's."""
    names = [DEFAULT] if DEFAULT in rows else MIXLORA
    return [name for name in names if name in rows and "out_of_memory" not in rows[name]]


def _time(row: Row) -> str:
    return f"{row['tokens_per_second']} tokens/s" if "tokens_per_second" in row else f"{row['milliseconds']:.1f} ms"


def _ratio(row: Row | None, key: str) -> str:
    if row is None:
        return ""
    return "does not fit" if "out_of_memory" in row else f"{row[key]:.2f}" if key in row else ""
