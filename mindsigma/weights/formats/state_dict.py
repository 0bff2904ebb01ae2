"""Which part of an object saved with torch.save is the state dict: training scripts put it under many keys."""

import numpy as np

from mindsigma.errors import MindSigmaError, one_line

# In the order in which they are looked for; PixArt's own scripts write state_dict and state_dict_ema.
PLAIN = ("state_dict", "model", "module", "model_state_dict", "params", "network", "net", "generator", "weights")
AVERAGED = ("state_dict_ema", "ema", "ema_model", "model_ema", "ema_state_dict", "model_state_dict_ema", "params_ema")
DEEPEST = 4


def find_state_dict(file, saved, ema=False):
    """(tensors, extra, beside, key) of what a PyTorch file holds.

    Args:
        file: Path, for messages.
        saved: the object, as torch_file.read_torch returns it.
        ema: take averaged weights where there are some.

    Returns:
        tensors: dict name -> array. Of several networks saved side by side, each name begins with the key of its own.
        extra: dict of the numbers, texts, bools and None beside the state dict.
        beside: keys of all that stands beside the state dict: numbers, optimizers, other state dicts.
        key: key of AVERAGED that the weights stood under, or "".

    Raises:
        MindSigmaError: there is no state dict.
    """
    if not isinstance(saved, dict):
        raise MindSigmaError(
            f"{file}: holds a {type(saved).__name__.strip('_')}, not a state dict; save model.state_dict()"
        )
    tensors, extra, beside, averaged = saved, {}, [], ""
    for _ in range(DEEPEST):
        key = _key(tensors, ema and not averaged)
        if key is None:
            break
        if not extra:
            extra = {k: v for k, v in tensors.items() if isinstance(k, str) and _is_plain(v)}
        beside += [str(other) for other in tensors if other != key]
        averaged = key if key in AVERAGED else averaged
        tensors = tensors[key]
    whole, tensors = tensors, _side_by_side(tensors)
    if tensors is not whole:
        beside += [str(other) for other in whole if other not in _networks(whole)]
    wrong = [k for k, v in tensors.items() if not isinstance(k, str) or not isinstance(v, np.ndarray)]
    if wrong:
        listed = ", ".join(f"'{one_line(k, 60)}'" for k in wrong[:5]) + (", ..." if len(wrong) > 5 else "")
        raise MindSigmaError(
            f"{file}: {len(wrong)} entries of its state dict are no named tensors: {listed}; save the state dict alone"
        )
    if not tensors:
        raise MindSigmaError(f"{file}: its state dict is empty; save model.state_dict()")
    return tensors, extra, beside, averaged


def _key(saved, ema):
    """Key of the dict within a dict that is the state dict, or None: this one is, or holds several."""
    plain = next((key for key in PLAIN if isinstance(saved.get(key), dict)), None)
    averaged = next((key for key in AVERAGED if isinstance(saved.get(key), dict)), None)
    if ema and averaged is not None:
        return averaged
    others = [key for key in _networks(saved) if key != plain and key not in AVERAGED]
    return None if others else plain or averaged


def _networks(saved):
    """Keys under which a dict holds dicts of arrays."""
    return [
        key
        for key, value in saved.items()
        if isinstance(key, str)
        and isinstance(value, dict)
        and value
        and all(isinstance(k, str) and isinstance(v, np.ndarray) for k, v in value.items())
    ]


def _side_by_side(saved):
    """State dicts of several networks as one, if that is what a dict holds; optimizers and numbers beside them go."""
    networks = _networks(saved)
    if not networks or any(isinstance(value, np.ndarray) for value in saved.values()):
        return saved
    return {f"{key}.{name}": tensor for key in networks for name, tensor in saved[key].items()}


def _is_plain(value):
    return isinstance(value, (int, float, str, type(None)))
