"""`python -m megarlhf`."""

import sys

from megarlhf.cli import main

sys.exit(main())
