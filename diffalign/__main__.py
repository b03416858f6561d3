"""``python -m diffalign`` and ``accelerate launch -m diffalign``: the same as the ``diffalign`` command."""

import sys

from diffalign.cli import main

sys.exit(main())
