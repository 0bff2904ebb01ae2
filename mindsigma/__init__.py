"""PixArt-Σ, text to image, on MindSpore for Ascend NPUs."""

__version__ = "0.2.0"

__all__ = ["MindSigmaError", "PixArtSigmaPipeline", "load_dit"]


def __getattr__(name):
    # Deferred, so that a wrong Python or MindSpore is named before MindSpore is imported.
    if name in __all__:
        from mindsigma.environment import check_environment
        from mindsigma.errors import MindSigmaError

        check_environment()
        if name == "MindSigmaError":
            return MindSigmaError
        if name == "load_dit":
            from mindsigma.weights.loading import load_dit

            return load_dit
        from mindsigma.pipeline.pipeline import PixArtSigmaPipeline

        return PixArtSigmaPipeline
    raise AttributeError(f"module 'mindsigma' has no attribute {name!r}")
