"""Make the picture that a ControlNet is guided by of another picture: edges, blur, low resolution.

python tools/make_condition.py photo.jpg edges.png --condition canny
"""

from pathlib import Path

from mindsigma import command_line
from mindsigma.errors import MindSigmaError, say
from mindsigma.training.condition_options import forms

LARGEST_SIDE = 8192  # pixels


def build_parser():
    """The options of this tool."""
    parser = command_line.parser(
        "Make the condition of a ControlNet of a picture, as it was made of the images that it learned from.",
        "python tools/make_condition.py photo.jpg edges.png --condition canny",
    )
    add = parser.add_argument
    add("picture", help="image of any format that is trained on")
    add("output", help="PNG to write; a number is appended to the name of one that is there")
    add("--condition", required=True, metavar="KIND", help=forms())
    add("--height", type=int, help="pixels: the picture is first resized to cover --height x --width, and cropped")
    add("--width", type=int, help="default the picture's own")
    add("--overwrite", action="store_true", help="replace what has the name of the output")
    return parser


def main():
    """Parse, make, write; returns the exit code."""
    args = build_parser().parse_args()
    if (args.height is None) != (args.width is None):
        raise MindSigmaError("--height and --width belong together: give both")
    for name in ("height", "width"):
        side = getattr(args, name)
        if side is not None and not 1 <= side <= LARGEST_SIDE:
            raise MindSigmaError(f"--{name} must lie in 1 ... {LARGEST_SIDE}, not {side}")
    from mindsigma.commands.picture_names import Names
    from mindsigma.data.conditions import Condition
    from mindsigma.data.images import cover_and_crop
    from mindsigma.pipeline.given_image import open_picture
    from mindsigma.pipeline.pictures import save_png

    output = Path(args.output)
    if output.suffix.lower() != ".png":
        raise MindSigmaError(f"{output}: the output is a PNG; give a name that ends with .png")
    condition = Condition.of(args.condition)
    picture = open_picture("picture", args.picture)
    if args.height is not None:
        picture = cover_and_crop(picture, args.height, args.width, "lanczos")
    output = Names(args.overwrite).free(output)
    save_png(condition.computed(picture), output, {"condition": str(condition)})
    say(output)
    return 0


def run():
    """`main` as a command: one line and exit code 2 for what the user can mend."""
    command_line.run(main)
