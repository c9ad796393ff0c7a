"""`metrics()` of a training run as a table: outer steps spread over the run, in rows."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from hvd_slowmo.core.step.metrics import Metrics

COLUMNS = ("step", "divergence", "|Δ|", "|v|", "cosine", "waited", "hidden", "sent")


def metrics_table(seen: Sequence[Metrics], title: str = "", rows: int = 10) -> Table:
    """Return a table of at most so many outer steps, the first and the last among them.

    Args:
        seen: measurements of all outer steps, in order.
        title: above the table.
        rows: at least 2.

    Example:
        >>> from rich.console import Console
        >>> seen = [Metrics(12 * n, 0.01 / n, 2.0, 1.5, 0.6, 0, 0, 0.25, 0.5, 4096000) for n in range(1, 100)]
        >>> Console(width=80).print(metrics_table(seen, rows=3))
        ┏━━━━━━┳━━━━━━━━━━━━┳━━━━━┳━━━━━┳━━━━━━━━┳━━━━━━━━━━┳━━━━━━━━┳━━━━━━━━━━━━┓
        ┃ step ┃ divergence ┃ |Δ| ┃ |v| ┃ cosine ┃   waited ┃ hidden ┃       sent ┃
        ┡━━━━━━╇━━━━━━━━━━━━╇━━━━━╇━━━━━╇━━━━━━━━╇━━━━━━━━━━╇━━━━━━━━╇━━━━━━━━━━━━┩
        │   12 │       0.01 │   2 │ 1.5 │   0.60 │ 250.0 ms │   50 % │ 4,096.0 kB │
        │  600 │     0.0002 │   2 │ 1.5 │   0.60 │ 250.0 ms │   50 % │ 4,096.0 kB │
        │ 1188 │   0.000101 │   2 │ 1.5 │   0.60 │ 250.0 ms │   50 % │ 4,096.0 kB │
        └──────┴────────────┴─────┴─────┴────────┴──────────┴────────┴────────────┘
    """
    table = Table(title=title)
    for column in COLUMNS:
        table.add_column(column, justify="right")
    last = len(seen) - 1
    for place in sorted({round(row * last / (rows - 1)) for row in range(rows)} if seen else ()):
        each = seen[place]
        table.add_row(
            str(each.step),
            f"{each.divergence:.3g}",
            f"{each.delta_norm:.3g}",
            f"{each.v_norm:.3g}",
            f"{each.cosine:.2f}",
            f"{1e3 * each.seconds_waited:.1f} ms",
            f"{100 * each.hidden:.0f} %",
            f"{each.bytes_sent / 1e3:,.1f} kB",
        )
    return table
