"""What the harness knows of each pattern: one module, found by its name, with

* ``STATEMENTS``: the modules that make the pattern's statements, and ``READS``: the functions there
  whose statements neither change nor lock a row;
* ``SUBJECTS``: a `Subject` for each table: the operations that send these statements, in pairs;
* ``SCENARIOS``: a `Scenario` for each flow: what clients do, and what holds after each of their steps.
"""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any

from tests.interleavings.schedule import Scenario

DECLARATIONS: dict[str, Any] = {
    found.name: importlib.import_module(f"{__name__}.{found.name}")
    for found in pkgutil.iter_modules(__path__)
}
SCENARIOS: dict[str, Scenario] = {
    scenario.name: scenario for each in DECLARATIONS.values() for scenario in each.SCENARIOS
}
