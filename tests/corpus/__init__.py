"""The campaign: `optimize` over thousands of models that nobody wrote for it.

    python -m tests.corpus --help

docs/testing.md tells what each part holds and what is asserted.
"""
