"""From noise to latents: samplers, guidance, shortcuts, several processes. A sampler is one file and one line here."""

from importlib import import_module

from mindsigma.errors import MindSigmaError

# Name: module of this package and its Sampler, imported when asked for, as options are judged before MindSpore loads.
SAMPLERS = {
    "dpm": ("dpm_solver", "DPMSolver"),
}


# Options that only some samplers take, each a field of SamplingOptions.
SAMPLER_OPTIONS = ("solver_order", "eta", "spacing", "karras", "timesteps", "sigmas", "guided_channels")


def sampler_class(name):
    """The Sampler of a name. Raises MindSigmaError."""
    if name not in SAMPLERS:
        raise MindSigmaError(f"sampler must be one of {', '.join(SAMPLERS)}, not {name!r}")
    module, cls = SAMPLERS[name]
    return getattr(import_module(f"{__name__}.{module}"), cls)
