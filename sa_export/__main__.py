"""`python -m sa_export` is `sa-export`."""

import sys

from sa_export.cli.main import main

sys.exit(main())
