"""What other optimizers got wrong, one small model each; the campaign asserts equal outputs.

tests/test_features.py asserts of some what must stay, or must fold, beside that.
"""
from collections.abc import Callable

import onnx

HAZARDS: dict[str, Callable[[], onnx.ModelProto]] = {}
