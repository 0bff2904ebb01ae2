"""Prior preservation of DreamBooth (arXiv 2208.12242): images of a subject's class, drawn by the network beforehand.

A step takes as many of them as of the subject's images, as micro-batches of their own, so that the two may differ in
size; its loss is that of the subject's images plus `prior_weight` times that of the class's.
"""

from pathlib import Path

from mindsigma.errors import MindSigmaError
from mindsigma.foreign import read_text
from mindsigma.progress import bar
from mindsigma.weights.formats.atomic import naming, replacing

DRAWN = "class"  # folder of drawn images in that of a run
LARGEST_PROMPT = 1 << 16  # bytes


def class_micro_batches(subject, of_class, prior_weight):
    """Micro-batches of a step with its class images.

    Args:
        subject, of_class: functions weight -> list of micro-batches, equally many, their rows with this weight.
        prior_weight: of the mean loss of the class's rows.

    Returns:
        list whose mean loss over all rows is the subject's mean plus prior_weight times the class's.
    """
    return subject(2.0) + of_class(2.0 * prior_weight)


def draw_class_images(pipeline, folder, prompt, count, **options):
    """Draw what is missing of `count` captioned images, image i from seed `options["seed"]` + i. Returns how many.

    Args:
        pipeline: PixArtSigmaPipeline.
        folder: Path; its images are NNNNNN.png with the prompt in NNNNNN.txt, a layout that training reads.
        prompt: text, such as "a backpack".
        options: of the pipeline's call.

    Raises:
        MindSigmaError: the folder holds images of another prompt, or something is in the way of one.
    """
    folder, seed, drawn = Path(folder), options.pop("seed"), 0
    with naming(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with bar(count, "class images", "image") as done:
        for i in range(count):
            drawn += _draw(pipeline, folder, prompt, i, seed + i, options)
            done.update()
    return drawn


def _draw(pipeline, folder, prompt, i, seed, options):
    """Draw image i of a class unless it is there; returns whether it was drawn."""
    image, text = folder / f"{i:06d}.png", folder / f"{i:06d}.txt"
    remedy = f"remove {folder} or give another --class-data"
    for path in (image, text):
        if path.exists() and not path.is_file():
            raise MindSigmaError(f"{path}: is in the way of an image of {prompt!r}; {remedy}")
    if text.exists() and read_text(text, LARGEST_PROMPT).strip() != prompt.strip():
        raise MindSigmaError(f"{text}: not the prompt {prompt!r}; {remedy}")
    if image.exists():
        if not text.exists():  # ours are written after their text
            raise MindSigmaError(f"{image}: has no {text.name}, so it is not of {prompt!r}; {remedy}")
        return False
    with replacing(text) as file:
        file.write(f"{prompt.strip()}\n".encode())
    picture = pipeline([prompt], progress=False, output_type="pil", seed=seed, **options).images[0]
    with naming(image), replacing(image) as file:
        picture.save(file, format="png")
    return True
