"""Write a GGUF file's model with every weight as the float32 number it stands for.

``plain_gguf.py FILE OUTPUT``, run in SGLang's environment, which has ``gguf``.
"""

import sys

import numpy as np
from gguf import GGUFReader, GGUFValueType, GGUFWriter
from gguf.quants import dequantize

OF_QUANTIZATION = ("general.file_type", "general.quantization_version")


def main(file: str, output: str) -> None:
    reader = GGUFReader(file)
    architecture = "general.architecture"
    writer = GGUFWriter(output, reader.get_field(architecture).contents())
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name in (architecture, *OF_QUANTIZATION):
            continue
        kind = field.types[0]
        of_elements = field.types[-1] if kind == GGUFValueType.ARRAY else None
        writer.add_key_value(name, field.contents(), kind, sub_type=of_elements)
    for tensor in reader.tensors:
        shape = tensor.shape.tolist()[::-1]
        values = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        writer.add_tensor(tensor.name, values.reshape(shape))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
