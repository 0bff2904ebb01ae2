"""Draw pictures on a web page.

python tools/web.py
"""

from mindsigma.commands.web import run

if __name__ == "__main__":
    run()
