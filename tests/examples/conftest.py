"""Examples import each other as scripts beside one another do."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
sys.path.insert(0, str(Path(__file__).parent))  # importlib mode alone does not find siblings
