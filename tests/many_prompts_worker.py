"""Peak memory in bytes of encoding so many prompts (the argument) and of taking their captions batch by batch."""

import json
import resource
import sys

from mindsigma import PixArtSigmaPipeline
from mindsigma.pipeline.kept_captions import KeptCaptions

TEXT = "a small red apple beside two large cats on a blue background with a rocket and a sunflower"

if __name__ == "__main__":
    words = TEXT.split()
    pipeline = PixArtSigmaPipeline.from_pretrained("sigma-mini", device="CPU")
    prompts = [" ".join(words[(i + j) % len(words)] for j in range(60)) + f" {i}" for i in range(int(sys.argv[1]))]
    kept = KeptCaptions(pipeline)
    kept.encode(prompts)
    for i in range(0, len(prompts), 2):
        kept.batch(prompts[i : i + 2])
    print(json.dumps(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024))
