"""Small calls of the kernel for compute-sanitizer to watch: `python -m tests.gpu.sanitized_calls`."""

from __future__ import annotations

import os

import nsa_sel
from nsa_sel.testing import assert_matches_reference
from tests.backends_under_test import backend
from tests.cases import case

# Every head tile, spans and blocks, pages, empty rows, drafts, several splits; few tokens, for racecheck is slow.
CASES = (
    "dims-64x64-bf16", "dims-192x128-fp16", "h3", "h17", "h64-192x128", "empty-rows", "300-spans", "hostile-int32",
    "seq-lens-zero", "blocks-unused", "blocks-beyond-the-end", "nsa-paper-short", "pages-3", "pages-packed-192x128",
    "pages-hostile", "pages-draft", "rows-of-very-different-length",
)  # fmt: skip
NAMES = CASES[:3] if os.environ.get("NSA_SEL_SMALL") else CASES


def main() -> None:
    """Run the cases on the kernel, compare each with the fp64 reference, and print how often the kernel ran."""
    for name in NAMES:
        one = case(name)
        inputs = one.inputs()
        assert_matches_reference(*backend("cuda").run(inputs, **one.options), inputs)
    print("kernel calls:", sum(nsa_sel.stats().get("cuda", {}).values()), flush=True)


if __name__ == "__main__":
    main()
