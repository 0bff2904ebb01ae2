"""What TextAtlas' paper (arXiv 2502.07870v2) prints for other models, to stand beside a row of one's own."""

# (CLIP score, accuracy %, F1 %, CER) by subset; None where the paper has a dash.
SUBSETS = ("cleantextsynth", "textvisionblend", "styledtextsynth", "textsceneshq")
ROWS = {
    "PixArt-Σ": (
        (0.24, 0.69, 1.15, 0.92),
        (0.19, 2.40, 1.57, 0.83),
        (0.28, 0.42, 0.62, 0.90),
        (0.23, 0.34, 0.53, 0.91),
    ),
    "PixArt-α 512": (
        (0.25, 0.23, 0.42, 0.98),
        (0.17, 0.04, 0.09, 0.96),
        (0.28, 0.05, 0.12, 0.98),
        (0.29, 0.13, 0.28, 0.94),
    ),
    "PixArt-α 512, fine-tuned on TextAtlas5M": (
        (0.28, 39.14, 50.24, 0.33),
        (0.16, 58.21, 54.32, 0.27),
        (0.29, 22.10, 25.14, 0.63),
        (0.30, 3.63, 4.30, 0.84),
    ),
    "AnyText": ((0.21, 0.18, 0.34, 0.99), None, (0.25, 0.35, 0.66, 0.98), (0.22, 0.42, 0.81, 0.95)),
    "TextDiffuser-2": ((0.23, 1.41, 2.66, 0.98), None, (0.25, 0.76, 1.46, 0.99), (0.23, 0.66, 1.25, 0.96)),
    "SD 3.5 Large": (
        (0.28, 12.0, 18.2, 0.84),
        (0.18, 14.55, 16.25, 0.88),
        (0.28, 27.21, 33.86, 0.73),
        (0.24, 19.03, 24.45, 0.73),
    ),
    "Qwen Image": (None, (0.18, 81.02, 58.65, 0.57), (0.30, 66.20, 73.92, 0.35), (0.33, 71.82, 68.70, 0.34)),
    "GPT-4o": (
        (0.27, 60.69, 74.44, 0.36),
        (0.15, 91.78, 82.07, 0.15),
        (0.30, 77.47, 80.76, 0.21),
        (0.33, 82.88, 78.68, 0.32),
    ),
}


def published_cell(row, subset):
    """Text of a published row's cell for a subset; a dash where there is none."""
    values = ROWS[row][SUBSETS.index(subset)] if subset in SUBSETS else None
    if values is None:
        return "–"
    clip, accuracy, f1, cer = values
    return f"{clip:.2f} / {accuracy:.2f} / {f1:.2f} / {cer:.2f}"
