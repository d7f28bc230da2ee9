"""The seams put into transformers' own modeling code, and the way from a seamed model to an ONNX graph."""
