"""What options choose from, apart from the code that it names: options are judged before NumPy and MindSpore load."""

# Data.
INCOMPLETE = ("repeat", "drop")  # the last batch of a bucket
TABLE_NAMES = ("training", "inference", "test")  # of buckets
MAX_BAD_IMAGES = 100  # that a run leaves out before it ends

# Of a ControlNet that are computed: names of their numbers, each (default, least, most).
CONDITIONS = {
    "canny": {"LOW": (100, 0, 10000), "HIGH": (200, 0, 10000)},  # thresholds of the gradient, of which a step has 1020
    "edges": {"SIGMA": (1, 0, 100)},  # pixels, of the Gaussian before the gradient
    "blur": {"RADIUS": (8, 0, 1000)},  # pixels, of the Gaussian
    "tile": {"FACTOR": (8, 1, 1000)},  # of the sides
}

# Training.
NULL_MASKS = ("caption", "own")  # of a dropped caption
WEIGHTINGS = ("none", "min-snr")  # of the loss
OPTIMIZERS = {  # name: (betas, eps)
    "came": ((0.9, 0.999, 0.9999), (1e-30, 1e-16)),
    "adamw": ((0.9, 0.999), (1e-8,)),
    "lion": ((0.9, 0.99), ()),
}
ZERO_STAGES = (0, 1, 2, 3)
LCM_LOSSES, LCM_WEIGHTINGS = ("huber", "l2"), ("none", "signal")
DMD_REGRESSIONS = ("none", "l2", "huber", "lpips")
LORA_TARGETS = ("attn.qkv", "attn.proj", "cross_attn", "mlp.fc1", "mlp.fc2")  # every linear layer of the blocks
FAST = "sigma-mini/lcm.safetensors"  # LCM-LoRA of the bundled model of that name, as weights/locate.py knows it
