"""From noise to latents: samplers, guidance, shortcuts, several processes. A sampler is one file and one line here."""

from importlib import import_module

from mindsigma.errors import MindSigmaError

# Name: module of this package and its Sampler, imported when asked for, as options are judged before MindSpore loads.
SAMPLERS = {
    "dpm": ("dpm_solver", "DPMSolver"),
    "ddim": ("ddim", "DDIM"),
    "iddpm": ("iddpm", "IDDPM"),
    "sa": ("sa_solver", "SASolver"),
    "euler": ("euler", "Euler"),
    "euler-ancestral": ("euler_ancestral", "EulerAncestral"),
    "lcm": ("lcm", "LCM"),
    "one-step": ("one_step", "OneStep"),
    "unipc": ("unipc", "UniPC"),
}


# Whose sampler to reproduce, where it is another in diffusers and in the official code.
CONVENTIONS = ("diffusers", "official")

# Options that only some samplers take, each a field of SamplingOptions.
SAMPLER_OPTIONS = ("solver_order", "eta", "spacing", "karras", "timesteps", "sigmas", "guided_channels")


def sampler_class(name):
    """The Sampler of a name. Raises MindSigmaError."""
    if not isinstance(name, str) or name not in SAMPLERS:
        from mindsigma.arguments import shown  # not above: a parser needs no NumPy

        raise MindSigmaError(f"sampler must be one of {', '.join(SAMPLERS)}, not {shown(name)}")
    module, cls = SAMPLERS[name]
    return getattr(import_module(f"{__name__}.{module}"), cls)
