"""What an evaluation leaves: JSON, CSV, a Markdown row beside the published ones, a sheet of pictures and texts."""

import csv
import io
from functools import lru_cache

from PIL import Image, ImageDraw

from mindsigma.data.text_scenes import font
from mindsigma.errors import MindSigmaError
from mindsigma.evaluation.published import ROWS, SUBSETS, published_cell
from mindsigma.evaluation.text_scores import key_of
from mindsigma.weights.formats.atomic import replacing, write_json

SHEET_PICTURES = 24
SHEET_COLUMNS = 6
CELL = 200  # pixels of a picture on the sheet
LINES = 5  # of text under it
LETTERS = 12
COLUMNS = (
    "subset", "picture", "hits", "read", "wanted", "cer", "clip_truncated", "clip_sliced", "text_read", "text_wanted",
    "fault",
)  # fmt: skip


def write_results(folder, result, scores, pictures, sheet=SHEET_PICTURES):
    """Write result.json, items.csv, row.md and sheet.png into a folder (Path); returns their paths.

    Args:
        result: dict with `name`, `ocr`, `subsets` and `overall`.
        scores: list of Score.
        pictures: FolderPictures or ReferencePictures, for the sheet.
        sheet: how many pictures it shows; 0 leaves it out.
    """
    paths = [folder / name for name in ("result.json", "items.csv", "row.md")]
    write_json(paths[0], result)
    for path, text in zip(paths[1:], (items_csv(scores), markdown(result))):
        with replacing(path) as file:
            file.write(text.encode())
    if sheet:
        paths.append(folder / "sheet.png")
        with replacing(paths[-1]) as file:
            contact_sheet(spread(scores, sheet), pictures).save(file, "PNG")
    return paths


def items_csv(scores):
    """A line an item."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(COLUMNS)
    for score in scores:
        counts = score.counts
        writer.writerow(
            [
                score.item.subset,
                score.item.name,
                counts.hits,
                counts.read,
                counts.wanted,
                f"{counts.cer:.6f}",
                *(f"{score.cosines[cut]:.6f}" if score.cosines else "" for cut in ("truncated", "sliced")),
                score.text,
                score.item.text,
                score.unreadable,
            ]
        )
    return file.getvalue()


def markdown(result):
    """Tables: the result beside the published rows, and the figures behind it."""
    names = list(result["subsets"])
    engine = result["ocr"]
    lines = [
        "CLIP score / accuracy % / F1 % / CER. Published: arXiv 2502.07870v2, read by PaddleOCR 2.9.1; here by "
        f"{engine['engine']} {engine['version']}. CLIP is the paper's, which loses the end of long prompts.",
        "",
        f"| model | {' | '.join(map(_cell, names))} |",
        f"|---|{'---|' * len(names)}",
        f"| **{_cell(result['name'])}** | {' | '.join(_own_cell(result['subsets'][name]) for name in names)} |",
    ]
    if any(name in SUBSETS for name in names):
        lines += [f"| {row} | {' | '.join(published_cell(row, name) for name in names)} |" for row in ROWS]
    lines += [
        "",
        "| subset | pictures | hits / read / wanted | precision % | F1 % (95 %) | F1 against other texts % | exact |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, one in [*result["subsets"].items(), ("all", result["overall"])]:
        low, high = one["intervals_95"]["f1"]
        lines.append(
            f"| {_cell(name)} | {one['pictures']} | {one['hits']} / {one['read']} / {one['wanted']} | "
            f"{one['precision']:.2f} | {one['f1']:.2f} ({low:.2f} to {high:.2f}) | {one['f1_of_other_texts']:.2f} | "
            f"{one['exact']} |"
        )
    return "\n".join(lines) + "\n"


def _own_cell(one):
    clip = f"{one['clip']['sliced']:.2f}" if "clip" in one else "–"
    return f"{clip} / {one['accuracy']:.2f} / {one['f1']:.2f} / {one['cer']:.2f}"


def _cell(text):
    """Text that breaks no table."""
    return str(text).replace("|", "\\|").replace("\n", " ")


def spread(scores, count):
    """At most `count` of the scores, evenly spread."""
    if len(scores) <= count:
        return scores
    return [scores[i * len(scores) // count] for i in range(count)]


def contact_sheet(scores, pictures):
    """PIL image: each picture, below it what was wanted (grey) and what was read (black)."""
    columns = min(SHEET_COLUMNS, len(scores))
    rows = -(-len(scores) // columns)
    most = max(len(_lines_of(score)) for score in scores)
    height = CELL + most * (LETTERS + 4) + 8
    sheet = Image.new("RGB", (columns * (CELL + 8) + 8, rows * (height + 8) + 8), "white")
    pencil = ImageDraw.Draw(sheet)
    for place, score in enumerate(scores):
        left, top = 8 + place % columns * (CELL + 8), 8 + place // columns * (height + 8)
        try:
            image = pictures.read(score.item)
            image.thumbnail((CELL, CELL))
            sheet.paste(image, (left, top))
        except MindSigmaError:
            pencil.text((left, top), f"cannot be read: {key_of(score.item)}", fill="red", font=font(LETTERS))
        pencil.rectangle((left - 1, top - 1, left + CELL, top + CELL), outline="lightgrey")
        for number, (colour, line) in enumerate(_lines_of(score)):
            pencil.text((left, top + CELL + 4 + number * (LETTERS + 4)), line, fill=colour, font=font(LETTERS))
    return sheet


def _lines_of(score):
    """(colour, line) of what stands below a picture."""
    wanted = _broken(f"wanted: {score.item.text}", 2)
    read = _broken(f"read, {score.counts.hits} hits: {score.text}", LINES - len(wanted))
    return [("grey", line) for line in wanted] + [("black", line) for line in read]


def _broken(text, most):
    """At most `most` lines of a text as wide as a picture; the last ends in dots where more is left."""
    lines, line = [], ""
    for character in " ".join(text.split()):
        if _width(line + character) > CELL:
            lines.append(line)
            line = ""
            if len(lines) == most:
                return [*lines[:-1], lines[-1][:-2] + "…"]
        line += character
    return [*lines, line] if line else lines


@lru_cache(maxsize=4096)
def _width(text):
    return font(LETTERS).getlength(text)


def told(result):
    """Lines for the terminal."""
    lines = []
    for name, one in [*result["subsets"].items(), ("all", result["overall"])]:
        low, high = one["intervals_95"]["f1"]
        text = (
            f"{name}: {one['pictures']} pictures, accuracy {one['accuracy']:.2f} %, precision {one['precision']:.2f} "
            f"%, F1 {one['f1']:.2f} % ({low:.2f} to {high:.2f}), CER {one['cer']:.3f}; {one['hits']} hits, "
            f"{one['read']} read, {one['wanted']} wanted; against other texts F1 {one['f1_of_other_texts']:.2f} %"
        )
        if "clip" in one:
            text += f"; CLIP {one['clip']['sliced']:.4f} as the paper cuts, {one['clip']['truncated']:.4f} cut rightly"
        if "fid" in one:
            text += f"; FID (TextAtlas) {one['fid']['value']:.2f}"
        for key in ("unreadable", "empty_ground_truth"):
            if one[key]:
                text += f"; {key.replace('_', ' ')}: {one[key]}"
        lines.append(text)
    return lines
