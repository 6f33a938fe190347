"""graphfold: make exported CNN ONNX models shallower."""

__version__ = "0.1.0"
