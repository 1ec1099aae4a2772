"""The measuring instrument: benchmarks, selection share, thresholds, gates and decision records.

Everything that judges data (`tables`, `trust`, `threshold`, `gate`, `record`, `report`) is a pure function over CSV
files and needs neither a GPU nor the kernels. Everything that makes data (`bench`, `decode`) says which backend
really ran.
"""
