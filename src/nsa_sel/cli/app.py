"""All commands on one typer app."""

from __future__ import annotations

import typer

from nsa_sel.cli import demo, info, measure

app = typer.Typer(
    name="nsa-sel",
    help="Selection attention: see it work, see what runs here, measure it.",
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
)
demo.register(app)
info.register(app)
measure.register(app)
