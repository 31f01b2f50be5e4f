"""Fuzz ``unpack`` with coverage: ``make fuzz``, or ``PYTHONPATH=tests python tests/fuzz/fuzz_wire.py FOLDERS OPTIONS``.

Options are libFuzzer's. What crashes is written to the corpus, where a test runs it from then on.
"""

from __future__ import annotations

import sys
import warnings

import atheris

with atheris.instrument_imports(include=["fedlora.transport"]):
    from fuzz.wire_harness import check


def main() -> None:
    warnings.simplefilter("error")
    atheris.Setup(sys.argv, check)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
