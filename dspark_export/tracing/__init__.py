"""The seams put into transformers' own modeling code, and the road from a seamed model to an ONNX graph."""
