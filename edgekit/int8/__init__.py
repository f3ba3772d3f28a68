"""A float network → the same in int8, from a few hundred real images.

    float ONNX ─ calibration ─► ranges, moments ─ rounding ─► weights on the int8 grid ─ scheme ─► int8 ONNX
                                                                                  └─ sensitivity: which layers to spare

Every file here works on the graph and on ONNX Runtime alone; whether the result is good enough, and fast, on the engine
that will run it is for the stage `quantize` to find out.

What is written here rather than taken from onnxruntime.quantization or NNCF, and what it gains on the same networks and
images, is measured in docs/quantization.md.
"""
