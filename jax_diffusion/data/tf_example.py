"""tf.train.Example, the record that TensorFlow's data sets are made of, without TensorFlow.

    message Example  { Features features = 1; }           message BytesList { repeated bytes value = 1; }
    message Features { map<string, Feature> feature = 1; } message Int64List { repeated int64 value = 1 [packed]; }
    message Feature  { oneof kind { BytesList bytes_list = 1; FloatList float_list = 2; Int64List int64_list = 3; } }

(https://www.tensorflow.org/tutorials/load_data/tfrecord). The parser is protobuf's own; only the description is here.
"""

import functools
from typing import Any

from jax_diffusion.errors import UserError

IMAGE_KEYS = ("image/encoded", "image", "image_raw", "img", "jpg", "png", "jpeg", "webp")
LABEL_KEYS = ("label", "image/class/label", "labels", "class", "cls", "fine_label")


@functools.cache
def _message() -> Any:
    """The class of Example messages."""
    try:
        from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
    except ImportError as error:
        raise UserError("records of tf.train.Example need protobuf: pip install protobuf") from error
    field = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="jax_diffusion/example.proto", package="jax_diffusion")
    file.syntax = "proto3"

    def message(name: str, *fields: dict[str, Any], parent: Any = None) -> Any:
        made = parent.nested_type.add(name=name) if parent else file.message_type.add(name=name)
        for number, options in enumerate(fields, 1):
            made.field.add(number=number, **({"label": field.LABEL_OPTIONAL} | options))
        return made

    def of(name: str, kind: str, **more: Any) -> dict[str, Any]:
        return {"name": name, "type": field.TYPE_MESSAGE, "type_name": f".jax_diffusion.{kind}", **more}

    def values(kind: int) -> dict[str, Any]:
        return {"name": "value", "type": kind, "label": field.LABEL_REPEATED}

    message("BytesList", values(field.TYPE_BYTES))
    message("FloatList", values(field.TYPE_FLOAT))
    message("Int64List", values(field.TYPE_INT64))
    kinds = of("bytes_list", "BytesList"), of("float_list", "FloatList"), of("int64_list", "Int64List")
    feature = message("Feature", *(k | {"oneof_index": 0} for k in kinds))
    feature.oneof_decl.add(name="kind")
    features = message("Features", of("feature", "Features.FeatureEntry", label=field.LABEL_REPEATED))
    key = {"name": "key", "type": field.TYPE_STRING}
    message("FeatureEntry", key, of("value", "Feature"), parent=features).options.map_entry = True
    message("Example", of("features", "Features"))
    pool = descriptor_pool.DescriptorPool()  # its own: TensorFlow's description of the same lies in the common one
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("jax_diffusion.Example"))


def parse(record: bytes) -> tuple[bytes, int | None]:
    """The encoded image and the label (None: none) of a serialised Example.

    Raises:
      ValueError: it is none, or has no image under one of IMAGE_KEYS.
    """
    example = _message()()
    try:
        example.ParseFromString(record)
    except Exception as error:  # protobuf's DecodeError, whose module is not to be imported up there
        raise ValueError(f"no tf.train.Example ({error})") from error
    features = example.features.feature
    image: Any = next((features[k].bytes_list.value for k in IMAGE_KEYS if k in features), ())
    if len(image) != 1:
        raise ValueError(f"no encoded image among {', '.join(sorted(features))}: one of {', '.join(IMAGE_KEYS)}")
    label: Any = next((features[k].int64_list.value for k in LABEL_KEYS if k in features), ())
    return image[0], int(label[0]) if len(label) == 1 else None


def serialised(image: bytes, label: int | None) -> bytes:
    """The record of an encoded image that `parse` takes apart."""
    example = _message()()
    example.features.feature["image"].bytes_list.value.append(image)
    if label is not None:
        example.features.feature["label"].int64_list.value.append(label)
    return example.SerializeToString()
