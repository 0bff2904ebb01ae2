"""Make the picture that a ControlNet is guided by of another picture: edges, blur, low resolution.

python tools/make_condition.py photo.jpg edges.png --condition canny
"""

from mindsigma.commands.make_condition import run

if __name__ == "__main__":
    run()
