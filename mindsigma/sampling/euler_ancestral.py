"""Euler with ancestral noise (k-diffusion, diffusers): each step goes below its level and adds noise up to it."""

from mindsigma.sampling.euler import Euler


class EulerAncestral(Euler):
    """Euler ancestral, arguments as of Euler: DDIM of eta 1 on Euler's grid."""

    eta = 1.0
    draws = True
