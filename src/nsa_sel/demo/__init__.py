"""The demonstration behind `nsa-sel demo`: a decode over a growing context, with blocks chosen by a scorer."""

from nsa_sel.demo.cache import Cache
from nsa_sel.demo.run import Row, Settings, run
from nsa_sel.demo.scorer import PooledKeys
from nsa_sel.demo.shapes import SHAPES, Shape

__all__ = ["SHAPES", "Cache", "PooledKeys", "Row", "Settings", "Shape", "run"]
