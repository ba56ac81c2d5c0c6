"""`python -m rledit_env.cli`."""

import sys

from rledit_env.cli import main

sys.exit(main())
