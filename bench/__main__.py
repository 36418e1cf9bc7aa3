"""`python -m bench`: the benchmark of a create."""

from __future__ import annotations

from bench.create import main

main()
