"""How a distilled model or adapter wants to be sampled, in the header of its safetensors file."""

import json

from mindsigma.errors import MindSigmaError, one_line
from mindsigma.foreign import load_json_value

KEY = "sampling"  # in the header
FIELDS = ("sampler", "num_inference_steps", "guidance_scale", "timesteps")  # of SamplingOptions


def header_texts(sampling):
    """dict of texts for the header of a safetensors file; `sampling`: fields of SamplingOptions, or {}."""
    return {KEY: json.dumps(sampling)} if sampling else {}


def told_by(source):
    """Fields of SamplingOptions that the header of a TensorSource tells, or {}. Raises MindSigmaError."""
    if source.metadata.get("format") != "mindsigma" or KEY not in source.metadata:
        return {}  # others may mean something else by the word
    from mindsigma.sampling.options import SamplingOptions

    told = load_json_value(source.path, source.metadata[KEY], "how it is sampled")
    try:
        if "sampler" not in told or not set(told) <= set(FIELDS):
            raise ValueError(f"it names {', '.join(map(str, told))}")
        told = {name: tuple(value) if isinstance(value, list) else value for name, value in told.items()}
        SamplingOptions(**told)
    except (MindSigmaError, TypeError, ValueError) as error:
        raise MindSigmaError(
            f"{source.path}: its header tells how it is sampled, but not as this version knows it "
            f"({one_line(error)}); copy it again, or use the version that wrote it"
        ) from None
    return told
