"""What is done to a caption before it is tokenised: little, or the thorough cleaning of DeepFloyd and diffusers."""

import html
import re
import warnings
from urllib.parse import unquote_plus

# Rules are (pattern, replacement), applied in order. They give what diffusers gives, character for character, so that a
# prompt means the same image in both: what looks like a slip is to be kept.


def _rules(*pairs):
    return tuple((re.compile(pattern), replacement) for pattern, replacement in pairs)


_DOMAIN = r"[a-z0-9.\-]+[.](?:com|co|ru|net|org|edu|gov|it)[\w/-]*\b/?(?!@)"

# On lower-cased text that still holds its HTML tags.
_BEFORE_HTML = _rules(
    ("<person>", "person"),  # a data set's stand-in for a name, which would be lost as a tag
    # Schemes, then domains: one pass takes the scheme of a full address and the second pass its domain.
    (rf"\b(?:https?:(?:/{{1,3}}|[a-z0-9%])|{_DOMAIN})", ""),
    (rf"\b(?:www:(?:/{{1,3}}|[a-z0-9%])|{_DOMAIN})", ""),
)

_AFTER_HTML = _rules(
    (r"@[\w\d]+\b", ""),  # @nickname
    ("[\u31c0-\u9fff]+", ""),  # CJK strokes to unified ideographs, with all blocks between
    # Every dash becomes a hyphen, quotation marks become straight.
    (
        "[\\-\u058a\u05be\u1400\u1806\u2010-\u2015\u2e17\u2e1a\u2e3a\u2e3b\u2e40\u301c\u3030\u30a0"
        "\ufe31\ufe32\ufe58\ufe63\uff0d]+",
        "-",
    ),
    ("[`\u00b4\u00ab\u00bb\u201c\u201d\u00a8]", '"'),
    ("[\u2018\u2019]", "'"),
    # Entities written out twice over, which the HTML parser turned into entities.
    ("&quot;?", ""),
    ("&amp", ""),
    (r"\d{1,3}\.\d{1,3}\.\d{1,3}\.\d{1,3}", " "),  # IP addresses
    (r"\d:\d\d\s+$", ""),  # the end of an article id
    (r"\\n", " "),  # a line break written as backslash and n
    # Numbers of lists, posts and articles; four digits after # are kept.
    (r"#\d{1,3}\b", ""),
    (r"#\d{5,}\b", ""),
    (r"\b\d{6,}\b", ""),
    (r"\S+\.(?:png|jpg|jpeg|bmp|webp|eps|pdf|apk|mp4)", ""),  # file names
    # Shouting: """sale""", sale..., ***sale***, #sale, and a stop with nothing before it.
    ("[\"']{2,}", '"'),
    (r"\.{2,}", " "),
    (r"[#®•©™&@·º½¾¿¡§~()\[\]{}|\\/*]+", " "),
    (r"\s+\.\s+", " "),
)

_JOINT = re.compile("[-_]")
_MOST_JOINTS = 3

_AFTER_REPAIR = _rules(
    # Product codes: jc6640, jc6640vc, 6640vc231.
    (r"\b[a-zA-Z]{1,3}\d{3,15}\b", ""),
    (r"\b[a-zA-Z]+\d+[a-zA-Z]+\b", ""),
    (r"\b\d+[a-zA-Z]+\d+\b", ""),
    # Phrases of shops and download sites.
    (r"(?:worldwide\s+)?(?:free\s+)?shipping", ""),
    (r"(?:free\s)?download(?:\sfree)?", ""),
    (r"\bclick\b\s(?:for|on)\s\w+", ""),
    (r"\b(?:png|jpg|jpeg|bmp|webp|eps|pdf|apk|mp4)(?:\simages?)?", ""),
    (r"\bpage\s+\d+\b", ""),
    (r"\b\d*[a-zA-Z]+\d+[a-zA-Z]+\d+[a-zA-Z\d]*\b", " "),  # longer codes: j2d1a2a
    ("\\b\\d+\\.?\\d*[x\u0445\u00d7]\\d+\\.?\\d*\\b", ""),  # dimensions, with a Latin or Cyrillic x or a times sign
    # Spacing of punctuation, then of everything.
    (r"\b\s+:\s+", ": "),
    (r"(\D[,./])\b", r"\1 "),
    (r"\s+", " "),
    # Quotation marks around the whole; stray marks at either end; a lone word that starts with a stop.
    (r"^[\"']([\w\W]+)[\"']$", r"\1"),
    (r"^['_,\-:;]", ""),
    (r"['_,\-:+]$", ""),
    (r"^\.\S+$", ""),
)


def plain_caption(text, lower):
    """The caption without white space at its ends, in lower case if `lower`."""
    text = text.strip()
    return text.lower() if lower else text


def clean_caption(text):
    """The caption as diffusers' PixArt pipelines make it under clean_caption=True: lower case, without web debris.

    Two passes, for one pass can leave what the next removes. Markup that the HTML parser refuses stays as it is, where
    diffusers would raise.
    """
    return _clean_once(_clean_once(text))


def _clean_once(text):
    import ftfy  # here, since few runs clean captions: with bs4 a tenth of the time of all imports

    text = unquote_plus(text).strip().lower()
    text = _apply(_BEFORE_HTML, text)
    text = _apply(_AFTER_HTML, _without_tags(text))
    if len(_JOINT.findall(text)) > _MOST_JOINTS:  # this-is-my-cute-cat
        text = _JOINT.sub(" ", text)
    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return _apply(_AFTER_REPAIR, text).strip()


def _apply(rules, text):
    for pattern, replacement in rules:
        text = pattern.sub(replacement, text)
    return text


def _without_tags(text):
    from bs4 import BeautifulSoup, MarkupResemblesLocatorWarning, ParserRejectedMarkup, XMLParsedAsHTMLWarning

    with warnings.catch_warnings():
        # A caption that looks like a file name, an address or XML is nothing to warn of here.
        warnings.simplefilter("ignore", MarkupResemblesLocatorWarning)
        warnings.simplefilter("ignore", XMLParsedAsHTMLWarning)
        try:
            return BeautifulSoup(text, features="html.parser").text
        except ParserRejectedMarkup:
            return text
