"""The graph of an ONNX file in operators that most readers of ONNX know, and what the file states."""

import math
from typing import Any

OPSET = 18  # of ONNX, the lowest that PyTorch exports to without a conversion


def finished(model: Any, texts: dict[str, str]) -> bytes:
    """Content of the file of an onnx.ModelProto that PyTorch exported at OPSET, with `texts` as metadata."""
    import onnx

    _pool_globally(model.graph)
    _lower_opset(model)
    parts = model.graph
    for part in (model, parts, *parts.node, *parts.initializer, *parts.input, *parts.output):
        del part.metadata_props[:]  # PyTorch's notes on the source code of each
    del parts.value_info[:]
    for value in (*parts.input, *parts.output):
        value.type.tensor_type.shape.dim[0].dim_param = "batch"
    parts.input[0].doc_string = "RGB in 0 .. 1: the graph itself normalizes, by the metadata's mean and std"
    onnx.helper.set_model_props(model, texts)
    onnx.checker.check_model(model, full_check=True)
    return model.SerializeToString()


def _lower_opset(model: Any) -> None:
    """State the lowest opset, 14 or above, that has the operators of an onnx.ModelProto, for old readers."""
    from onnx import defs, helper

    def version(node: Any) -> int:
        if node.op_type == "Pad":  # its fourth input, axes, came with 18
            wraps = any(attribute.name == "mode" and attribute.s == b"wrap" for attribute in node.attribute)
            return 19 if wraps else 18 if len(node.input) > 3 else 13
        if node.op_type == "BatchNormalization":  # 15 allows more types of numbers
            return 14
        if node.domain or any(attribute.HasField("g") for attribute in node.attribute):  # not looked into
            return OPSET
        return defs.get_schema(node.op_type, OPSET).since_version

    model.opset_import[0].version = max(14, *map(version, model.graph.node))
    model.ir_version = helper.find_min_ir_version_for(model.opset_import)


def _pool_globally(graph: Any) -> None:
    """Replace ReduceMean over height and width by GlobalAveragePool, and Reshape to (-1, n) by Flatten, in place.

    More readers of ONNX take these, in any version and with changing batch sizes.

    Args:
        graph: an onnx.GraphProto with `value_info`.
    """
    from onnx.helper import make_node
    from onnx.numpy_helper import to_array

    constants = {tensor.name: to_array(tensor).tolist() for tensor in graph.initializer if len(tensor.dims) == 1}
    values = (*graph.value_info, *graph.input)
    shapes = {value.name: [dim.dim_value for dim in value.type.tensor_type.shape.dim] for value in values}
    unused = set()
    for i in reversed(range(len(graph.node))):
        node = graph.node[i]
        if node.op_type not in ("ReduceMean", "Reshape") or len(node.input) != 2:
            continue
        (source, parameter), output, shape = node.input, node.output[0], shapes.get(node.input[0], ())
        constant = constants.get(parameter)
        if node.op_type == "Reshape" and len(shape) > 1 and constant == [-1, math.prod(shape[1:])]:
            node.CopyFrom(make_node("Flatten", [source], [output], node.name))
        elif node.op_type == "ReduceMean" and len(shape) == 4 and {axis % 4 for axis in constant or ()} == {2, 3}:
            keeps = any(attribute.name == "keepdims" and attribute.i for attribute in node.attribute)
            pooled = output if keeps else f"{output}_pooled"
            node.CopyFrom(make_node("GlobalAveragePool", [source], [pooled], node.name))
            if not keeps:
                graph.node.insert(i + 1, make_node("Flatten", [pooled], [output], f"{node.name}_flatten"))
        else:
            continue
        unused.add(parameter)
    unused -= {name for node in graph.node for name in node.input}
    for tensor in [tensor for tensor in graph.initializer if tensor.name in unused]:
        graph.initializer.remove(tensor)
