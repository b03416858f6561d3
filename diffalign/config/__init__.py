"""Configuration: one dataclass is the YAML file, the command line and the record of a run.

A config is a keyword-only dataclass whose fields carry their own help::

    @dataclass(kw_only=True)
    class ToyConfig:
        '''Settings of the toy.'''

        output_dir: str = field(help="Folder that the run writes.")
        learning_rate: float = field(1e-5, help="Step size of the optimiser.")

        def __post_init__(self) -> None:
            if self.learning_rate <= 0:
                raise UserError(f"learning_rate must be above 0, got {self.learning_rate}")

    config = parse_args(ToyConfig)               # --config toy.yaml --learning_rate 1e-4

Keys and flags have the names of the fields. A key that no field has is an error, never ignored.
"""

from diffalign.config.command import command_line
from diffalign.config.fields import field, from_dict, to_dict
from diffalign.config.files import load_yaml, parse_yaml, save_yaml, write_text
from diffalign.config.flags import Parser, parse_args

__all__ = [
    "Parser",
    "command_line",
    "field",
    "from_dict",
    "load_yaml",
    "parse_args",
    "parse_yaml",
    "save_yaml",
    "to_dict",
    "write_text",
]
