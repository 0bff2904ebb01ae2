"""The methods of training. A method is one file and one line here."""

from importlib import import_module

# Name: module of this package and its Method, imported when asked for.
METHODS = {
    "denoising": ("denoising", "Training"),
    "lcm": ("lcm", "LCM"),
    "dmd": ("dmd", "DMD"),
    "controlnet": ("controlnet", "ControlNetTraining"),
}
DISTILLATIONS = ("lcm", "dmd")  # what tools/distill.py offers


def method_of(args):
    """The Method of a namespace of options; that of tools/train.py names none for the ordinary training."""
    return method_class(getattr(args, "method", None) or "denoising")


def method_class(name):
    """The Method of a name."""
    module, cls = METHODS[name]
    return getattr(import_module(f"mindsigma.training.{module}"), cls)
