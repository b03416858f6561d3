"""The comparison grid: rows are prompts, columns are models, scores under the images.

Only Pillow is needed; the font is the one Pillow carries.
"""

from __future__ import annotations

import bisect
import functools
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from PIL import Image, ImageDraw, ImageFont

from diffalign.errors import UserError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Theme:
    """Colours of a grid."""

    paper: str
    ink: str
    muted: str
    line: str
    better: str
    worse: str
    frame: str


THEMES = {
    "light": Theme("#ffffff", "#1f2328", "#6e7781", "#d8dee4", "#1a7f37", "#b35900", "#2da44e"),
    "dark": Theme("#131518", "#e6e8eb", "#8d96a0", "#343a41", "#56c271", "#e0913a", "#3fb950"),
}
SMALLEST_CELL, LARGEST_CELL = 160, 384
_TIE = 1e-6
_NOT_A_LETTER = "\ue123"
_FALLBACKS = ("NotoSans-Regular.ttf", "DejaVuSans.ttf", "Arial.ttf", "Arial Unicode.ttf", "NotoSansCJK-Regular.ttc")

Scores = Sequence[Sequence[float | None]]
ThemeName = Literal["light", "dark"]


def make_grid(
    images: Sequence[Sequence[Image.Image | None]],
    row_labels: Sequence[str],
    column_labels: Sequence[str],
    *,
    scores: Scores | Mapping[str, Scores] | None = None,
    against: Sequence[int] | None = None,
    column_notes: Sequence[str | None] | None = None,
    title: str | None = None,
    footer: str | None = None,
    highlight: bool = True,
    decimals: int | None = None,
    cell: int | None = None,
    font: str | Path | None = None,
    theme: ThemeName = "light",
) -> Image.Image:
    """Draw a grid of images with labels.

    Args:
        images: rows of images, one for each column; None leaves a place empty. Images keep their shape.
        row_labels: one for each row (the prompt), wrapped to four lines beside the row.
        column_labels: one for each column (the model), above it.
        scores: rows x columns, higher is better; or such a table for each of several scorers, by name. Each is a line
            under the images, with the difference to the column that is compared with.
        against: the place of the column that each is compared with; by default the first.
        column_notes: small text under each column's label (mean score, win rate).
        title, footer: text above and below.
        highlight: frame the best image of each row by the (first) score; none where all are equal. The best score of
            each line is green and bold.
        decimals: of the scores; by default as many as tell them apart, see :func:`decimals_for`.
        cell: longest side of a shown image in pixels; by default the images' own, within 160 to 384 (small ones are
            enlarged by whole numbers, so that their pixels stay square and sharp).
        font: a TrueType or OpenType file. By default Pillow's own, which has little beyond ASCII; where a label needs
            more, a common font of the system that has it, and a warning if there is none.
        theme: light or dark.

    Raises:
        UserError: the numbers of images, labels and scores do not fit each other.
    """
    tables = dict(scores) if isinstance(scores, Mapping) else {} if scores is None else {"": scores}
    rivals = [0] * len(column_labels) if against is None else list(against)
    _check(images, row_labels, column_labels, tables, column_notes, rivals)
    side, factor = _cell_size([image for row in images for image in row if image is not None], cell)
    shown = [[None if image is None else _scaled(image, side, factor) for image in row] for row in images]
    font = font or _font_with(" ".join([title or "", footer or "", *row_labels, *column_labels]))
    canvas = _Canvas(
        side, font, len(tables), shown, row_labels, column_labels, column_notes, title, footer, THEMES[theme]
    )
    places = {name: decimals_for(table) if decimals is None else decimals for name, table in tables.items()}
    for r, row in enumerate(shown):
        canvas.row_label(r, row_labels[r])
        best = {name: _best(table[r]) for name, table in tables.items()}
        framed = next(iter(best.values()), set()) if highlight else set()
        for c, image in enumerate(row):
            canvas.cell(r, c, image, c in framed)
            for k, (name, table) in enumerate(tables.items()):
                score, other = _known(table[r][c]), None if rivals[c] == c else _known(table[r][rivals[c]])
                if score is not None:
                    canvas.score(r, c, k, name, score, other, c in best[name] and highlight, places[name])
    return canvas.paper


def save_picture(picture: Image.Image, path: Path) -> None:
    """Write a PNG in one step."""
    aside = path.with_name(f".{path.stem}.tmp.png")
    picture.save(aside)
    aside.replace(path)


def _known(score: float | None) -> float | None:
    return score if score is not None and math.isfinite(score) else None


def decimals_for(scores: Scores) -> int:
    """Decimals, 2 to 4, that show scores to about a tenth of their spread: 2 for PickScore, 3 for HPS."""
    known = [s for row in scores for s in row if s is not None and math.isfinite(s)]
    mean = sum(known) / max(len(known), 1)
    spread = math.sqrt(sum((s - mean) ** 2 for s in known) / max(len(known), 1))
    return min(4, max(2, 1 - math.floor(math.log10(spread)))) if spread > 0 else 2


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
        lines: int,
        images: list[list[Image.Image | None]],
        row_labels: Sequence[str],
        column_labels: Sequence[str],
        column_notes: Sequence[str | None] | None,
        title: str | None,
        footer: str | None,
        theme: Theme,
    ) -> None:
        self.theme = theme
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
        self.pitch = self.height + (lines * self.step + self.gap // 3 if lines else 0) + self.gap
        bottom = self.top + rows * self.pitch - self.gap
        total = bottom + (self.gap + len(footer_lines) * self.small_step if footer_lines else 0) + self.margin
        self.paper = Image.new("RGB", (math.ceil(full), math.ceil(total)), theme.paper)
        self.pen = ImageDraw.Draw(self.paper)
        for k, text in enumerate(title_lines):
            self.pen.text((self.margin, self.margin + k * round(self.step * 1.4)), text, theme.ink, self.large)
        for c in range(columns):
            self._header(c, names_end, names[c], notes[c])
        for k, text in enumerate(footer_lines):
            self.pen.text((self.margin, bottom + self.gap + k * self.small_step), text, theme.muted, self.small)

    def _label_width(self, row_labels: Sequence[str]) -> int:
        widest = max((self.text.getlength(label) for label in row_labels), default=0)
        return math.ceil(min(widest, max(1.0 * self.width, 180))) + 1 if widest else 0

    def _notes(self, note: str | None) -> list[str]:
        return [line for part in (note or "").splitlines() for line in wrap(part, self.small, self.width, 3)]

    def _header(self, column: int, names_end: int, name: list[str], notes: list[str]) -> None:
        middle = self.left + column * (self.width + self.gap) + self.width / 2
        y = names_end - len(name) * self.step
        for line in name:
            self.pen.text((middle, y), line, self.theme.ink, self.text, anchor="ma", stroke_width=0.3)
            y += self.step
        for line in notes:
            self.pen.text((middle, y), line, self.theme.muted, self.small, anchor="ma")
            y += self.small_step

    def row_label(self, row: int, label: str) -> None:
        lines = wrap(label, self.text, self.label_width, 4)
        y = self.top + row * self.pitch + (self.height - len(lines) * self.step) / 2
        for k, line in enumerate(lines):
            self.pen.text((self.margin, y + k * self.step), line, self.theme.ink, self.text)

    def cell(self, row: int, column: int, image: Image.Image | None, framed: bool) -> None:
        x, y = self._corner(row, column)
        if image is None:
            self.pen.rectangle((x, y, x + self.width - 1, y + self.height - 1), outline=self.theme.line)
            return
        corner = (x + (self.width - image.width) // 2, y + (self.height - image.height) // 2)
        self.paper.paste(image, corner)
        thick = max(3, self.gap // 4) if framed else 1
        box = (corner[0] - thick, corner[1] - thick, corner[0] + image.width + thick - 1,
               corner[1] + image.height + thick - 1)  # fmt: skip
        self.pen.rectangle(box, outline=self.theme.frame if framed else self.theme.line, width=thick)

    def score(
        self,
        row: int,
        column: int,
        line: int,
        name: str,
        score: float,
        against: float | None,
        best: bool,
        decimals: int,
    ) -> None:
        """A line under a cell: the scorer's name where there is one, the score, the difference."""
        theme = self.theme
        value = f"{score:.{decimals}f}"
        delta = "" if against is None else f"{score - against:+.{decimals}f}"
        parts = [(value, theme.better if best else theme.ink, self.text, 0.3 * best)]
        if delta and against is not None:
            change = theme.muted if abs(score - against) <= _TIE else theme.better if score > against else theme.worse
            parts.append((delta, change, self.small, 0))
        space = self.text.getlength("  ")
        width = sum(font.getlength(text) for text, _, font, _ in parts) + space * (len(parts) - 1)
        if name:
            room = self.width + self.gap * 0.7 - width - space  # columns stand a gap apart
            label = wrap(name, self.small, max(room, 1), 1)[0]
            parts.insert(0, (label, theme.muted, self.small, 0))
            width += self.small.getlength(label) + space
        left, y = self._corner(row, column)
        x = left + (self.width - width) / 2
        baseline = y + self.height + self.gap // 3 + line * self.step + self.text.getmetrics()[0]
        for text, colour, font, stroke in parts:
            self.pen.text((x, baseline), text, colour, font, anchor="ls", stroke_width=stroke)
            x += font.getlength(text) + space

    def _corner(self, row: int, column: int) -> tuple[int, int]:
        return self.left + column * (self.width + self.gap), self.top + row * self.pitch


def _check(
    images: Sequence[Sequence[Image.Image | None]],
    row_labels: Sequence[str],
    column_labels: Sequence[str],
    tables: Mapping[str, Scores],
    column_notes: Sequence[str | None] | None,
    against: Sequence[int],
) -> None:
    if not row_labels or not column_labels:
        raise UserError("a grid needs at least one row and one column")
    if len(images) != len(row_labels):
        raise UserError(f"{len(images)} rows of images but {len(row_labels)} row labels")
    for name, rows in (("images", images), *((f"scores {name}".strip(), table) for name, table in tables.items())):
        if len(rows) != len(images):
            raise UserError(f"{len(images)} rows of images but {len(rows)} rows of {name}")
        for index, row in enumerate(rows):
            if len(row) != len(column_labels):
                raise UserError(f"row {index} has {len(row)} {name} for {len(column_labels)} columns")
    if column_notes is not None and len(column_notes) != len(column_labels):
        raise UserError(f"{len(column_notes)} column notes for {len(column_labels)} columns")
    if len(against) != len(column_labels) or not all(0 <= c < len(column_labels) for c in against):
        raise UserError(f"against must name a column for each of {len(column_labels)}, got {list(against)}")


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
