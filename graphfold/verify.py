"""The former name of `graphfold.verifier`: importing it hides the function `graphfold.verify`."""

from graphfold.verifier import FoldComparison, OutputComparison, Verification, verify

__all__ = ["FoldComparison", "OutputComparison", "Verification", "verify"]
