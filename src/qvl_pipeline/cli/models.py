"""`kedro models`: what works with which family of models."""

from __future__ import annotations

import click


@click.command()
def models() -> None:
    """Show what works with each family of models, or why not."""
    from rich.console import Console
    from rich.table import Table

    from qvl_pipeline.families import FAMILIES
    from qvl_pipeline.families.capabilities import capability_table

    table = Table("", *(family.title for family in FAMILIES.values()), show_lines=True)
    for row in capability_table(FAMILIES):
        table.add_row(*row)
    Console().print(table)
