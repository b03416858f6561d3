"""``diffalign recipes``: the configs that come with the package."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from diffalign import recipes
from diffalign.config import Parser, write_text
from diffalign.errors import UserError


def main(argv: Sequence[str]) -> int:
    """List, show or copy recipes."""
    parser = Parser(
        prog="diffalign recipes",
        description="Configs that come with diffalign. `diffalign train METHOD --config NAME` uses one as it is; "
        "copy one to change it.",
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=Parser)
    commands.add_parser("list", help="list the recipes (also without a command)")
    show = commands.add_parser("show", help="print a recipe")
    show.add_argument("name", metavar="NAME")
    copy = commands.add_parser("copy", help="copy a recipe to a file of yours")
    copy.add_argument("name", metavar="NAME")
    copy.add_argument("dest", metavar="DEST", nargs="?", default=".", help="a file or a folder (default: here)")
    copy.add_argument("--force", action="store_true", help="overwrite DEST if it exists")
    launch = commands.add_parser("accelerate", help="print a configuration for `accelerate launch` on several cards")
    launch.add_argument("name", metavar="NAME", choices=recipes.launch_configs(), help="ddp, fsdp2 or zero2")
    launch.add_argument("--path", action="store_true", help="print where it lies, for --config_file")
    args = parser.parse_args(list(argv))
    if args.command == "accelerate":
        file = recipes.find_launch_config(args.name)
        print(file if args.path else file.read_text(encoding="utf-8"), end="\n" if args.path else "")
        return 0
    if args.command == "show":
        print(recipes.find(args.name).read_text(encoding="utf-8"), end="")
    elif args.command == "copy":
        print(copy_recipe(args.name, Path(args.dest), force=args.force))
    else:
        width = max(map(len, recipes.names()), default=0)
        for name in recipes.names():
            print(f"{name:<{width}}  {recipes.summary(name)}")
    return 0


def copy_recipe(name: str, dest: Path, *, force: bool = False) -> Path:
    """Copy a recipe to ``dest``, a file or an existing folder, and return the file written.

    Raises:
        UserError: no such recipe, the file exists and ``force`` is off, or the folder does not exist.
    """
    source = recipes.find(name)
    path = dest / source.name if dest.is_dir() else dest
    if path.exists() and not force:
        raise UserError(f"{path} exists; choose another name or overwrite it with --force")
    if not path.parent.is_dir():
        raise UserError(f"the folder {path.parent} does not exist")
    return write_text(path, source.read_text(encoding="utf-8"))
