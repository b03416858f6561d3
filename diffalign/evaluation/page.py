"""The comparison grid: rows are prompts, columns are models, scores under the images.

Only Pillow is needed; the font is the one Pillow carries. Making the images is the work of ``compare.py``.
"""

from __future__ import annotations

import bisect
import functools
import logging
import math
from collections.abc import Iterable, Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from diffalign.errors import UserError

logger = logging.getLogger(__name__)

PAPER, INK, MUTED, LINE = "#ffffff", "#1f2328", "#6e7781", "#d8dee4"
BETTER, WORSE, FRAME = "#1a7f37", "#b35900", "#2da44e"
SMALLEST_CELL, LARGEST_CELL = 160, 384
_TIE = 1e-6
_NOT_A_LETTER = "\ue123"
_FALLBACKS = ("NotoSans-Regular.ttf", "DejaVuSans.ttf", "Arial.ttf", "Arial Unicode.ttf", "NotoSansCJK-Regular.ttc")

Scores = Sequence[Sequence[float | None]]


def make_grid(
    images: Sequence[Sequence[Image.Image | None]],
    row_labels: Sequence[str],
    column_labels: Sequence[str],
    *,
    scores: Scores | None = None,
    column_notes: Sequence[str | None] | None = None,
    title: str | None = None,
    footer: str | None = None,
    highlight: bool = True,
    decimals: int = 2,
    cell: int | None = None,
    font: str | Path | None = None,
) -> Image.Image:
    """Draw a grid of images with labels.

    Args:
        images: rows of images, one for each column; None leaves a place empty. Images keep their shape.
        row_labels: one for each row (the prompt), wrapped to four lines beside the row.
        column_labels: one for each column (the model), above it. The first column is the one compared with.
        scores: rows x columns, higher is better; shown under the images, with the difference to the first column.
        column_notes: small text under each column's label (mean score, win rate).
        title, footer: text above and below.
        highlight: frame the best image of each row, by score; none where all are equal.
        decimals: of the scores.
        cell: longest side of a shown image in pixels; by default the images' own, within 160 to 384 (small ones are
            enlarged by whole numbers, so that their pixels stay square and sharp).
        font: a TrueType or OpenType file. By default Pillow's own, which has little beyond ASCII; where a label needs
            more, a common font of the system that has it, and a warning if there is none.

    Raises:
        UserError: the numbers of images, labels and scores do not fit each other.
    """
    _check(images, row_labels, column_labels, scores, column_notes)
    side, factor = _cell_size([image for row in images for image in row if image is not None], cell)
    shown = [[None if image is None else _scaled(image, side, factor) for image in row] for row in images]
    font = font or _font_with(" ".join([title or "", footer or "", *row_labels, *column_labels]))
    canvas = _Canvas(side, font, scores is not None, shown, row_labels, column_labels, column_notes, title, footer)
    for r, row in enumerate(shown):
        canvas.row_label(r, row_labels[r])
        line = list(scores[r]) if scores is not None else [None] * len(row)
        best = _best(line) if highlight else set()
        for c, image in enumerate(row):
            canvas.cell(r, c, image, line[c], line[0] if c else None, c in best, decimals)
    return canvas.paper


@functools.cache
def _font(size: int, path: str | None) -> ImageFont.FreeTypeFont:
    if path is None:
        loaded = ImageFont.load_default(size)
        if not isinstance(loaded, ImageFont.FreeTypeFont):
            raise UserError("this Pillow was built without FreeType, which a grid needs: reinstall pillow")
        return loaded
    try:
        return ImageFont.truetype(path, size)
    except OSError as error:
        raise UserError(f"cannot read the font {path}: {error}. Give a .ttf or .otf file.") from error


def _font_with(text: str) -> str | None:
    """None (Pillow's own font) if it can write the text, else the first common font of the system that can."""
    letters = {letter for letter in text if not letter.isspace()}
    if missing := _missing(letters, None):
        for name in _FALLBACKS:
            try:
                if not _missing(missing, name):
                    return name
            except UserError:
                continue  # not on this system
        logger.warning(
            "no font found that can write %s: boxes stand in its place. Give one with the argument font.",
            ", ".join(repr(letter) for letter in sorted(missing)[:8]),
        )
    return None


def _missing(letters: Iterable[str], path: str | None) -> set[str]:
    font = _font(20, path)
    box = bytes(font.getmask(_NOT_A_LETTER))
    return {letter for letter in letters if bytes(font.getmask(letter)) == box}


def wrap(text: str, font: ImageFont.FreeTypeFont, width: float, lines: int) -> list[str]:
    """Break text into at most ``lines`` lines of ``width`` pixels, at spaces where possible; "..." if it is cut."""
    wrapped: list[str] = []
    current = ""
    for word in text.split():
        if font.getlength(f"{current} {word}".strip()) <= width:
            current = f"{current} {word}".strip()
            continue
        if current:
            wrapped.append(current)
        while font.getlength(word) > width and len(word) > 1:
            whole = word
            fits = max(1, bisect.bisect_right(range(1, len(word)), width, key=lambda k: font.getlength(whole[:k])))
            joint = max(word.rfind(mark, 0, fits) for mark in "/-_") + 1
            fits = joint if joint > fits // 2 else fits
            wrapped.append(word[:fits])
            word = word[fits:]
        current = word
    wrapped.extend([current] if current else [])
    if len(wrapped) <= lines:
        return wrapped
    last = wrapped[lines - 1]
    while last and font.getlength(last + "...") > width:
        last = last[:-1]
    return [*wrapped[: lines - 1], last.rstrip() + "..."]


class _Canvas:
    """Measures everything first, then draws on a page that is just large enough."""

    def __init__(
        self,
        side: int,
        font: str | Path | None,
        scored: bool,
        images: list[list[Image.Image | None]],
        row_labels: Sequence[str],
        column_labels: Sequence[str],
        column_notes: Sequence[str | None] | None,
        title: str | None,
        footer: str | None,
    ) -> None:
        path = str(font) if font else None
        base = min(22, max(14, round(side / 13)))
        self.text, self.small = _font(base, path), _font(round(base * 0.85), path)
        self.large = _font(round(base * 1.35), path)
        self.step, self.small_step = round(base * 1.35), round(base * 1.15)
        self.gap = max(14, round(side / 16))
        self.margin = 2 * self.gap
        present = [image for row in images for image in row if image is not None]
        self.width = max((image.width for image in present), default=side)
        self.height = max((image.height for image in present), default=side)
        self.label_width = self._label_width(row_labels)
        columns, rows = len(column_labels), len(row_labels)
        label_space = self.label_width + self.gap if self.label_width else 0
        self.left = self.margin + label_space
        full = self.left + columns * (self.width + self.gap) - self.gap + self.margin
        inner = full - 2 * self.margin
        title_lines = wrap(title, self.large, inner, 3) if title else []
        footer_lines = [line for part in (footer or "").splitlines() for line in wrap(part, self.small, inner, 6)]
        names = [wrap(label, self.text, self.width, 3) for label in column_labels]
        notes = [self._notes(note) for note in column_notes or [None] * columns]
        names_end = self.margin + max(len(lines) for lines in names) * self.step
        names_end += len(title_lines) * round(self.step * 1.4) + (self.gap // 2 if title_lines else 0)
        self.top = names_end + max(len(lines) for lines in notes) * self.small_step + self.gap // 2
        self.pitch = self.height + (self.step + self.gap // 3 if scored else 0) + self.gap
        bottom = self.top + rows * self.pitch - self.gap
        total = bottom + (self.gap + len(footer_lines) * self.small_step if footer_lines else 0) + self.margin
        self.paper = Image.new("RGB", (math.ceil(full), math.ceil(total)), PAPER)
        self.pen = ImageDraw.Draw(self.paper)
        for k, text in enumerate(title_lines):
            self.pen.text((self.margin, self.margin + k * round(self.step * 1.4)), text, INK, self.large)
        for c in range(columns):
            self._header(c, names_end, names[c], notes[c])
        for k, text in enumerate(footer_lines):
            self.pen.text((self.margin, bottom + self.gap + k * self.small_step), text, MUTED, self.small)

    def _label_width(self, row_labels: Sequence[str]) -> int:
        widest = max((self.text.getlength(label) for label in row_labels), default=0)
        return math.ceil(min(widest, max(1.0 * self.width, 180))) + 1 if widest else 0

    def _notes(self, note: str | None) -> list[str]:
        return [line for part in (note or "").splitlines() for line in wrap(part, self.small, self.width, 3)]

    def _header(self, column: int, names_end: int, name: list[str], notes: list[str]) -> None:
        middle = self.left + column * (self.width + self.gap) + self.width / 2
        y = names_end - len(name) * self.step
        for line in name:
            self.pen.text((middle, y), line, INK, self.text, anchor="ma", stroke_width=0.3)
            y += self.step
        for line in notes:
            self.pen.text((middle, y), line, MUTED, self.small, anchor="ma")
            y += self.small_step

    def row_label(self, row: int, label: str) -> None:
        lines = wrap(label, self.text, self.label_width, 4)
        y = self.top + row * self.pitch + (self.height - len(lines) * self.step) / 2
        for k, line in enumerate(lines):
            self.pen.text((self.margin, y + k * self.step), line, INK, self.text)

    def cell(
        self,
        row: int,
        column: int,
        image: Image.Image | None,
        score: float | None,
        against: float | None,
        best: bool,
        decimals: int,
    ) -> None:
        x, y = self.left + column * (self.width + self.gap), self.top + row * self.pitch
        if image is None:
            self.pen.rectangle((x, y, x + self.width - 1, y + self.height - 1), outline=LINE)
        else:
            corner = (x + (self.width - image.width) // 2, y + (self.height - image.height) // 2)
            self.paper.paste(image, corner)
            thick = max(3, self.gap // 4) if best else 1
            box = (corner[0] - thick, corner[1] - thick, corner[0] + image.width + thick - 1,
                   corner[1] + image.height + thick - 1)  # fmt: skip
            self.pen.rectangle(box, outline=FRAME if best else LINE, width=thick)
        if score is not None:
            self._score(x + self.width / 2, y + self.height + self.gap // 3, score, against, best, decimals)

    def _score(self, middle: float, y: float, score: float, against: float | None, best: bool, decimals: int) -> None:
        value = f"{score:.{decimals}f}"
        delta = "" if against is None else f"{score - against:+.{decimals}f}"
        space = self.text.getlength("  ") if delta else 0
        x = middle - (self.text.getlength(value) + space + self.small.getlength(delta)) / 2
        baseline = y + self.text.getmetrics()[0]
        self.pen.text((x, baseline), value, BETTER if best else INK, self.text, anchor="ls", stroke_width=0.3 * best)
        if delta and against is not None:
            colour = MUTED if abs(score - against) <= _TIE else BETTER if score > against else WORSE
            self.pen.text((x + self.text.getlength(value) + space, baseline), delta, colour, self.small, anchor="ls")


def _check(
    images: Sequence[Sequence[Image.Image | None]],
    row_labels: Sequence[str],
    column_labels: Sequence[str],
    scores: Scores | None,
    column_notes: Sequence[str | None] | None,
) -> None:
    if not row_labels or not column_labels:
        raise UserError("a grid needs at least one row and one column")
    if len(images) != len(row_labels):
        raise UserError(f"{len(images)} rows of images but {len(row_labels)} row labels")
    if scores is not None and len(scores) != len(images):
        raise UserError(f"{len(images)} rows of images but {len(scores)} rows of scores")
    for name, rows in (("images", images), ("scores", scores or [])):
        for index, row in enumerate(rows):
            if len(row) != len(column_labels):
                raise UserError(f"row {index} has {len(row)} {name} for {len(column_labels)} columns")
    if column_notes is not None and len(column_notes) != len(column_labels):
        raise UserError(f"{len(column_notes)} column notes for {len(column_labels)} columns")


def _cell_size(images: list[Image.Image], cell: int | None) -> tuple[int, int | None]:
    """Longest side of a shown image, and the whole number that enlarges every image if there is one."""
    longest = max((max(image.size) for image in images), default=SMALLEST_CELL)
    if cell is None:
        cell = min(longest, LARGEST_CELL)
        if longest < SMALLEST_CELL:
            cell = longest * math.ceil(SMALLEST_CELL / longest)
    return cell, cell // longest if cell % longest == 0 else None


def _scaled(image: Image.Image, side: int, factor: int | None) -> Image.Image:
    image = image.convert("RGB")
    if factor is not None:
        return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    scale = side / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.resize(size, Image.Resampling.LANCZOS)


def _best(scores: Sequence[float | None]) -> set[int]:
    """Columns of the best score, within a tolerance; none if there are fewer than two scores or all are equal."""
    known = {c: s for c, s in enumerate(scores) if s is not None and math.isfinite(s)}
    best = {c for c, s in known.items() if s >= max(known.values()) - _TIE}
    return best if len(best) < len(known) else set()
