"""These tests need an engine each, in an environment of its own: `make test-engines` makes both and runs them."""

from importlib.util import find_spec

collect_ignore = [f"test_{engine}.py" for engine in ("transformers", "vllm") if find_spec(engine) is None]
