"""The console script `nsa-sel`: each module of this package registers its commands on one typer app.

Its libraries come with the extra `cli`, which the library itself does not need.
"""

from __future__ import annotations

import sys

EXTRAS = {"typer": "cli", "rich": "cli", "matplotlib": "cli", "pandas": "bench", "tomli": "bench"}


def main() -> None:
    """Run `nsa-sel`; where a library is absent, say which extra brings it."""
    try:
        from nsa_sel.cli.app import app

        app()
    except ModuleNotFoundError as error:
        extra = EXTRAS.get((error.name or "").partition(".")[0])
        if extra is None:
            raise
        sys.exit(f"nsa-sel: expected {error.name}, which is not installed: pip install 'nsa-sel[{extra}]'")
