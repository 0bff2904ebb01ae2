"""What TextAtlas' paper (arXiv 2502.07870v2) prints for other models, to stand beside a row of one's own.

As it is printed. F1 is at most twice the accuracy, so Infinity-2B's 1.93 on cleantextsynth cannot be.
"""

SUBSETS = ("cleantextsynth", "textvisionblend", "styledtextsynth", "textsceneshq")

# CLIP score, accuracy %, F1 %, CER of each subset, or a dash.
_TABLE = """
PixArt-Σ | .24 .69 1.15 .92 | .19 2.40 1.57 .83 | .28 .42 .62 .90 | .23 .34 .53 .91
PixArt-α 512 | .25 .23 .42 .98 | .17 .04 .09 .96 | .28 .05 .12 .98 | .29 .13 .28 .94
PixArt-α 512, fine-tuned | .28 39.14 50.24 .33 | .16 58.21 54.32 .27 | .29 22.10 25.14 .63 | .30 3.63 4.30 .84
AnyText | .21 .18 .34 .99 | – | .25 .35 .66 .98 | .22 .42 .81 .95
TextDiffuser-2 | .23 1.41 2.66 .98 | – | .25 .76 1.46 .99 | .23 .66 1.25 .96
Infinity-2B | .24 .11 1.93 .88 | .20 2.98 3.44 .83 | .27 .80 1.42 .93 | .23 1.06 1.74 .88
SD 3.5 Large | .28 12.0 18.2 .84 | .18 14.55 16.25 .88 | .28 27.21 33.86 .73 | .24 19.03 24.45 .73
Qwen Image | – | .18 81.02 58.65 .57 | .30 66.20 73.92 .35 | .33 71.82 68.70 .34
Janus Pro 1B | .23 .27 .52 .96 | .22 .76 1.31 .94 | .27 .06 .12 .98 | .27 .25 .48 .98
Janus Pro 1B, fine-tuned | .27 5.23 8.97 .65 | .18 13.61 17.55 .61 | .28 12.75 17.37 .75 | –
Lumina-mGPT 7B | .24 .32 .45 .97 | .18 .03 .05 .95 | .27 .13 .21 .97 | .28 .22 .35 .92
Lumina-mGPT 7B, fine-tuned | .29 48.55 59.67 .31 | .17 65.34 70.32 .22 | .29 27.93 20.20 .49 | .27 6.44 9.34 .79
Grok 3 | .28 31.08 40.81 .44 | .17 41.54 44.22 .57 | .29 15.82 21.4 .73 | .32 35.07 37.94 .57
DALL·E 3 | – | .19 8.38 7.94 .93 | .29 30.58 38.25 .78 | .34 69.26 51.63 .67
Nano Banana | .25 65.80 73.66 .23 | .15 93.49 80.30 .26 | .29 64.09 70.93 .39 | .33 75.15 70.99 .36
GPT-4o | .27 60.69 74.44 .36 | .15 91.78 82.07 .15 | .30 77.47 80.76 .21 | .33 82.88 78.68 .32
"""


def _rows():
    rows = {}
    for line in _TABLE.strip().split("\n"):
        name, *cells = line.split(" | ")
        rows[name] = tuple(None if cell == "–" else tuple(map(float, cell.split())) for cell in cells)
    return rows


ROWS = _rows()


def published_cell(row, subset):
    """Text of a published row's cell for a subset; a dash where there is none."""
    values = ROWS[row][SUBSETS.index(subset)] if subset in SUBSETS else None
    if values is None:
        return "–"
    clip, accuracy, f1, cer = values
    return f"{clip:.2f} / {accuracy:.2f} / {f1:.2f} / {cer:.2f}"
