"""Lets the tests of this folder import `traced`, which importlib mode alone does not."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
