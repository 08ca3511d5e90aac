"""ONNX models built from a description and its safetensors, without torch.

``graph.build`` is the door. ``weights`` reads tensors, ``architectures`` brings the supported
families into one form, ``transformer``, ``linear`` and ``pooling`` write that form as ONNX nodes,
and ``quantize`` decides the int8 form.
"""
